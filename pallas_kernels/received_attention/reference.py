"""The definition of `received_attention`, and its path on every device (XLA).

Tiles of rows, each over blocks of keys, as many as the tile's last row needs: no
temporary grows with the cache, and half of a causal chunk is not computed.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.reference import BLOCK, TILE, decode_logits
from pallas_kernels.page_scores.reference import REDUCE


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
    group = num_q_heads // heads
    if row_weights is None:
        row_weights = jnp.ones((batch, rows), jnp.float32)
    row_weights = row_weights.astype(jnp.float32)
    tile, block = min(TILE, rows), min(BLOCK, slots)
    tiles, blocks = -(-rows // tile), slots // block
    # A padded row sees no key.
    ends = (0, tiles * tile - rows)
    q = jnp.pad(q, ((0, 0), (0, 0), ends, (0, 0)))
    lse = jnp.pad(lse, ((0, 0), (0, 0), ends), constant_values=-jnp.inf)
    query_positions = jnp.pad(query_positions, ((0, 0), ends), constant_values=-1)
    row_weights = jnp.pad(row_weights, ((0, 0), ends))

    def add_tile(index, received):
        some, norm, where, factors = (
            lax.dynamic_slice_in_dim(x, index * tile, tile, axis)
            for x, axis in ((q, 2), (lse, 2), (query_positions, 1), (row_weights, 1))
        )
        norm = jnp.where(norm == -jnp.inf, 0.0, norm)[..., None]

        def add_block(start, size, received):
            keys = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, start, size, 2), k
            )
            if key_positions is None:
                held = (start + jnp.arange(size, dtype=jnp.int32))[None, None, :]
            else:
                held = lax.dynamic_slice_in_dim(key_positions, start, size, 2)
            logits = decode_logits(some, keys, where, held, sm_scale=sm_scale)
            weights = jnp.exp(logits - norm)
            grouped = weights.reshape(batch, heads, group, tile, size)
            reduced = REDUCE[group_reduce](grouped, axis=2, keepdims=True)
            summed = jnp.einsum("bkgts,bt->bkgs", reduced, factors)
            summed = summed.reshape(batch, -1, size).astype(jnp.float32)
            before = lax.dynamic_slice_in_dim(received, start, size, 2)
            return lax.dynamic_update_slice_in_dim(received, before + summed, start, 2)

        needed = blocks
        if key_positions is None:
            needed = jnp.clip(where.max() // block + 1, 0, blocks)
        received = lax.fori_loop(
            0, needed, lambda i, x: add_block(i * block, block, x), received
        )
        if slots % block:
            received = add_block(blocks * block, slots % block, received)
        return received

    listed = num_q_heads if group_reduce == "none" else heads
    nothing = jnp.zeros((batch, listed, slots), jnp.float32)
    return lax.fori_loop(0, tiles, add_tile, nothing)
