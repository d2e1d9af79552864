"""TokenSelect: one list a layer, by vote, numbered anew, kept while queries agree."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.attention import selection
from kvjax.methods.token_select import token_select

SMALL = {"budget": 8, "num_sinks": 2, "window": 3}


def check(stream, dtype="float32", chunks=None, **options):
    spec = drive.make_spec(stream, dtype=dtype)
    run = drive.run(token_select(**options), spec, stream, chunks)
    drive.assert_matches(run, stream, oracles.token_select, dtype, **options)
    return run


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((2, 2), SMALL),
        ((6, 2), SMALL),
        ((4, 1), {"budget": 7, "num_sinks": 0, "window": 1}),
        ((6, 2), SMALL | {"threshold": 0.9}),
        ((4, 2), SMALL | {"threshold": 0.1}),
    ],
)
def test_equals_float64_loops(heads, options):
    """Prompts within the budget, at it and beyond; some rows choose, some do not."""
    check(drive.make_stream((1, 5, 8, 30), 12, heads=heads), **options)


@pytest.mark.parametrize("budget", [64, 10**12])
def test_a_list_has_room_for_what_can_be_there(budget):
    """Whatever the budget: sinks, chosen and newest tokens are as many as the cache."""
    stream = drive.make_stream((3, 27), 4)
    spec = drive.make_spec(stream)
    run = drive.run(token_select(budget=budget), spec, stream)
    drive.assert_matches(run, stream, oracles.full)
    assert run.diagnostics.attended.shape[-1] == spec.capacity
    assert run.diagnostics.exact.all()


def test_chunks_change_nothing():
    stream = drive.make_stream((3, 27, 26), 4)
    check(stream, chunks=[(1, 1, 9), (0, 25, 8), (2, 1, 9)], **SMALL)


def alike(stream, first):
    """The stream whose queries from `first` on are its own, hardly turned."""
    rng = np.random.default_rng(7)
    for t in range(first, stream.q.shape[2]):
        noise = 0.02 * rng.standard_normal(stream.q[:, :, 0].shape)
        stream.q[:, :, t] = stream.q[:, :, first] + noise
    return stream


def test_a_query_like_the_last_one_takes_its_tokens():
    """The list stays, although the best key of all has left the window since."""
    stream = alike(drive.make_stream((30,), 9, heads=(2, 2)), 30)
    stream.k[0, :, 31] = 3 * stream.q[0, :, 30]  # out of the window from step 4 on
    kept = check(stream, threshold=0.9, **SMALL)
    chosen = kept.diagnostics.attended[:, 0, 0, 2:5]
    assert (chosen == chosen[0]).all()
    assert kept.diagnostics.refreshed[:, 0].tolist() == [True] + [False] * 8
    anew = check(stream, **SMALL)
    assert anew.diagnostics.refreshed.all()
    assert (anew.diagnostics.attended[4:, 0, 0, 2:5] == 31).any(-1).all()


def test_the_first_choice_waits_until_the_budget_is_full():
    """However alike the queries: until then everything is attended to."""
    stream = alike(drive.make_stream((4,), 12), 4)
    run = check(stream, threshold=0.5, **SMALL)
    # Everything for four steps; then one choice.
    assert run.diagnostics.exact[:, 0].all(-1).tolist() == [True] * 4 + [False] * 8
    assert run.diagnostics.refreshed[:, 0].tolist() == [True] * 5 + [False] * 7


def test_a_step_that_keeps_its_list_reads_no_other_key():
    """Everything else poisoned between two steps: not a bit of the output moves."""
    method = token_select(threshold=0.9, **SMALL)
    stream = alike(drive.make_stream((30,), 2, heads=(4, 2)), 30)
    spec = drive.make_spec(stream)
    state, _ = drive.prefill(method, spec, stream)
    step = jax.jit(lambda s, x: drive.step(method, s, x))
    inputs = [np.asarray(x) for x in drive.step_inputs(stream)]
    first, second = ([x[i] for x in inputs] for i in (0, 1))
    state, _ = step(state, first)
    _, (out, diagnostics) = step(state, second)
    assert not np.asarray(diagnostics.refreshed).any()
    slots = np.arange(spec.capacity)
    listed = np.isin(slots, np.asarray(diagnostics.attended)[0, 0])
    listed |= slots >= 31  # what the second step writes

    def poisoned(x):
        spoiled = np.where(listed[:, None], np.asarray(x), np.float32(np.nan))
        return jax.device_put(spoiled)

    state = state._replace(k=poisoned(state.k), v=poisoned(state.v))
    _, (same, _) = step(state, second)
    np.testing.assert_allclose(same, out, rtol=1e-6)


def test_positions_stay_within_the_budget():
    """Rotated places are numbers below it, at any length of the context."""
    seen = []

    def rope(x, positions, length=None):
        del length
        jax.debug.callback(lambda p: seen.append(int(p.max())), positions)
        return x

    stream = drive.make_stream((40,), 3)
    method = token_select(**SMALL)
    spec = drive.make_spec(stream, rope=rope)
    state, _ = drive.prefill(method, spec, stream)
    jax.effects_barrier()
    seen.clear()
    for i in range(3):
        state, _ = drive.step(method, state, [x[i] for x in drive.step_inputs(stream)])
    jax.effects_barrier()
    assert max(seen) == SMALL["budget"] - 1


def test_defaults_are_the_papers_shares():
    stream = drive.make_stream((300,), 1)
    method = token_select(budget=2688 // 16)
    run = drive.run(method, drive.make_spec(stream), stream)
    attended = run.diagnostics.attended[0, 0, 0]
    assert attended[: 128 // 16].tolist() == list(range(8))
    assert attended[-512 // 16 :].tolist() == list(range(301 - 32, 301))


def test_half_precision():
    stream = drive.make_stream((5, 30), 8, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16", rope=lambda x, *_: x)
    run = drive.run(token_select(threshold=0.9, **SMALL), spec, stream)
    drive.assert_consistent(run, stream, "bfloat16", is_rotated=False)


def test_the_cosine_of_nothing_is_nothing():
    x = jnp.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    y = jnp.array([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(selection.cosine(x, y), [0.96, -1.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, r"num_sinks=0 >= 0 and window=1 .* below budget=1; raise"),
        ({"budget": 8, "window": 8}, r"window=8 >= 1 must together be below budget=8"),
        ({"budget": 8, "window": 0}, r"window=0 >= 1 must together be below budget=8"),
        ({"num_sinks": -1}, r"num_sinks=-1 >= 0 and window=195"),
        ({"threshold": 0.0}, r"threshold=0.0 must be in \(0, 1\], or None"),
        ({"threshold": 1.5}, r"threshold=1.5 must be in \(0, 1\], or None"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        token_select(**options)
