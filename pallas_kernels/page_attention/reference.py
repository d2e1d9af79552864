"""The definition of `page_attention`, and its path on every device (XLA)."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.reference import decode_attention
from pallas_kernels.shared.quantized import floats
from pallas_kernels.shared.split_k import joined
from pallas_kernels.shared.xla_lists import over_lists


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    first_position=0,
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""

    def attend(q, k, v, positions, held, surrogate):
        softmax = decode_attention(q, k, v, positions, held, sm_scale=sm_scale)
        if surrogate is None:
            return softmax
        seen = (held >= 0) & (held <= positions[..., None])  # (L, T or 1, N)
        return *softmax, *_weighed(surrogate, floats(k)[:, 0], floats(v)[:, 0], seen)

    if surrogate is not None:
        surrogate = _by_list(surrogate, page_ids.shape[1])
    out, lse, *sums = over_lists(
        attend,
        q,
        pages,
        page_ids,
        query_positions,
        mask,
        surrogate,
        first_position=first_position,
    )
    return *joined(out, lse, initial), *sums


def _by_list(surrogate, lists):
    """The surrogate of each list, in one sequence of the lists of all rows."""
    directions, shift, shares = surrogate
    batch, num_kv_heads = shift.shape[:2]
    directions, shift = (
        jnp.repeat(x, lists // num_kv_heads, axis=1).reshape(
            batch * lists, *x.shape[2:]
        )
        for x in (directions, shift)
    )
    num_q_heads, rows, features = shares.shape[1:]
    shares = shares.reshape(batch * lists, num_q_heads // lists, rows, features)
    return directions, shift, shares


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
