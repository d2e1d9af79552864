"""Attention of a few rows against float64 loops: positions, rings, windows, blocks."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels.decode_attention import decode_attention, decode_logits, reference


def _loops(q, k, v, query_positions, held, sm_scale, window=None):
    batch, num_q_heads, rows, _ = q.shape
    group = num_q_heads // k.shape[1]
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)
    for b, h, t in np.ndindex(batch, num_q_heads, rows):
        head = held[b % held.shape[0], (h // group) % held.shape[1]]
        here = query_positions[b, t]
        first = 0 if window is None else here - window + 1
        kept = [s for s, p in enumerate(head) if max(first, 0) <= p <= here]
        keys, values = k[b, h // group, kept], v[b, h // group, kept]
        out[b, h, t], lse[b, h, t], _ = oracles.softmax_attention(
            q[b, h, t], keys, values, sm_scale
        )
    return out, lse


def _problem(batch, heads, rows, slots, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, heads[0], rows, head_dim),
        (batch, heads[1], slots, head_dim),
        (batch, heads[1], slots, head_dim),
    ]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _check(q, k, v, query_positions, held, key_positions, sm_scale=0.3, window=None):
    out, lse = decode_attention(
        *(jnp.asarray(x) for x in (q, k, v)),
        jnp.asarray(query_positions, jnp.int32),
        None if key_positions is None else jnp.asarray(key_positions, jnp.int32),
        sm_scale=sm_scale,
        window=window,
    )
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    expected, expected_lse = _loops(q, k, v, query_positions, held, sm_scale, window)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)], ids=["G1", "G4", "G3"])
@pytest.mark.parametrize("window", [None, 4])
def test_contiguous_slots(heads, window):
    """First and last position; one row sees no key and gives (0, -inf)."""
    q, k, v = _problem(3, heads, 2, 9, 6)
    query_positions = np.array([[0, 1], [7, 8], [-1, 3]])
    _check(q, k, v, query_positions, np.arange(9)[None, None], None, window=window)


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (1, 1)])
def test_positions_of_a_ring_in_any_order(shape):
    q, k, v = _problem(2, (4, 2), 1, 7, 4)
    held = np.stack([np.random.default_rng(i).permutation(7) + 3 for i in range(4)])
    held = held.reshape(2, 2, 7)[: shape[0], : shape[1]]
    held = np.where(held > 7, -1, held)
    _check(q, k, v, np.array([[6], [9]]), held, held)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_blocks_agree_with_one_pass(monkeypatch, blocked, given):
    """Small blocks: several whole ones, a rest, and rows that end in each of them."""
    monkeypatch.setattr(reference, "BLOCK", 4 if blocked else 64)
    monkeypatch.setattr(reference, "DENSE_ROWS", 2)
    q, k, v = _problem(2, (4, 2), 5, 14, 4)
    query_positions = np.array([[-1, 0, 3, 4, 13], [2, 7, 8, 11, 12]])
    held = np.arange(14)[None, None]
    _check(q, k, v, query_positions, held, held if given else None)
    _check(q, k, v, query_positions, held, held if given else None, window=3)


def test_half_precision_accumulates_in_single():
    """Two thousand equal weights: a bfloat16 sum would stop at 256."""
    ones = jnp.ones((1, 1, 2000, 4), jnp.bfloat16)
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    out, lse = decode_attention(
        q, ones, ones, jnp.full((1, 1), 1999, jnp.int32), sm_scale=1.0
    )
    np.testing.assert_allclose(out, 1.0, rtol=1e-3)
    np.testing.assert_allclose(lse, np.log(2000.0), rtol=1e-6)


def test_logits_are_scaled_and_masked():
    q, k, _ = _problem(2, (4, 2), 2, 5, 4)
    query_positions = np.array([[0, 4], [2, -1]])
    logits = decode_logits(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(query_positions), sm_scale=0.7
    )
    for b, h, t, s in np.ndindex(2, 4, 2, 5):
        expected = -np.inf
        if s <= query_positions[b, t]:
            expected = 0.7 * float(np.dot(q[b, h, t], k[b, h // 2, s]))
        np.testing.assert_allclose(logits[b, h, t, s], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 1, 4), (1, 2, 5, 4), (1, 2, 5, 4)), r"query heads 3.*KV heads 2"),
        (((1, 2, 1, 4), (1, 2, 5, 4), (1, 2, 6, 4)), r"shapes disagree.*5.*6"),
        (((1, 2, 1, 4), (1, 2, 5, 8), (1, 2, 5, 8)), r"shapes disagree"),
    ],
)
def test_errors_name_the_shapes(shapes, message):
    q, k, v = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, v, jnp.zeros((1, 1), jnp.int32), sm_scale=1.0)
