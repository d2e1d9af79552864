"""The oracle keeps the tokens with the largest true weights."""

import drive
import numpy as np
import oracles
import pytest

from kvjax.methods.oracle_topk import oracle_topk


def check(stream, chunks=None, **options):
    run = drive.run(oracle_topk(**options), drive.make_spec(stream), stream, chunks)
    drive.assert_matches(run, stream, oracles.oracle_topk, **options)
    return run


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((2, 2), {"budget": 6}),
        ((6, 2), {"budget": 6}),
        ((6, 2), {"budget": 6, "per": "query"}),
        ((4, 1), {"budget": 1}),
    ],
)
def test_equals_float64_loops(heads, options):
    check(drive.make_stream((1, 5, 6, 30), 9, heads=heads), **options)


def test_ties_keep_the_lower_position():
    """Zero queries: all weights are equal, and the first tokens stay."""
    stream = drive.make_stream((9,), 3)
    stream.q[:] = 0.0
    run = check(stream, budget=4)
    assert drive.attended_positions(run.diagnostics.attended[-1, 0], 4)[0] == [
        0,
        1,
        2,
        3,
    ]


def test_holds_more_mass_than_any_other_set():
    """No random set of the same size has a larger log-sum-exp."""
    stream = drive.make_stream((40,), 1, heads=(2, 2))
    run = check(stream, budget=5)
    row = stream.row(0)
    rng = np.random.default_rng(0)
    for h in range(2):
        query = oracles.rotate(row.q[h, 40], 40)
        for _ in range(200):
            kept = rng.choice(41, 5, replace=False)
            keys = [oracles.rotate(row.k[h, j], j) for j in kept]
            _, lse, _ = oracles.softmax_attention(query, keys, row.v[h, kept])
            assert lse <= run.diagnostics.lse[0, 0, h, 0] + 1e-5


def test_half_precision_is_consistent():
    stream = drive.make_stream((30, 5), 6, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    for per in ("kv", "query"):
        run = drive.run(oracle_topk(budget=8, per=per), spec, stream)
        drive.assert_consistent(run, stream, "bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget=0 must be at least 1"),
        ({"per": "head"}, r"per='head' must be 'kv' or 'query'"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        oracle_topk(**options)
