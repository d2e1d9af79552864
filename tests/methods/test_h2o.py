"""H2O evicts, among all but the newest, the token that received least attention."""

import drive
import oracles
import pytest

from kvjax.methods.h2o import h2o
from kvjax.stores import buffers


def check(stream, chunks=None, **options):
    options = {"budget": 8, "recent": 4, "group_reduce": "max"} | options
    run = drive.run(h2o(**options), drive.make_spec(stream), stream, chunks)
    drive.assert_matches(run, stream, oracles.h2o, **options)


@pytest.mark.parametrize(
    ("heads", "group_reduce"), [((2, 2), "max"), ((4, 1), "max"), ((6, 2), "mean")]
)
def test_equals_float64_loops(heads, group_reduce):
    """Twenty evictions in a cache of eight, from prompts below and above the budget."""
    stream = drive.make_stream((1, 7, 8, 9, 30), 20, heads=heads)
    check(stream, group_reduce=group_reduce)


@pytest.mark.parametrize(("budget", "recent"), [(2, 1), (8, 1), (8, 7)])
def test_budgets(budget, recent):
    check(drive.make_stream((2, 6, 20), 18), budget=budget, recent=recent)


@pytest.mark.parametrize(
    "chunks",
    [
        [(10, 5), (10, 20), (0, 0), (1, 2)],
        [(21, 2), (0, 2), (0, 23)],
        [(1, 1)] + [(2, 2)] * 10 + [(0, 6)],
    ],
    ids=["thirds", "late", "pairs"],
)
def test_scores_add_up_over_chunks(chunks):
    check(drive.make_stream((21, 27), 6), chunks)


def test_ties_evict_the_lower_position():
    """With equal keys every token of one age has the same weights as its peers."""
    stream = drive.make_stream((0,), 12, heads=(2, 1))
    stream.q[:] = 0.0
    check(stream, budget=4, recent=2)
    check(stream, budget=4, recent=1)


def test_an_empty_prompt():
    check(drive.make_stream((0, 10), 12))


def test_half_precision_is_consistent():
    stream = drive.make_stream((30, 5), 12, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    run = drive.run(h2o(budget=8, recent=3), spec, stream)
    drive.assert_consistent(run, stream, "bfloat16")
    for kept in drive.attended_positions(run.diagnostics.attended[-1, 0], 4):
        assert len(kept) == 8
        assert kept[-3:] == [39, 40, 41]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget=0 must be at least 2"),
        ({"budget": 1}, r"budget=1 must be at least 2"),
        ({"budget": 8, "recent": 8}, r"recent=8 must be in \[1, budget=8\)"),
        ({"budget": 8, "recent": 0}, r"recent=0 must be in \[1, budget=8\)"),
        ({"group_reduce": "sum"}, r"group_reduce='sum' must be one of mean, max"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        h2o(**options)


def test_defaults_half_of_the_budget_is_recent():
    stream = drive.make_stream((20, 30), 10)
    run = drive.run(h2o(budget=9), drive.make_spec(stream), stream)
    options = {"budget": 9, "recent": 4, "group_reduce": "max"}
    drive.assert_matches(run, stream, oracles.h2o, **options)


def test_padding_votes_for_nothing(monkeypatch):
    """Zeroed buffers: poison, elsewhere, would draw the weight of a padded query."""
    monkeypatch.setattr(buffers, "fill_value", 0.0)
    check(drive.make_stream((9, 12, 30), 12, heads=(2, 2), seed=5))
