"""What keys received of a prompt's attention, against float64 sums over its rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.received_attention import (
    mosaic_tpu,
    received_attention,
    reference,
    tuning,
)

SCALE = 0.5


def _problem(batch, heads, rows, slots, head_dim, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (heads[0], rows), (heads[1], slots), (heads[1], slots)
    arrays = [rng.standard_normal((batch, *shape, head_dim)) for shape in shapes]
    return [jnp.asarray(x, dtype) for x in arrays]


def _expected(q, k, positions, held, row_weights, how):
    """`(B, H, S)`; every row's weights over the keys it sees, then their sum."""
    q, k = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k))
    batch, num_q_heads, rows, _ = q.shape
    group = num_q_heads // k.shape[1]
    weights = np.zeros((batch, num_q_heads, rows, k.shape[2]))
    for b, h, t in np.ndindex(batch, num_q_heads, rows):
        own = held[b % len(held), (h // group) % held.shape[1]]
        seen = (own >= 0) & (own <= positions[b, t])
        if seen.any():
            mass = np.exp(SCALE * k[b, h // group] @ q[b, h, t]) * seen
            weights[b, h, t] = mass / mass.sum()
    grouped = weights.reshape(batch, -1, group, rows, k.shape[2])
    if how != "none":
        grouped = getattr(grouped, how)(axis=2, keepdims=True)
    summed = np.einsum("bkgts,bt->bkgs", grouped, row_weights)
    return summed.reshape(batch, -1, k.shape[2])


def _lse(q, k, positions, held=None):
    return decode_attention(q, k, k, positions, held, sm_scale=SCALE)[1]


@pytest.mark.parametrize("how", ["none", "mean", "max"])
@pytest.mark.parametrize("in_order", [True, False])
def test_sum_of_the_exact_weights(monkeypatch, in_order, how):
    """Three blocks, of which rows need two and three, and a rest; two tiles of rows.

    Slots in any order, an empty one, a row that is none.
    """
    monkeypatch.setattr(reference, "BLOCK", 4)
    monkeypatch.setattr(reference, "TILE", 2)
    q, k, _ = _problem(2, (4, 2), 3, 14, 3)
    positions = np.array([[-1, 4, 7], [0, 9, 3]], np.int32)
    row_weights = np.array([[1.0, 0.5, 0.25], [0.0, 1.0, 2.0]])
    held = np.arange(14, dtype=np.int32)[None, None]
    if not in_order:
        held = np.random.default_rng(1).permutation(14).astype(np.int32) - 1
        held = held[None, None]
    given = None if in_order else jnp.asarray(held)
    at = jnp.asarray(positions)
    found = received_attention(
        *(q, k, _lse(q, k, at, given), at, given),
        jnp.asarray(row_weights, jnp.float32),
        sm_scale=SCALE,
        group_reduce=how,
    )
    expected = _expected(q, k, positions, held, row_weights, how)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [("none", "float32"), ("mean", "bfloat16"), ("max", "float32")],
    ids="{}".format,
)
def test_kernel_equals_loops(monkeypatch, how, dtype):
    """Blocks of rows that end before, in and after blocks of keys; NaN behind all."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(16, 128))
    q, k, _ = _problem(2, (4, 2), 150, 40, 128, dtype)
    positions = np.stack([np.arange(150) // 6 - 1, np.arange(150)[::-1] // 5])
    positions = np.minimum(positions, 33).astype(np.int32)
    row_weights = np.random.default_rng(2).random((2, 150))
    at = jnp.asarray(positions)
    run = functools.partial(
        received_attention,
        sm_scale=SCALE,
        group_reduce=how,
        implementation="mosaic_tpu",
        interpret=True,
    )
    poisoned = k.at[:, :, 34:].set(jnp.nan)
    lse = _lse(q, k, at)
    weights = jnp.asarray(row_weights, jnp.float32)
    found = jax.jit(run)(q, poisoned, lse, at, None, weights)
    held = np.arange(40)[None, None]
    expected = _expected(q, k, positions, held, row_weights, how)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    assert not np.asarray(found)[:, :, 34:].any()


def test_kernel_without_weights_counts_every_row(monkeypatch):
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(16, 128))
    q, k, _ = _problem(1, (2, 1), 5, 24, 128)
    at = jnp.array([[3, 8, -1, 23, 20]], jnp.int32)
    run = functools.partial(received_attention, q, k, _lse(q, k, at), at)
    found = run(sm_scale=SCALE, implementation="mosaic_tpu", interpret=True)
    np.testing.assert_allclose(found.sum(-1), 4.0, rtol=1e-5)  # rows that see a key


def test_what_the_kernel_cannot():
    q, k, _ = _problem(1, (2, 1), 5, 24, 128)
    at = jnp.zeros((1, 5), jnp.int32)
    lse = jnp.zeros((1, 2, 5))
    for arguments, reason in (
        ((q, k, lse, at, jnp.zeros((1, 1, 24), jnp.int32)), "positions of their own"),
        ((q[..., :64], k[..., :64], lse, at), "D=64 must be a multiple of 128"),
        ((q.astype(jnp.float16), k, lse, at), "dtypes float16, float32"),
        ((jnp.repeat(q, 9, 1), k, jnp.zeros((1, 18, 5)), at), "18 query heads"),
    ):
        run = functools.partial(received_attention, sm_scale=1.0)
        run = functools.partial(jax.eval_shape, run)
        if arguments[0].dtype == k.dtype:
            run(*arguments)
        with pytest.raises(NotImplementedError, match=reason):
            received_attention(
                *arguments, sm_scale=1.0, implementation="mosaic_tpu", interpret=True
            )
    assert mosaic_tpu.MAX_GROUP < 18


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_shapes():
    q, k, _ = _problem(1, (2, 1), 5, 24, 4)
    at, lse = jnp.zeros((1, 5), jnp.int32), jnp.zeros((1, 2, 5))
    run = functools.partial(received_attention, sm_scale=1.0)
    with pytest.raises(ValueError, match=r"shapes disagree: q .*5, 4.* k .*24, 3"):
        run(q, k[..., :3], lse, at)
    with pytest.raises(ValueError, match=r"lse \(1, 2, 4\) must have a number for"):
        run(q, k, lse[..., :4], at)
    with pytest.raises(ValueError, match="group_reduce='sum' must be one of 'none'"):
        run(q, k, lse, at, group_reduce="sum")
