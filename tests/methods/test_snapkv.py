"""SnapKV keeps what the last queries of the prompt voted for, and all that follows."""

import drive
import numpy as np
import oracles
import pytest

from kvjax import accounting
from kvjax.methods.snapkv import snapkv

DEFAULT = {
    "budget": 12,
    "window": 4,
    "kernel": 3,
    "pooling": "max",
    "group_reduce": "max",
}


def check(stream, chunks=None, dtype="float32", capacity=None, **options):
    options = DEFAULT | options
    spec = drive.make_spec(stream, dtype=dtype, capacity=capacity)
    run = drive.run(snapkv(**options), spec, stream, chunks)
    drive.assert_matches(run, stream, oracles.snapkv, dtype, **options)
    return run


@pytest.mark.parametrize(
    ("heads", "pooling", "group_reduce"),
    [
        ((2, 2), "max", "max"),
        ((4, 1), "mean", "max"),
        ((6, 2), "max", "mean"),
        ((6, 2), "mean", "mean"),
    ],
)
def test_equals_float64_loops(heads, pooling, group_reduce):
    """Prompts below, at and above the budget, in one batch."""
    stream = drive.make_stream((1, 3, 12, 13, 40), 3, heads=heads)
    check(stream, pooling=pooling, group_reduce=group_reduce)


@pytest.mark.parametrize(
    ("kernel", "window", "pooling"),
    [(1, 1, "max"), (5, 11, "mean"), (7, 1, "mean"), (31, 11, "max")],
)
def test_windows_and_kernels(kernel, window, pooling):
    """A kernel wider than the prefix, a window of all but one token of the budget."""
    stream = drive.make_stream((13, 29), 2, seed=kernel)
    check(stream, kernel=kernel, window=window, pooling=pooling)


@pytest.mark.parametrize(
    "chunks",
    [
        [(10, 5), (10, 30), (10, 0)],
        [(30, 2), (0, 2), (0, 31)],
        [(28, 34), (1, 1), (1, 0)],
        [(2, 2)] + [(2, 3)] * 11 + [(6, 0)],
    ],
    ids=["thirds", "late", "last-tokens", "pairs"],
)
def test_the_window_may_span_chunks(chunks):
    """The last queries of a row may lie in an earlier chunk, or in several."""
    check(drive.make_stream((30, 35), 3), chunks)


def test_pooling_stays_inside_the_prefix():
    """Mean: a position next to the window would win if its neighbours counted."""
    stream = drive.make_stream((24,), 1, sharpness=4.0, seed=3)
    # The window's own tokens receive nearly all attention.
    stream.k[:, :, 20:24] = 3 * np.sign(stream.q[:, :2, 20:24])
    check(stream, pooling="mean", kernel=7)
    check(stream, pooling="max", kernel=7)


def test_half_precision_keeps_the_window_and_is_consistent():
    """Rounding may swap two votes; attention over what was kept must still be right."""
    stream = drive.make_stream((40, 9), 4, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    run = drive.run(snapkv(**DEFAULT), spec, stream)
    drive.assert_consistent(run, stream, "bfloat16")
    kept = drive.attended_positions(run.diagnostics.attended[-1, 0], 4)[0]
    assert len(kept) == 16
    assert kept[-8:] == list(range(36, 44))


def test_decode_state_does_not_depend_on_the_capacity():
    stream = drive.make_stream((9,), 5)
    sizes = []
    for capacity in (64, 8192):
        spec = drive.make_spec(stream, capacity=capacity)
        sizes.append(accounting.state_bytes(snapkv(**DEFAULT), spec))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget=0 must exceed window=32"),
        ({"budget": 32}, r"budget=32 must exceed window=32"),
        ({"budget": 8, "window": 9}, r"budget=8 must exceed window=9"),
        ({"budget": 8, "window": 0}, r"window=0 must be at least 1"),
        ({"kernel": 4}, r"kernel=4 must be odd"),
        ({"kernel": -1}, r"kernel=-1 must be odd and at least 1"),
        ({"pooling": "median"}, r"pooling='median' must be one of mean, max"),
        ({"group_reduce": "sum"}, r"group_reduce='sum' must be one of mean, max"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        snapkv(**options)


def test_defaults_of_the_paper():
    """Window 32, kernel 7, max pooling, max over the group, when left out."""
    stream = drive.make_stream((70,), 1, heads=(4, 2))
    run = drive.run(snapkv(budget=40), drive.make_spec(stream), stream)
    options = {
        "budget": 40,
        "window": 32,
        "kernel": 7,
        "pooling": "max",
        "group_reduce": "max",
    }
    drive.assert_matches(run, stream, oracles.snapkv, **options)
