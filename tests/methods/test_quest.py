"""Quest reads the newest pages and those whose key extremes promise the most."""

import drive
import numpy as np
import oracles
import pytest

from kvjax.methods.quest import quest
from kvjax.stores import buffers

DEFAULT = {"budget": 12, "page_size": 4}


def check(stream, chunks=None, capacity=None, **options):
    options = DEFAULT | options
    spec = drive.make_spec(stream, capacity=capacity)
    run = drive.run(quest(**options), spec, stream, chunks)
    drive.assert_matches(run, stream, oracles.quest, **options)
    return run


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((2, 2), {"per": "kv"}),
        ((2, 2), {"per": "query"}),
        ((4, 1), {"per": "kv", "group_reduce": "max"}),
        ((6, 2), {"per": "kv"}),
        ((6, 2), {"per": "query", "recent": 2}),
        ((6, 2), {"per": "kv", "recent": 3}),
        ((4, 2), {"budget": 4, "recent": 1}),
    ],
)
def test_equals_float64_loops(heads, options):
    """Prompts that end one token before, at and after a page, and a tiny one."""
    stream = drive.make_stream((1, 27, 28, 29, 5), 13, heads=heads)
    check(stream, **options)


@pytest.mark.parametrize(("page_size", "budget"), [(1, 5), (3, 9), (16, 32)])
def test_page_sizes(page_size, budget):
    """With pages of one token the bound is the logit itself."""
    stream = drive.make_stream((40, 17), 6)
    check(stream, page_size=page_size, budget=budget)


@pytest.mark.parametrize("capacity", [41, 44])
def test_reads_to_the_last_slot(capacity):
    """A capacity that ends inside a page, and one that ends with it."""
    check(drive.make_stream((capacity - 9, 3), 9), capacity=capacity)


@pytest.mark.parametrize(
    "chunks",
    [[(9, 1), (9, 0), (0, 20), (3, 2)], [(1, 1)] * 2 + [(2, 3)] * 7 + [(5, 0)]],
    ids=["holes", "pairs"],
)
def test_chunks_that_split_pages(chunks):
    check(drive.make_stream((21, 23), 4), chunks)


def test_a_share_of_the_tokens_so_far():
    """Where it is more than the budget; at each length, as that budget would read."""
    stream = drive.make_stream((17, 60), 12)
    method = quest(budget=8, page_size=4, budget_ratio=0.3)
    spec = drive.make_spec(stream)
    run = drive.run(method, spec, stream)
    budgets = set()
    for b, prompt in enumerate(stream.prompts):
        attention = oracles.Attention(stream.row(b))
        for i in range(stream.steps):
            t = prompt + i
            budget = max(8, int(np.floor(np.float32(0.3) * np.float32(t + 1))))
            budget = budget // 4 * 4
            budgets.add(budget)
            heads = drive.attended_positions(run.diagnostics.attended[i, b], 4)
            for h in range(4):
                pages = oracles.quest_pages(
                    attention,
                    t,
                    h // 2,
                    (h // 2 * 2, h // 2 * 2 + 1),
                    budget=budget,
                    page_size=4,
                    group_reduce="mean",
                    recent=1,
                )
                kept = [j for j in range(t + 1) if j // 4 in pages]
                assert heads[h] == kept, (b, t, h)
                out, lse, _ = attention(t, h, kept)
                drive.assert_rows_close(run.out[i, b, h], out)
                assert abs(run.diagnostics.lse[i, b, h, 0] - lse) < 2e-5
            read = len(heads[0]) + (-len(heads[0])) % 4
            traffic = method.traffic(spec, t + 1)
            assert traffic.kv == buffers.kv_bytes(spec, read)
    assert budgets == {8, 16, 20}


def test_an_empty_prompt():
    check(drive.make_stream((0, 10), 15))


def test_half_precision_is_consistent():
    stream = drive.make_stream((30, 5), 6, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    run = drive.run(quest(**DEFAULT), spec, stream)
    drive.assert_consistent(run, stream, "bfloat16")


def test_finds_the_page_of_a_needle():
    """One key far along each query's direction: its page is read at every step."""
    stream = drive.make_stream((64,), 4, heads=(2, 2))
    t = 64 + np.arange(4)
    needle = 13
    stream.q[:, :, t] = 0.0
    stream.q[:, :, t, -1] = 1.0  # the slowest frequency: hardly turned by position
    stream.k[:, :, needle] = 0.0
    stream.k[:, :, needle, -1] = 50.0
    run = check(stream, budget=8)
    assert all(
        needle in head[head >= 0]
        for step in run.diagnostics.attended[:, 0]
        for head in step
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget=0.*page_size=16"),
        ({"budget": 24}, r"budget=24.*page_size=16"),
        ({"budget": 16, "page_size": 0}, r"page_size=0"),
        ({"budget": 32, "recent": 3}, r"recent=3.*budget=32"),
        ({"budget": 32, "recent": 0}, r"recent=0"),
        ({"per": "head"}, r"per='head' must be"),
        ({"group_reduce": "sum"}, r"group_reduce='sum' must be one of mean, max"),
        ({"budget_ratio": 0.0}, r"budget_ratio=0.0 must be in \(0, 1\]"),
        ({"budget_ratio": 1.5}, r"budget_ratio=1.5 must be in"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        quest(**options)


def test_defaults_of_the_paper():
    """Pages of 16, one recent, per KV head by the mean of the group, when left out."""
    stream = drive.make_stream((150,), 2, heads=(4, 2))
    run = drive.run(quest(budget=48), drive.make_spec(stream), stream)
    options = {"budget": 48, "page_size": 16, "recent": 1}
    options |= {"per": "kv", "group_reduce": "mean"}
    drive.assert_matches(run, stream, oracles.quest, **options)
