"""RefreshKV against the paper's Algorithm 1, and its theorems."""

import math

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.interface import Traffic
from kvjax.methods.refreshkv.method import refreshkv


def check(stream, **options):
    """Outputs, attended sets, log-sum-exps and full steps of every row."""
    run = drive.run(refreshkv(**options), drive.make_spec(stream), stream)
    options.pop("qc_batch", None)
    drive.assert_matches(run, stream, lambda row: oracles.refreshkv(row, **options)[0])
    for b in range(len(stream.prompts)):
        fulls = oracles.refreshkv(stream.row(b), **options)[1]
        assert run.diagnostics.refreshed[:, b].tolist() == fulls
        assert run.state.refreshes[b] == sum(fulls)
    return run


STREAM = drive.make_stream((0, 1, 6, 25), 14, heads=(4, 2), seed=3)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "fixed", "stride": 3, "kernel": 1},
        {"schedule": "fixed", "stride": 9, "self_mode": "snapkv", "kernel": 5},
        {"schedule": "qc", "stride": 2, "threshold": 0.1, "group_reduce": "mean"},
        {"schedule": "qc", "stride": 3, "threshold": 0.0, "qc_rope": "pre"},
        {"schedule": "qc", "stride": 1, "threshold": -1.0, "max_gap": 4},
        {"schedule": "never", "stride": 2, "self_mode": "drop"},
        {"schedule": "fixed", "stride": 4, "full_attend": False, "kernel": 3},
        {"schedule": "fixed", "stride": 4, "refresh": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_equals_algorithm_1_in_float64(options):
    """Ragged rows, one of them empty; rings that wrap; rows that refresh alone."""
    run = check(STREAM, budget=6, **options)
    if options["schedule"] == "qc" and options["threshold"] >= 0:
        refreshed = run.diagnostics.refreshed
        # The rows really part, or nothing was tested.
        assert (refreshed.any(1) & ~refreshed.all(1)).any()


def test_a_group_with_one_head_each_and_one_for_all():
    for heads in ((2, 2), (4, 1)):
        stream = drive.make_stream((12,), 6, heads=heads, seed=5)
        check(stream, budget=5, schedule="fixed", stride=3)


def test_any_row_takes_all_with_it():
    run = drive.run(
        refreshkv(budget=6, stride=2, threshold=0.1, qc_batch="any"),
        drive.make_spec(STREAM),
        STREAM,
    )
    refreshed = run.diagnostics.refreshed
    assert (refreshed.all(1) == refreshed.any(1)).all()
    assert 0 < refreshed[:, 0].sum() < STREAM.steps
    drive.assert_consistent(run, STREAM)


def outputs(stream, **options):
    run = drive.run(refreshkv(**options), drive.make_spec(stream), stream)
    return run.out


def test_a_threshold_of_one_is_the_fixed_schedule():
    fixed = outputs(STREAM, budget=6, stride=3, schedule="fixed")
    qc = outputs(STREAM, budget=6, stride=3, schedule="qc", threshold=1.0)
    np.testing.assert_array_equal(qc, fixed)


def test_a_full_step_every_time_is_full_attention():
    options = {"budget": 4, "stride": 1, "schedule": "fixed"}
    run = drive.run(refreshkv(**options), drive.make_spec(STREAM), STREAM)
    drive.assert_matches(run, STREAM, oracles.full)
    assert run.diagnostics.exact.all()


def test_small_steps_read_the_small_cache_alone():
    """What was not selected may be anything; what was decides the output."""
    method = refreshkv(budget=6, schedule="never")
    spec = drive.make_spec(STREAM)
    state, _ = drive.prefill(method, spec, STREAM)
    state = jax.jit(method.finish)(state)
    q, k, v = (x[0] for x in drive.step_inputs(STREAM))
    step = jax.jit(lambda state: drive.step(method, state, (q, k, v)))
    store = state.store
    poisoned = store._replace(
        k=jnp.full_like(store.k, math.nan), v=jnp.full_like(store.v, math.nan)
    )
    _, (expected, _) = step(state)
    _, (out, _) = step(state._replace(store=poisoned))
    np.testing.assert_array_equal(out, expected)
    _, (moved, _) = step(state._replace(v=state.v + 1.0))
    assert np.abs(moved - expected)[1:].min(axis=-1).max() > 1e-3


def test_slots_in_any_order_give_the_same_output():
    method = refreshkv(budget=6, schedule="never")
    state, _ = drive.prefill(method, drive.make_spec(STREAM), STREAM)
    state = jax.jit(method.finish)(state)
    q, k, v = (x[0] for x in drive.step_inputs(STREAM))
    order = np.array([0, 3, 5, 1, 4, 2])  # the next token's own slot stays
    shuffled = state._replace(
        k=state.k[:, :, order],
        v=state.v[:, :, order],
        positions=state.positions[:, :, order],
    )
    step = jax.jit(lambda state: drive.step(method, state, (q, k, v)))
    out, other = (step(x)[1][0] for x in (state, shuffled))
    np.testing.assert_allclose(out, other, atol=1e-6)


def test_traffic_is_the_mean_over_a_stride():
    stream = drive.make_stream((3,), 1, head_dim=64)
    spec = drive.make_spec(stream, capacity=4096)
    never, fixed, keys_only = (
        refreshkv(budget=64, **options)
        for options in (
            {"schedule": "never"},
            {"schedule": "fixed", "stride": 5},
            {"schedule": "fixed", "stride": 5, "full_attend": False},
        )
    )
    token = 2 * 2 * 64 * 4  # keys and values of two heads in float32
    positions = 2 * 64 * 4
    assert never.traffic(spec, 4096) == Traffic(64 * token, positions)
    assert fixed.traffic(spec, 4096) == Traffic((4096 + 4 * 64) * token // 5, positions)
    read_to_choose = 4096 * token // 2 // 5
    assert keys_only.traffic(spec, 4096) == Traffic(
        64 * token, positions + read_to_choose
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "budget=1 must be at least 2 tokens"),
        ({"budget": 2, "self_mode": "snapkv"}, "budget=2 must be at least 3 tokens"),
        ({"stride": 0}, "stride=0 must be at least 1 step"),
        ({"stride": float("nan")}, "stride=nan must be of type int"),
        ({"stride": 2.5}, "stride=2.5 must be of type int"),
        ({"max_gap": float("inf")}, "max_gap=inf must be of type int or None"),
        ({"threshold": float("nan")}, "threshold=nan must be a number"),
        ({"kernel": 4}, "kernel=4 must be odd"),
        ({"max_gap": 0}, "max_gap=0 must be at least 1 step"),
        ({"schedule": "often"}, "schedule='often' must be one of fixed, qc, never"),
        ({"group_reduce": "sum"}, "group_reduce='sum' must be one of mean, max"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        refreshkv(**options)
