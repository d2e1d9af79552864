"""TOVA drops the token that the last query looked at least, one set for all heads."""

import drive
import oracles
import pytest

from kvjax.methods.tova import tova


def check(stream, chunks=None, budget=8):
    run = drive.run(tova(budget=budget), drive.make_spec(stream), stream, chunks)
    drive.assert_matches(run, stream, oracles.tova, budget=budget)


@pytest.mark.parametrize(
    ("heads", "budget"), [((2, 2), 1), ((4, 1), 2), ((6, 2), 8), ((2, 2), 8)]
)
def test_equals_float64_loops(heads, budget):
    """Twenty evictions, from prompts below, at and above the budget."""
    check(drive.make_stream((1, 7, 8, 9, 30), 20, heads=heads), budget=budget)


@pytest.mark.parametrize(
    "chunks",
    [
        [(10, 5), (10, 22), (1, 0), (0, 0)],
        [(21, 2), (0, 2), (0, 23)],
        [(1, 1)] + [(2, 2)] * 10 + [(0, 6)],
    ],
    ids=["holes", "late", "pairs"],
)
def test_the_last_query_may_lie_in_any_chunk(chunks):
    check(drive.make_stream((21, 27), 4), chunks)


def test_ties_evict_the_lower_position():
    """Zero queries weigh all tokens alike: the oldest goes, sinks and all."""
    stream = drive.make_stream((0, 3), 12, heads=(2, 1))
    stream.q[:] = 0.0
    check(stream, budget=4)


def test_half_precision_is_consistent():
    stream = drive.make_stream((30, 5), 12, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    run = drive.run(tova(budget=8), spec, stream)
    drive.assert_consistent(run, stream, "bfloat16")
    kept = drive.attended_positions(run.diagnostics.attended[-1, 0], 4)
    assert all(head == kept[0] for head in kept)
    assert len(kept[0]) == 8
    assert kept[0][-1] == 41


@pytest.mark.parametrize("budget", [0, -3])
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(budget):
    with pytest.raises(ValueError, match=f"budget={budget} must be at least 1"):
        tova(budget=budget)
