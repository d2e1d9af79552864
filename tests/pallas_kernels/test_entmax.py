"""Entmax against sorting and halving in float64; its gradients against differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.entmax import (
    entmax,
    entmax_attention,
    entmax_threshold,
    reference,
    solve,
    weights,
)

ALPHAS = [1.25, 4 / 3, 1.5, 1.7, 2.0]
STEEP = [2.5, 3.0]  # the slope is infinite at every score: solved by halving


def _rows(seed=0, rows=6, length=50, spread=(0.1, 1.0, 3.0, 10.0, 100.0, 1e4)):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((rows, length)) * np.array(spread)[:rows, None]
    return scores.astype(np.float32)


@functools.cache
def _jitted(alpha):
    return jax.jit(functools.partial(entmax, alpha=alpha))


def _assert_probabilities(p, atol=1e-6):
    np.testing.assert_allclose(p.sum(-1), 1, atol=atol)
    assert (p >= 0).all()


# --- values


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_equals_halving_in_float64(alpha, length):
    scores = _rows(length=length)
    p = np.asarray(_jitted(alpha)(scores))
    expected = np.array([oracles.entmax(row, alpha) for row in scores])
    np.testing.assert_allclose(p, expected, atol=1e-6)
    _assert_probabilities(p)
    assert length < 300 or (p == 0).mean() > 0.3  # zeros, not small numbers


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("length", [1, 3, 64, 4096])
def test_equals_the_sort(alpha, length):
    scores = _rows(1, length=length)
    expected = np.array([oracles.entmax_sorted(row, alpha) for row in scores])
    np.testing.assert_allclose(_jitted(alpha)(scores), expected, atol=1e-6)


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_a_million_scores(spread):
    """The sum of so many weights must not lose its digits."""
    scores = _rows(2, rows=1, length=1_000_000, spread=[spread])
    expected = oracles.entmax_sorted(scores[0], 1.5)
    p = np.asarray(_jitted(1.5)(scores))[0]
    np.testing.assert_allclose(p, expected, atol=1e-6)
    assert abs(p.sum(dtype=np.float64) - 1) < 1e-5


# More than a line of scores, more than a tile.
@pytest.mark.parametrize(
    ("alpha", "length"), [(1.25, 129), (3.0, 129), (1.5, 16_500), (1.7, 16_500)]
)
def test_the_kernel_finds_the_threshold(alpha, length):
    scores = _rows(length=length).reshape(2, 3, length)
    scores[1, 0, 1:] = -np.inf
    found = jax.jit(
        functools.partial(
            solve, alpha=alpha, implementation="mosaic_tpu", interpret=True
        )
    )(scores)
    p, _ = weights(jnp.asarray(scores), found, alpha=alpha)
    expected = [[oracles.entmax(row, alpha) for row in block] for block in scores]
    # As of the reference: the slope is infinite at every score where alpha > 2.
    np.testing.assert_allclose(p, expected, atol=1e-6 if alpha <= 2 else 1e-3)
    np.testing.assert_array_equal(found.top[..., 0], scores.max(-1))


@pytest.mark.parametrize("alpha", [*ALPHAS, *STEEP])
def test_float64_is_exact_to_float64(alpha):
    with jax.enable_x64(True):
        scores = _rows(2).astype(np.float64)
        p = np.asarray(entmax(jnp.asarray(scores), alpha=alpha))
    assert p.dtype == np.float64
    expected = np.array([oracles.entmax(row, alpha) for row in scores])
    # A probability x ** (1 / (alpha - 1)) turns an error of 1e-16 in x to 1e-8 at 3.
    np.testing.assert_allclose(p, expected, atol=1e-12 if alpha <= 2 else 1e-7)


@pytest.mark.parametrize("alpha", STEEP)
def test_steep_alphas_in_float32(alpha):
    scores = _rows(3, rows=3)
    p = np.asarray(_jitted(alpha)(scores))
    expected = np.array([oracles.entmax(row, alpha) for row in scores])
    np.testing.assert_allclose(p, expected, atol=1e-3)
    _assert_probabilities(p)


def test_tends_to_softmax():
    scores = _rows(4, rows=3)
    with jax.enable_x64(True):
        p = entmax(jnp.asarray(scores, jnp.float64), alpha=1.0005)
    np.testing.assert_allclose(p, jax.nn.softmax(scores, -1), atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-3.0, 3.0, width=32), min_size=8, max_size=8),
    st.sampled_from([1.25, 1.5, 2.0]),
    st.floats(-100.0, 100.0, width=32),
)
def test_any_scores(scores, alpha, shift):
    """Nearly equal scores, ties, and a constant added to all."""
    scores = np.array([scores], np.float32)
    p = np.asarray(_jitted(alpha)(scores))
    np.testing.assert_allclose(p[0], oracles.entmax(scores[0], alpha), atol=1e-6)
    _assert_probabilities(p)
    order = np.argsort(scores[0], kind="stable")
    assert (np.diff(p[0, order]) >= 0).all()
    shifted = scores + np.float32(shift)  # rounds: compare with what is left of them
    expected = oracles.entmax(shifted[0], alpha)
    np.testing.assert_allclose(_jitted(alpha)(shifted)[0], expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])  # scaling by these is exact
def test_newton_arrives_on_rows_made_to_delay_it(alpha):
    """Supports that shrink element by element, at every scale."""
    rows = [
        -np.geomspace(1e-7, 1, 4096),
        -np.linspace(0, 1, 4096) / (alpha - 1),
        np.concatenate([[0], np.full(63, -1 + 1e-3), np.full(4032, -2)]) / (alpha - 1),
        np.concatenate([np.zeros(1), -(1 - 2.0 ** -np.arange(4095)) / (alpha - 1)]),
        -(np.arange(4096) ** 0.5),
    ]
    scores = np.array(rows, np.float32)
    found = solve(jnp.asarray(scores), alpha=alpha)
    p, _ = weights(jnp.asarray(scores), found, alpha=alpha)
    # A float32 near -1 is known to 3e-8, and dozens of such errors are added up.
    _assert_probabilities(np.asarray(p, np.float64), atol=6e-6)
    expected = np.array([oracles.entmax(row, alpha) for row in scores])
    np.testing.assert_allclose(_jitted(alpha)(scores), expected, atol=2e-6)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, 3.0])
def test_extremes(alpha):
    big, inf = 3e38, np.inf
    cases = {
        (0.0, 0.0, 0.0, 0.0): [0.25] * 4,
        (big, big, -big, 0.0): [0.5, 0.5, 0, 0],
        (-big, -big, -big, -big): [0.25] * 4,
        (-inf, 2.0, -inf, -inf): [0, 1, 0, 0],
        (-inf, -inf, -inf, -inf): [0] * 4,
        (inf, 1.0, inf, -inf): [0.5, 0, 0.5, 0],
        (10.0, 0.0, 0.0, 0.0): [1, 0, 0, 0],  # a gap above 1 / (alpha - 1)
    }
    scores = jnp.array(list(cases), jnp.float32)
    p = entmax(scores, alpha=alpha)
    np.testing.assert_allclose(p, list(cases.values()), atol=1e-6)
    grad = jax.grad(lambda s: (entmax(s, alpha=alpha) * jnp.arange(4.0)).sum())
    assert np.isfinite(grad(scores)).all()
    poisoned = scores.at[0, 1].set(jnp.nan)
    p = np.asarray(entmax(poisoned, alpha=alpha))
    assert np.isnan(p[0]).all()
    assert np.isfinite(p[1:]).all()


@pytest.mark.parametrize("alpha", [1.5, 4 / 3])
def test_axis_mask_and_dtype(alpha):
    scores = _rows(5, rows=4, length=6)
    mask = np.tri(4, 6, 1, dtype=bool)
    mask[2] = False
    p = np.asarray(entmax(jnp.asarray(scores), alpha=alpha, where=jnp.asarray(mask)))
    for row, kept, actual in zip(scores, mask, p, strict=True):
        assert (actual[~kept] == 0).all()
        if kept.any():
            expected = oracles.entmax(row[kept], alpha)
            np.testing.assert_allclose(actual[kept], expected, atol=1e-6)
    columns = entmax(
        jnp.asarray(scores.T), alpha=alpha, where=jnp.asarray(mask.T), axis=0
    )
    np.testing.assert_array_equal(columns.T, p)
    small = jnp.asarray(scores[:2], jnp.bfloat16)
    low = entmax(small, alpha=alpha)
    assert low.dtype == jnp.bfloat16
    wide = entmax(small.astype(jnp.float32), alpha=alpha)
    np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
def test_the_threshold_separates_the_support(alpha):
    scores = _rows(6, rows=4)
    tau = np.asarray(entmax_threshold(jnp.asarray(scores), alpha=alpha))
    z = (alpha - 1) * scores.astype(np.float64)
    excess = np.maximum(z - tau[:, None], 0)
    p = np.asarray(_jitted(alpha)(scores))
    np.testing.assert_allclose(
        excess ** (1 / (alpha - 1)), p, atol=1e-5 if alpha <= 2 else 2e-3
    )
    length, top = scores.shape[1], z.max(-1)
    assert (top - 1 <= tau + 1e-6).all()
    assert (tau <= top - length ** (1 - alpha) + 1e-6).all()
    nothing = jnp.zeros_like(scores, bool)
    assert (entmax_threshold(jnp.asarray(scores), alpha=alpha, where=nothing) > 9).all()


def test_uniform_scores_have_a_closed_form():
    for alpha in (1.25, 1.5, 2.0, 3.0):
        tau = entmax_threshold(jnp.full((1, 64), 3.0), alpha=alpha)
        expected = 3 * (alpha - 1) - 64 ** (1 - alpha)
        np.testing.assert_allclose(tau, expected, atol=1e-6)


def test_rows_do_not_see_each_other():
    """A row that needs more steps leaves the others as they are, bit by bit."""
    slow = np.tile(-np.linspace(0, 2, 50, dtype=np.float32), (5, 1))
    for row in _rows(7, rows=40, spread=[1.0] * 40):
        mixed = slow.copy()
        mixed[0] = row
        alone = _jitted(1.25)(np.tile(row, (5, 1)))[0]
        np.testing.assert_array_equal(_jitted(1.25)(mixed)[0], alone)


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_a_row_spread_over_devices_has_one_threshold(alpha):
    """Shards of equal weights, of none of the support, and of nothing but masked."""
    rng = np.random.default_rng(8)
    scores = rng.standard_normal((4, 64)).astype(np.float32)
    scores[1, :32] -= 10
    scores[2, 32:] = -np.inf
    scores[3] = -np.inf
    spec = jax.sharding.PartitionSpec(None, "seq")
    mesh = jax.make_mesh((2,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def shares(scores):
        threshold = solve(scores, alpha=alpha, axis_name="seq")
        return weights(scores, threshold, alpha=alpha)[0]

    found = np.asarray(jax.jit(shares)(scores))
    for row, expected in zip(found[:3], scores[:3], strict=True):
        kept = expected > -np.inf
        np.testing.assert_allclose(
            row[kept], oracles.entmax(expected[kept], alpha), atol=2e-6
        )
        assert not row[~kept].any()
    assert not found[3].any()


def test_a_step_past_the_root_by_rounding_is_not_taken_back():
    """4,095 scores a hair above the least tau: going back there adds 0.4 of mass."""
    scores = jnp.full((1, 4096), -1 + 1e-4).at[0, 0].set(0.0)
    p, _ = weights(scores, solve(scores, alpha=2.0), alpha=2.0)
    _assert_probabilities(np.asarray(p, np.float64), atol=3e-4)


# --- gradients


def _differences(function, x, tangent, step=1e-6):
    return (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)


def _gradients(function, x, tangent, weight):
    return (
        jax.jvp(function, (x,), (tangent,))[1],
        jax.vjp(function, x)[1](weight)[0],
    )


@pytest.mark.parametrize("alpha", [*ALPHAS, 2.5])
def test_gradients_equal_differences_in_float64(alpha):
    rng = np.random.default_rng(8)
    with jax.enable_x64(True):
        scores, tangent = rng.standard_normal((2, 3, 12))
        mask = jax.device_put(rng.random((3, 12)) < 0.8)
        for function in (
            functools.partial(entmax, alpha=alpha, where=mask),
            functools.partial(entmax_threshold, alpha=alpha, where=mask),
            functools.partial(entmax, alpha=alpha, where=mask, axis=0),
        ):
            function = jax.jit(function)
            expected = _differences(
                lambda x, of=function: np.asarray(of(x)), scores, tangent
            )
            assert np.abs(expected).max() > 0.03
            weight = rng.standard_normal(expected.shape)
            gradients = jax.jit(functools.partial(_gradients, function))
            forward, backward = gradients(scores, tangent, weight)
            np.testing.assert_allclose(forward, expected, atol=2e-6)
            np.testing.assert_allclose(
                (np.asarray(backward) * tangent).sum(),
                (weight * expected).sum(),
                atol=2e-5,
            )


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_jacobian_has_the_published_form(alpha):
    """Sparsemax: diag(1_S) - 1_S 1_S' / |S|. 1.5: diag(s) - s s' / sum(s), s = p^0.5.

    Martins and Astudillo 2016, Prop. 2; Peters, Niculae and Martins 2019, Prop. 2.
    """
    for row in _rows(9, rows=4, length=9, spread=(0.3, 1, 2, 50)):
        p = oracles.entmax_sorted(row, alpha)
        s = (p > 0).astype(float) if alpha == 2 else np.sqrt(p)
        expected = np.diag(s) - np.outer(s, s) / s.sum()
        jacobian = jax.jacobian(functools.partial(entmax, alpha=alpha))
        np.testing.assert_allclose(jacobian(jnp.asarray(row)), expected, atol=2e-6)


# --- attention


@pytest.mark.parametrize("alpha", [1.5, 1.25])
@pytest.mark.parametrize("held", ["slots", "positions"])
@pytest.mark.parametrize("at_once", [2**24, 60])
def test_attention_equals_loops(alpha, held, at_once, monkeypatch):
    """Grouped heads, empty slots, a row that sees nothing; queries in parts."""
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", at_once)
    rng = np.random.default_rng(10)
    q = rng.standard_normal((2, 4, 3, 6)).astype(np.float32) * 3
    k, v = rng.standard_normal((2, 2, 2, 7, 6)).astype(np.float32)
    query_positions = np.array([[-1, 0, 6], [2, 3, 9]])
    positions = np.tile(np.arange(7), (2, 2, 1))
    if held == "positions":
        positions = rng.permuted(np.array([[[-1, 5, 2, 0, 3, -1, 9]] * 2] * 2), axis=2)
    out, value = entmax_attention(
        *(jnp.asarray(x) for x in (q, k, v)),
        jnp.asarray(query_positions, jnp.int32),
        None if held == "slots" else jnp.asarray(positions, jnp.int32),
        alpha=alpha,
        sm_scale=0.4,
    )
    for b, h, t in np.ndindex(2, 4, 3):
        here, head = query_positions[b, t], positions[b, h // 2]
        kept = [s for s, p in enumerate(head) if 0 <= p <= here]
        keys, values = k[b, h // 2, kept], v[b, h // 2, kept]
        expected = oracles.entmax_attention(q[b, h, t], keys, values, alpha, 0.4)
        np.testing.assert_allclose(out[b, h, t], expected[0], atol=3e-6)
        np.testing.assert_allclose(value[b, h, t], expected[1], atol=1e-5)


def test_the_value_tends_to_log_sum_exp():
    rng = np.random.default_rng(11)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 1, 9, 4)), jnp.float32),) * 3
    positions = jnp.full((1, 9), 8)
    _, value = entmax_attention(q, k, v, positions, alpha=1.01, sm_scale=1.0)
    lse = jax.nn.logsumexp(jnp.einsum("bhtd,bhsd->bhts", q, k), -1)
    np.testing.assert_allclose(value, lse, atol=0.05)


@pytest.mark.parametrize("alpha", [1.0, 0.5, np.inf, np.nan])
def test_alpha_must_be_above_one(alpha):
    with pytest.raises(ValueError, match="must be finite and above 1"):
        entmax(jnp.zeros(3), alpha=alpha)
    with pytest.raises(ValueError, match="must be finite and above 1"):
        entmax_threshold(jnp.zeros(3), alpha=alpha)
