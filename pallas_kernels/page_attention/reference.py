"""The definition of `page_attention`, and its path on every device (XLA)."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.entmax.reference import entmax_attention
from pallas_kernels.shared.split_k import joined


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    tau=None,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    alpha,
    first_position=0,
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    batch, num_q_heads, rows, head_dim = q.shape
    num_kv_heads, num_pages, page_size, width = pages.shape[1:]
    lists, listed = page_ids.shape[1:]
    flat = jnp.asarray(pages).reshape(-1, page_size, width)
    # Lists of all rows in one sequence, each with the first of its KV head's pages.
    head = jnp.arange(batch * lists, dtype=jnp.int32) // (lists // num_kv_heads)
    grouped = q.reshape(batch * lists, num_q_heads // lists, rows, head_dim)
    positions = jnp.repeat(query_positions, lists, axis=0)

    def attend(q, ids, first, positions, mask, tau, surrogate):
        """`(L, G, T, D)`, `(L, K)`, `(L,)`, `(L, T)`, `(L, K, T)` and `(L, G, T)`."""
        taken = flat.at[first[:, None] + jnp.maximum(ids, 0)].get(mode="clip")
        taken = taken.reshape(len(ids), 1, listed * page_size, width)
        k, v = jnp.split(taken, 2, axis=-1)
        held = ids[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
        is_held = (ids[..., None] >= 0) & (held >= first_position)
        held = jnp.where(is_held, held, -1).reshape(len(ids), 1, -1)
        if mask is not None:
            of_row = jnp.repeat(jnp.swapaxes(mask, 1, 2), page_size, axis=2)[:, None]
            held = jnp.where(of_row, held[:, :, None], -1)
        if alpha == 1:
            found = decode_attention(q, k, v, positions, held, sm_scale=sm_scale)
            if surrogate is None:
                return found
            seen = (held >= 0) & (held <= positions[..., None])  # (L, T or 1, N)
            return *found, *_weighed(surrogate, k[:, 0], v[:, 0], seen)
        return entmax_attention(q, k, v, positions, held, alpha, sm_scale, tau)

    if surrogate is not None:  # of each list, too
        directions, shift, shares = surrogate
        per_head = lists // num_kv_heads
        directions, shift = (
            jnp.repeat(x, per_head, axis=1).reshape(batch * lists, *x.shape[2:])
            for x in (directions, shift)
        )
        surrogate = directions, shift, shares.reshape(*grouped.shape[:3], -1)

    def one_by_one(*arrays):
        # All lists at once, the CPU would gather anew, element by element, in each of
        # the products' loops.
        def one(part):
            alone = jax.tree.map(lambda x: x[None], part)
            return tuple(x[0] for x in attend(*alone))

        return lax.map(one, arrays)

    arrays = (
        grouped,
        page_ids.reshape(-1, listed),
        head * num_pages,
        positions,
        None if mask is None else mask.reshape(-1, listed, rows),
        None if tau is None else tau.reshape(grouped.shape[:3]),
        surrogate,
    )
    found = lax.platform_dependent(*arrays, cpu=one_by_one, default=attend)
    shape = batch, num_q_heads, rows
    out, lse, *sums = (x.reshape(*shape, *x.shape[3:]) for x in found)
    return *joined(out, lse, initial), *sums


def _weighed(surrogate, k, v, seen):
    """Sums of `(L, N, D)` values by the surrogate's weights, and of the weights."""
    directions, shift, shares = surrogate
    k, v = (x.astype(jnp.float32) for x in (k, v))

    def product(equation, *operands):
        return jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)

    features = jnp.exp(product("lfd,lnd->lfn", directions, k) - shift[..., None])
    weights = product("lgtf,lfn->lgtn", shares, features)
    weights = jnp.where(seen[:, None], weights, 0.0)
    return product("lgtn,lnd->lgtd", weights, v), weights.sum(-1)
