"""Block-sparse attention of a prompt: whole segments of queries read listed blocks.

A segment is `tokens` positions from a multiple of them on, a block as many as divide
them. What a call has of a segment that is not whole in it is attended to in full.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import criticality
from kvjax.stores import paged
from pallas_kernels.page_attention import page_attention


class Blocks(NamedTuple):
    """Blocks of keys: whole pages of a store, several to a block or one."""

    store: paged.Paged
    low: Float[Array, "B Hkv NB D"]  # extremes of their keys, as of the pages
    high: Float[Array, "B Hkv NB D"]

    @property
    def pages_each(self) -> int:
        """The pages of a block."""
        return -(-self.store.page_min.shape[2] // self.low.shape[2])


class Slot(NamedTuple):
    """The part of a call that lies in one segment of each row."""

    q: Float[Array, "B Hq M D"]  # rotated; what is not real is undefined
    start: Int[Array, "B"]  # position of the first
    valid: Bool[Array, "B M"]
    is_sparse: Bool[Array, "B"]  # whole, and behind the dense start of the prompt


# Of blocks, a slot and what was handed for it: the blocks `(B, Hkv, K)` that it reads,
# -1 = none, and what to hand on.
Choose = Callable[[Blocks, Slot, Any], tuple[Int[Array, "B H K"], Any]]


def blocks_of(store: paged.Paged, block: int) -> Blocks:
    """Returns the blocks of a store whose page size divides `block`."""
    each = block // store.pages.shape[3]
    low, high = store.page_min, store.page_max
    if each == 1:
        return Blocks(store, low, high)
    more = -low.shape[2] % each

    def grouped(x: Array, empty: float) -> Array:
        padding = ((0, 0), (0, 0), (0, more), (0, 0))
        x = jnp.pad(x, padding, constant_values=empty)
        return x.reshape(*x.shape[:2], -1, each, x.shape[3])

    return Blocks(store, grouped(low, jnp.inf).min(3), grouped(high, -jnp.inf).max(3))


def num_slots(rows: int, tokens: int) -> int:
    """Returns how many segments of `tokens` a call of so many rows may touch."""
    return -(-rows // tokens) + 1


def is_before(blocks: Blocks, slot: Slot) -> Bool[Array, "B NB"]:
    """Says of every block whether it lies wholly before a slot."""
    each = blocks.store.pages.shape[3] * blocks.pages_each
    number = jnp.arange(blocks.low.shape[2], dtype=jnp.int32)
    return number < (slot.start // each)[:, None]


def attend(
    blocks: Blocks,
    q: Float[Array, "B Hq T D"],
    lengths: Int[Array, "B"],
    choose: Choose,
    handed: Any,
    *,
    tokens: int,
    dense_tokens: int,
) -> tuple[Float[Array, "B Hq T D"], Any]:
    """Attends from a chunk of the prompt, segment by segment.

    A whole segment that begins at position `dense_tokens` or later reads the blocks
    that are chosen for it and, causally, itself; all else reads everything before it.

    Args:
        blocks: of a store with the chunk written.
        q: rotated queries of the chunk.
        lengths: real ones of each row.
        choose: of each slot.
        handed: arrays with an axis of :func:`num_slots` in front, or None.
        tokens: of a segment.
        dense_tokens: positions before them are dense.

    Returns:
        The outputs in q's dtype, and what was handed on, with that axis.
    """
    rows, store = q.shape[2], blocks.store
    first = store.length - lengths
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, tokens), (0, 0)))

    def one_slot(done: Int[Array, "B"], below: Any) -> tuple[Array, Any]:
        start = first + done
        room = tokens - start % tokens
        count = jnp.minimum(lengths - done, room)
        slot = Slot(
            _rows_from(padded, done, tokens),
            start,
            jnp.arange(tokens, dtype=jnp.int32) < count[:, None],
            (count == tokens) & (start >= dense_tokens),
        )
        chosen, above = choose(blocks, slot, below)
        out = _attend_slot(blocks, slot, chosen)
        return done + count, (out.astype(q.dtype), above)

    number = num_slots(rows, tokens)
    _, (outs, above) = lax.scan(one_slot, jnp.zeros_like(first), handed, number)
    # Where each row of the call is among the rows of all slots.
    row = jnp.arange(rows, dtype=jnp.int32)
    begun = (first % tokens)[:, None]
    place = row + jnp.where(row < tokens - begun, 0, begun)
    outs = jnp.moveaxis(outs, 0, 2)
    flat = outs.reshape(*outs.shape[:2], number * tokens, outs.shape[4])
    return jnp.take_along_axis(flat, place[:, None, :, None], axis=2), above


def _rows_from(x: Array, start: Int[Array, "B"], size: int) -> Array:
    """Copies `size` rows from `start` on, another one for each row of the batch."""

    def one_row(x: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, size, 1)

    return jax.vmap(one_row)(x, start)


def _attend_slot(
    blocks: Blocks, slot: Slot, chosen: Int[Array, "B H K"]
) -> Float[Array, "B Hq M D"]:
    """Attends from a slot: sparse rows to their lists, the others to everything."""
    store, sparse = blocks.store, slot.is_sparse
    offset = jnp.arange(slot.q.shape[2], dtype=jnp.int32)
    # Rows that are attended for in the other way, or not there, see nothing.
    positions = jnp.where(slot.valid, slot.start[:, None] + offset, -1)
    far = jnp.where(sparse[:, None], positions, -1)
    near = jnp.where(sparse[:, None], -1, positions)

    def by_lists() -> Array:
        pages = _pages_read(blocks, slot, chosen)
        return page_attention(
            slot.q, store.pages, pages, far, sm_scale=store.spec.sm_scale
        )[0]

    def in_full() -> Array:
        return paged.attend_all(store, slot.q, near).out

    def nothing() -> Array:
        return jnp.zeros(slot.q.shape, criticality.wide(slot.q.dtype))

    sparse_out = lax.cond(sparse.any(), by_lists, nothing)
    dense_out = lax.cond((near >= 0).any(), in_full, nothing)
    return jnp.where(sparse[:, None, None, None], sparse_out, dense_out)


def _pages_read(
    blocks: Blocks, slot: Slot, chosen: Int[Array, "B H K"]
) -> Int[Array, "B H N"]:
    """Lists the pages of the chosen blocks and of the segment itself."""
    each, num_pages = blocks.pages_each, blocks.store.pages.shape[2]
    page_size = blocks.store.pages.shape[3]
    own = slot.q.shape[2] // page_size
    within = jnp.arange(each, dtype=jnp.int32)
    pages = chosen[..., None] * each + within
    pages = jnp.where(chosen[..., None] < 0, -1, pages)
    pages = pages.reshape(*chosen.shape[:2], -1)
    itself = slot.start[:, None] // page_size + jnp.arange(own, dtype=jnp.int32)
    itself = jnp.broadcast_to(itself[:, None], (*pages.shape[:2], own))
    listed = jnp.concatenate([pages, itself], axis=2)
    return jnp.where(listed < num_pages, listed, -1)
