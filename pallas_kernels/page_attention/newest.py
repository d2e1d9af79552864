"""Attention to quantised pages, and to the newest tokens as they came: two parts.

As of :mod:`pallas_kernels.decode_attention.newest`: pages end where, for a query, the
newest tokens begin, and their softmax starts from attention to these.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention import reference
from pallas_kernels.shared.quantized import WithNewest
from pallas_kernels.shared.split_k import joined


def page_attention(
    attend: Callable[..., tuple[Array, ...]],
    q: Float[Array, "B Hq T D"],
    pages: WithNewest,
    page_ids: Int[Array, "B H K"],
    query_positions: Int[Array, "B T"],
    mask: Bool[Array, "B H K T"] | None,
    initial: tuple[Array, Array] | None,
    *,
    sm_scale: float,
    first_position: int,
) -> tuple[Array, ...]:
    """Attends as :func:`pallas_kernels.page_attention.page_attention` does.

    Args:
        attend: that function, for pages that are all quantised.
        q, pages, page_ids, query_positions, mask, initial: its arguments.
        sm_scale, first_position: its options.
    """
    keys, values = jnp.split(pages.newest, 2, axis=-1)
    lists = page_ids.shape[1] // pages.shape[1]
    newest = reference.decode_attention(
        q,
        jnp.repeat(keys, lists, axis=1),
        jnp.repeat(values, lists, axis=1),
        query_positions,
        _listed(pages, page_ids, mask, first_position),
        sm_scale=sm_scale,
        window=pages.residual,
    )
    return attend(
        q,
        pages.rows,
        page_ids,
        pages.stored_until(query_positions),
        mask,
        joined(newest[0], newest[1], initial),
        sm_scale=sm_scale,
        first_position=first_position,
    )


def _listed(
    pages: WithNewest,
    page_ids: Int[Array, "B H K"],
    mask: Bool[Array, "B H K T"] | None,
    first_position: int,
) -> Int[Array, "B H *T W"]:
    """Returns the newest tokens' positions in listed pages, -1 = in none."""
    page = (pages.at // pages.shape[3])[:, None, None]
    is_in = page_ids[..., None] == page  # (B, H, K, W)
    if mask is None:
        is_listed = is_in.any(2)
    else:  # a row of queries at a time
        is_listed = (is_in[:, :, :, None] & mask[..., None]).any(2)
    at = pages.at[:, None] if mask is None else pages.at[:, None, None]
    return jnp.where(is_listed & (at >= first_position), at, -1)
