"""Lists of pages in XLA: the tokens of each, side by side, for a definition."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.shared import quantized


def over_lists(
    attend: Callable[..., tuple[jax.Array, ...]],
    q: jax.Array,
    pages: quantized.Rows,
    page_ids: jax.Array,
    query_positions: jax.Array,
    mask: jax.Array | None,
    more: Any = None,
    *,
    first_position: int = 0,
) -> tuple[jax.Array, ...]:
    """Calls `attend` with every list as a row of a batch of its own.

    Args:
        attend: of q `(L, G, T, D)`, keys and values `(L, 1, N, D)`, query positions
            `(L, T)`, positions of the keys `(L, 1, N)` or with a mask `(L, 1, T, N)`,
            -1 where there is none to see, and `more`. Returns arrays `(L, G, T, ...)`.
        q, pages, page_ids, query_positions, mask: as of
            :func:`pallas_kernels.page_attention.page_attention`.
        more: arrays `(L, ...)` in any tree, or None.
        first_position: tokens before it are not seen.

    Returns:
        What `attend` did, `(B, Hq, T, ...)` each.
    """
    batch, num_q_heads, rows, head_dim = q.shape
    num_kv_heads, num_pages, page_size = pages.shape[1:4]
    lists, listed = page_ids.shape[1:]
    flat = jax.tree.map(
        lambda x: jnp.asarray(x).reshape(-1, page_size, x.shape[-1]), pages
    )
    # Lists of all rows in one sequence, each with the first of its KV head's pages.
    head = jnp.arange(batch * lists, dtype=jnp.int32) // (lists // num_kv_heads)
    grouped = q.reshape(batch * lists, num_q_heads // lists, rows, head_dim)
    positions = jnp.repeat(query_positions, lists, axis=0)

    def gathered(q, ids, first, positions, mask, more):
        """Takes `(L, G, T, D)`, `(L, K)`, `(L,)`, `(L, T)` and `(L, K, T)`."""
        which = first[:, None] + jnp.maximum(ids, 0)

        def take(x):
            taken = x.at[which].get(mode="clip")
            return taken.reshape(len(ids), 1, listed * page_size, -1)

        k, v = quantized.split(jax.tree.map(take, flat))
        key_positions = ids[..., None] * page_size + jnp.arange(
            page_size, dtype=jnp.int32
        )
        is_held = (ids[..., None] >= 0) & (key_positions >= first_position)
        key_positions = jnp.where(is_held, key_positions, -1).reshape(len(ids), 1, -1)
        if mask is not None:
            of_row = jnp.repeat(jnp.swapaxes(mask, 1, 2), page_size, axis=2)[:, None]
            key_positions = jnp.where(of_row, key_positions[:, :, None], -1)
        return attend(q, k, v, positions, key_positions, more)

    def one_by_one(*arrays):
        # All lists at once, the CPU would gather anew, element by element, in each of
        # the products' loops.
        def one(part):
            alone = jax.tree.map(lambda x: x[None], part)
            return tuple(x[0] for x in gathered(*alone))

        return lax.map(one, arrays)

    arrays = (
        grouped,
        page_ids.reshape(-1, listed),
        head * num_pages,
        positions,
        None if mask is None else mask.reshape(-1, listed, rows),
        more,
    )
    results = lax.platform_dependent(*arrays, cpu=one_by_one, default=gathered)
    shape = batch, num_q_heads, rows
    return tuple(x.reshape(*shape, *x.shape[3:]) for x in results)
