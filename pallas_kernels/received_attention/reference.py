"""The definition of `received_attention`, and its path on every device (XLA)."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.reference import decode_logits
from pallas_kernels.page_scores.reference import REDUCE

BLOCK = 1024  # keys at once


def received_attention(
    q,
    k,
    lse,
    query_positions,
    key_positions,
    row_weights,
    *,
    sm_scale,
    group_reduce,
):
    """See :func:`pallas_kernels.received_attention.received_attention`."""
    batch, num_q_heads, rows, _ = q.shape
    heads, slots = k.shape[1:3]
    safe = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    if row_weights is None:
        row_weights = jnp.ones((batch, rows), jnp.float32)

    def block(start, size):
        keys = lax.dynamic_slice_in_dim(k, start, size, 2)
        if key_positions is None:
            held = (start + jnp.arange(size, dtype=jnp.int32))[None, None, :]
        else:
            held = lax.dynamic_slice_in_dim(key_positions, start, size, 2)
        logits = decode_logits(q, keys, query_positions, held, sm_scale=sm_scale)
        weights = jnp.exp(logits - safe)
        grouped = weights.reshape(batch, heads, num_q_heads // heads, rows, size)
        reduced = REDUCE[group_reduce](grouped, axis=2, keepdims=True)
        summed = jnp.einsum("bkgts,bt->bkgs", reduced, row_weights.astype(jnp.float32))
        return summed.reshape(batch, -1, size)

    size = min(BLOCK, slots)
    whole = slots // size
    starts = jnp.arange(whole, dtype=jnp.int32) * size
    found = lax.map(lambda start: block(start, size), starts)  # (blocks, B, H, size)
    found = jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], whole * size)
    if slots % size:
        rest = block(whole * size, slots % size)
        found = jnp.concatenate([found, rest], axis=-1)
    return found
