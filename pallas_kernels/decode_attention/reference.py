"""The definition of `decode_attention`, and its path on every device (XLA).

A few rows: one pass over the whole cache, whose only temporary is the logits. Many rows
(a chunk of a prompt): blocks of keys with an online softmax, as many as the longest row
needs, so that no temporary grows with the cache.
"""

import jax.numpy as jnp
from jax import lax

DENSE_ROWS = 64  # up to this many rows a KV head, the logits stay smaller than a block
BLOCK = 1024  # keys per block: 1024 x 128 x f32 = 512 KB a head, inside an L2 cache


def decode_attention(q, k, v, query_positions, key_positions, *, sm_scale, window=None):
    """See :func:`pallas_kernels.decode_attention.decode_attention`."""
    batch, num_q_heads, rows, head_dim = q.shape
    grouped, row_positions = _group(q, k, query_positions)
    attend = _dense
    if grouped.shape[2] > DENSE_ROWS and k.shape[2] > BLOCK:
        attend = _blocked
    out, lse = attend(grouped, k, v, row_positions, key_positions, sm_scale, window)
    shape = (batch, num_q_heads, rows)
    return out.reshape(*shape, head_dim), lse.reshape(shape)


def decode_logits(q, k, query_positions, key_positions, *, sm_scale):
    """See :func:`pallas_kernels.decode_attention.decode_logits`."""
    grouped, row_positions = _group(q, k, query_positions)
    held = _held(k, key_positions)
    logits = _logits(grouped, k, row_positions, held, sm_scale, None)
    return logits.reshape(*q.shape[:3], k.shape[2])


def _group(q, k, query_positions):
    # The G query heads of a KV head and their T rows share its keys: one matmul.
    batch, num_q_heads, rows, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_q_heads // num_kv_heads
    grouped = q.reshape(batch, num_kv_heads, group * rows, head_dim)
    return grouped, jnp.tile(query_positions, (1, group))[:, None, :, None]


def _held(k, key_positions):
    if key_positions is None:
        return jnp.arange(k.shape[2], dtype=jnp.int32)[None, None, :]
    return key_positions


def _logits(grouped, keys, row_positions, held, sm_scale, window):
    logits = jnp.einsum(
        "bkrd,bksd->bkrs", grouped, keys, preferred_element_type=jnp.float32
    )
    held = held[:, :, None, :]
    visible = (held >= 0) & (held <= row_positions)
    if window is not None:
        visible &= held > row_positions - window
    return jnp.where(visible, logits * sm_scale, -jnp.inf)


def _weighted_values(weights, values):
    # Values of unseen slots must be finite: their weight is exactly 0.
    return jnp.einsum(
        "bkrs,bksd->bkrd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )


def _softmax_parts(logits, m):
    # A row that sees no key has m = -inf; -inf - -inf would be NaN.
    return jnp.exp(logits - jnp.where(m == -jnp.inf, 0.0, m)[..., None])


def _finish(m, l, acc):
    positive = jnp.where(l == 0, 1.0, l)
    lse = jnp.where(l == 0, -jnp.inf, m + jnp.log(positive))
    return acc / positive[..., None], lse


def _dense(grouped, k, v, row_positions, key_positions, sm_scale, window):
    held = _held(k, key_positions)
    logits = _logits(grouped, k, row_positions, held, sm_scale, window)
    m = logits.max(-1)
    weights = _softmax_parts(logits, m)
    return _finish(m, weights.sum(-1), _weighted_values(weights, v))


def _blocked(grouped, k, v, row_positions, key_positions, sm_scale, window):
    slots = k.shape[2]

    def block(start, size, carry):
        m, l, acc = carry
        keys, values = (lax.dynamic_slice_in_dim(x, start, size, 2) for x in (k, v))
        if key_positions is None:
            held = (start + jnp.arange(size, dtype=jnp.int32))[None, None, :]
        else:
            held = lax.dynamic_slice_in_dim(key_positions, start, size, 2)
        logits = _logits(grouped, keys, row_positions, held, sm_scale, window)
        m_new = jnp.maximum(m, logits.max(-1))
        weights = _softmax_parts(logits, m_new)
        decay = jnp.exp(m - jnp.where(m_new == -jnp.inf, 0.0, m_new))
        l = l * decay + weights.sum(-1)
        acc = acc * decay[..., None] + _weighted_values(weights, values)
        return m_new, l, acc

    shape = grouped.shape[:3]
    carry = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(grouped.shape, jnp.float32),
    )
    whole = slots // BLOCK
    needed = whole
    if key_positions is None:
        needed = jnp.clip(row_positions.max() // BLOCK + 1, 0, whole)
    carry = lax.fori_loop(0, needed, lambda i, c: block(i * BLOCK, BLOCK, c), carry)
    if slots % BLOCK:
        carry = block(whole * BLOCK, slots % BLOCK, carry)
    return _finish(*carry)
