"""The definition of `page_attention`, and its path on every device (XLA)."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import reference


def page_attention(q, pages, page_ids, query_positions, *, sm_scale):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    batch, lists, listed = page_ids.shape
    num_kv_heads, _, page_size, width = pages.shape[1:]

    def one_head(pages, ids):  # (NP, P, 2D), (lists per KV head * K,)
        return pages.at[jnp.maximum(ids, 0)].get(mode="clip")

    per_head = page_ids.reshape(batch, num_kv_heads, -1)
    taken = jax.vmap(jax.vmap(one_head))(pages, per_head)
    taken = taken.reshape(batch, lists, listed * page_size, width)
    k, v = jnp.split(taken, 2, axis=-1)
    positions = page_ids[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
    positions = jnp.where(page_ids[..., None] < 0, -1, positions)
    positions = positions.reshape(batch, lists, listed * page_size)
    return reference.decode_attention(
        q, k, v, query_positions, positions, sm_scale=sm_scale
    )
