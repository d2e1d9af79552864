"""A step of `refreshkv` whose full cache lies in the host's memory.

A full step brings all of it in blocks, in a loop that other steps take no turn of: no
branch holds a cache. On the device are the small cache and the logits of a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial, merge
from kvjax.stores import hosted
from kvjax.stores.offloaded import Streamed
from pallas_kernels.decode_attention import decode_attention, decode_logits
from pallas_kernels.decode_attention.reference import BLOCK
from pallas_kernels.shared.quantized import Rows


class Whole(NamedTuple):
    """Attention of a step to every token, as far as it is full."""

    part: Partial  # of nothing, unless values were read
    logits: Float[Array, "B Hq 1 S"]  # -inf where nothing was read


def attend(
    k: Streamed,
    v: Streamed,
    q: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    is_full: Bool[Array, ""],
    *,
    sm_scale: float,
    with_values: bool,
) -> tuple[Streamed, Streamed, Whole]:
    """Attends from rotated queries to all tokens, if the step is full, by blocks.

    Args:
        with_values: False reads keys alone, for their logits.

    Returns:
        Keys and values with what was moved counted; the attention.
    """
    slots = k.shape[2]
    shape, wide = q.shape[:3], jnp.float32
    nothing = Partial(jnp.zeros(q.shape, wide), jnp.full(shape, -jnp.inf, wide))
    empty = Whole(nothing, jnp.full((*shape, slots), -jnp.inf, wide))
    size = min(BLOCK, slots)
    tokens = jnp.where(is_full, positions.max() + 1, 0)
    number = jnp.minimum((tokens + size - 1) // size, slots // size)

    def read(start: Int[Array, ""], size: int, whole: Whole) -> Whole:
        held = (start + jnp.arange(size, dtype=jnp.int32))[None, None]
        keys = hosted.block(k.host, start, size)
        if with_values:
            values = hosted.block(v.host, start, size)
            out, lse, logits = decode_attention(
                q, keys, values, positions, held, sm_scale=sm_scale, with_logits=True
            )
            part = merge(whole.part, Partial(out, lse))
        else:
            part = whole.part
            logits = decode_logits(q, keys, positions, held, sm_scale=sm_scale)
        where = (*hosted.at(0, 0, 0, 3), start)
        return Whole(part, lax.dynamic_update_slice(whole.logits, logits, where))

    whole = lax.fori_loop(
        jnp.int32(0), number, lambda i, found: read(i * size, size, found), empty
    )
    moved = number * size
    if rest := slots % size:
        start = jnp.int32(slots - rest)
        turns = (tokens > start).astype(jnp.int32)
        whole = lax.fori_loop(
            jnp.int32(0), turns, lambda _, found: read(start, rest, found), whole
        )
        moved += turns * rest
    k, v = (
        counted(k, moved),
        counted(v, moved if with_values else jnp.zeros_like(moved)),
    )
    return k, v, whole


def counted(rows: Streamed, tokens: Int[Array, "*B"]) -> Streamed:
    """Returns rows of which so many tokens of each row were moved."""
    return rows._replace(asked=rows.asked + tokens, moved=rows.moved + tokens)


def refill(
    rows: Streamed,
    ring: Float[Rows, "B Hkv N D"],
    chosen: Int[Array, "B Hkv N"],
    full: Bool[Array, "B"],
) -> tuple[Streamed, Any]:
    """Brings chosen tokens into the small cache of `full` rows, each with its page.

    Of an empty place, -1, the first token comes, which nothing attends to there.

    Returns:
        The rows with these counted, and the small cache.
    """
    heads, size, page_size = *chosen.shape[1:], rows.page_size
    position = jnp.maximum(chosen, 0).reshape(-1)
    is_moved = jnp.broadcast_to(full[:, None, None], chosen.shape).reshape(-1)
    which, count = hosted.which(is_moved)

    def one(i: Int[Array, ""], ring: Rows) -> Any:
        entry = which[i]
        b, h, n = entry // (heads * size), entry // size % heads, entry % size

        def move(ring: Array, host: Array) -> Array:
            page, place = jnp.divmod(position[entry], page_size)
            found = hosted.take_pages(host, b, h, page, page_size, heads=1)
            row = lax.dynamic_slice_in_dim(hosted.to_device(found), place, 1, 2)
            return lax.dynamic_update_slice(ring, row, hosted.at(b, h, n, ring.ndim))

        return jax.tree.map(move, ring, rows.host.rows)

    filled = lax.fori_loop(jnp.int32(0), count, one, ring)
    return counted(rows, jnp.where(full, jnp.int32(size * page_size), 0)), filled


# Of a rotated query, as `small_step` of the method: output, log-sum-exp, positions.
Attended = tuple[
    Float[Array, "B Hq 1 D"], Float[Array, "B Hq 1"], Int[Array, "B Hkv N"]
]
Select = Callable[[Float[Array, "B Hq 1 S"]], Int[Array, "B Hkv N"]]


def step(
    state: Any,
    rotated: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    full: Bool[Array, "B"],
    *,
    select: Select | None,
    small_step: Callable[..., Attended],
    full_attend: bool,
) -> tuple[Any, Attended]:
    """Takes a step: `full` rows read everything, and refill their small cache.

    Args:
        state: a `RefreshKVState`.
        select: the selection by all logits; None leaves the small cache as it is.
        small_step: attends to the small cache of a state.
        full_attend: False attends to the refilled small cache in full rows.

    Returns:
        The state, and what was attended to; its positions are of the small cache.
    """
    store, by_row = state.store, full[:, None, None]
    small = small_step(state, rotated, positions)
    k, v, whole = attend(
        store.k,
        store.v,
        rotated,
        positions,
        full.any(),
        sm_scale=store.spec.sm_scale,
        with_values=full_attend,
    )
    chosen = state.positions
    if select is not None:
        kept = chosen
        found = lax.cond(full.any(), lambda: select(whole.logits), lambda: kept)
        chosen = jnp.where(by_row, found, chosen)
        k, ring_k = refill(k, state.k, chosen, full)
        v, ring_v = refill(v, state.v, chosen, full)
        state = state._replace(
            k=ring_k,
            v=ring_v,
            positions=chosen,
            since=jnp.where(full, 0, state.since),
        )
    state = state._replace(store=store._replace(k=k, v=v))
    out, lse = whole.part
    if not full_attend:
        out, lse, _ = small_step(state, rotated, positions)
    out = jnp.where(by_row[..., None], out, small[0])
    return state, (out, jnp.where(by_row, lse, small[1]), chosen)
