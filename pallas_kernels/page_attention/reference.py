"""The definition of `page_attention`, and its path on every device (XLA)."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.entmax.reference import entmax_attention


def page_attention(q, pages, page_ids, query_positions, mask, *, sm_scale, alpha):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    batch, num_q_heads, rows, head_dim = q.shape
    num_kv_heads, num_pages, page_size, width = pages.shape[1:]
    lists, listed = page_ids.shape[1:]
    flat = pages.reshape(-1, page_size, width)
    # Lists of all rows in one sequence, each with the first of its KV head's pages.
    head = jnp.arange(batch * lists, dtype=jnp.int32) // (lists // num_kv_heads)
    grouped = q.reshape(batch * lists, num_q_heads // lists, rows, head_dim)
    positions = jnp.repeat(query_positions, lists, axis=0)

    def attend(q, ids, first, positions, *mask):
        """`(L, G, T, D)`, `(L, K)`, `(L,)`, `(L, T)` and `(L, K, T)` of L lists."""
        taken = flat.at[first[:, None] + jnp.maximum(ids, 0)].get(mode="clip")
        taken = taken.reshape(len(ids), 1, listed * page_size, width)
        k, v = jnp.split(taken, 2, axis=-1)
        held = ids[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
        held = jnp.where(ids[..., None] < 0, -1, held).reshape(len(ids), 1, -1)
        for flags in mask:
            of_row = jnp.repeat(jnp.swapaxes(flags, 1, 2), page_size, axis=2)[:, None]
            held = jnp.where(of_row, held[:, :, None], -1)
        if alpha == 1:
            return decode_attention(q, k, v, positions, held, sm_scale=sm_scale)
        return entmax_attention(q, k, v, positions, held, alpha, sm_scale)

    def one_by_one(*arrays):
        # All lists at once, the CPU would gather anew, element by element, in each of
        # the products' loops.
        def one(part):
            return tuple(x[0] for x in attend(*(x[None] for x in part)))

        return lax.map(one, arrays)

    ids = page_ids.reshape(-1, listed)
    arrays = grouped, ids, head * num_pages, positions
    if mask is not None:
        arrays = (*arrays, mask.reshape(-1, listed, rows))
    out, lse = lax.platform_dependent(*arrays, cpu=one_by_one, default=attend)
    shape = batch, num_q_heads, rows
    return out.reshape(*shape, head_dim), lse.reshape(shape)
