"""Lists of pages as the kernels walk through them: sorted by who sees what.

XLA sorts each list first: pages that every query row sees in full, then pages cut by a
row's position or mask, which alone are masked, then none. `schedule` and `Lists` are
those of the TPU kernels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def sort_keys(page_ids, num_pages, page_size, query_positions, mask, first_position=0):
    """`(kind, key)` of the listed pages, both as `page_ids`.

    Kind 0 is seen in full by every row, 1 by any in part, 2 by none. Keys sort by kind,
    then by page, which is `key % num_pages`.
    """
    first, last = query_positions.min(1), query_positions.max(1)
    start = page_ids * page_size
    is_full = start + page_size - 1 <= first[:, None, None]
    is_seen = (start <= last[:, None, None]) & (page_ids >= 0) & (page_ids < num_pages)
    if first_position:
        is_full &= start >= first_position
        is_seen &= start + page_size > first_position
    if mask is not None:
        is_full &= mask.all(-1)
        is_seen &= mask.any(-1)
    kind = jnp.where(is_seen, jnp.where(is_full, 0, 1), 2)
    # One key instead of a pair; three times the pages of a row are far below 2**31.
    return kind, kind * num_pages + jnp.where(is_seen, page_ids, 0)


def schedule(page_ids, pages, query_positions, mask, copies, first_position=0):
    """Sorted ids `(B, 1, H * K' + copies)` and counts `(B, 1, 2 * H + 3)`.

    Counts of pages that every row sees in full, by list, then of pages that any sees,
    then the last position seen. A list without pages follows the last, to run into.
    With a mask, a second row of the ids says which rows see the page, a bit for each.
    """
    batch, _, listed = page_ids.shape
    num_pages, page_size = pages.shape[2:4]
    kind, key = sort_keys(
        page_ids, num_pages, page_size, query_positions, mask, first_position
    )
    seeing = []
    if mask is not None:
        bit = 1 << jnp.arange(mask.shape[3], dtype=jnp.int32)
        seeing = [jnp.where(mask, bit, 0).sum(-1, dtype=jnp.int32)]
    key, *seeing = lax.sort((key, *seeing), num_keys=1)
    padding = ((0, 0), (0, 0), (0, -listed % copies))
    lines = [
        jnp.pad(x, padding).reshape(batch, 1, -1) for x in (key % num_pages, *seeing)
    ]
    ids = jnp.pad(jnp.concatenate(lines, axis=1), ((0, 0), (0, 0), (0, copies)))
    full = (kind == 0).sum(-1, dtype=jnp.int32)
    seen = (kind < 2).sum(-1, dtype=jnp.int32)
    zero = jnp.zeros((batch, 1), jnp.int32)
    last = query_positions.max(1, keepdims=True)
    counts = jnp.concatenate([full, zero, seen, zero, last], axis=1)
    return ids, counts.reshape(batch, 1, -1)


@dataclasses.dataclass(frozen=True)
class Lists:
    """The lists of one batch row, inside a kernel; what `schedule` made, in SMEM."""

    ids: Any
    counts: Any
    pages: Any  # (B * Hkv * NP, P, 2 D), HBM
    number: int  # of lists
    copies: int  # pages of a block
    num_buffers: int  # blocks in the ring
    num_kv_heads: int
    first: Any  # of this batch row's pages
    num_pages: int  # of a KV head

    @classmethod
    def of(cls, ids, counts, pages, q_ref, buffers, copies, num_kv_heads) -> "Lists":
        """Of the batch row of this program; a list is a line of `q_ref`."""
        row_pages = pages.shape[0] // pl.num_programs(0)
        return cls(
            ids,
            counts,
            pages,
            number=q_ref.shape[0],
            copies=copies,
            num_buffers=buffers.shape[0],
            num_kv_heads=num_kv_heads,
            first=pl.program_id(0) * row_pages,
            num_pages=row_pages // num_kv_heads,
        )

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[1]

    @property
    def listed(self) -> int:
        """Places of a list, whole blocks."""
        return (self.ids.shape[1] - self.copies) // self.number

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.copies * self.page_size

    @property
    def last(self):
        """The last position that any query row sees."""
        return self.counts[0, 2 * self.number + 2]

    def page(self, n, index):
        """Of place `index` of list n."""
        return self.ids[0, n * self.listed + index]

    def source(self, n, index):
        """The page at place `index` of list n, where it lies in HBM."""
        head = lax.div(n, self.number // self.num_kv_heads)
        return self.pages.at[self.first + head * self.num_pages + self.page(n, index)]

    def target(self, buffers, slot, j):
        """Where page j of a block lies in a buffer of the ring."""
        return buffers.at[slot, pl.ds(j * self.page_size, self.page_size)]

    def seen(self, n):
        """How many pages of list n are read."""
        return self.counts[0, self.number + 1 + n]

    def whole(self, n):
        """Blocks of list n that need no mask; they come first."""
        return lax.div(self.counts[0, n], self.copies)

    def num_blocks(self, n):
        """Of list n; an empty one has one too, of no page."""
        return jnp.maximum(pl.cdiv(self.seen(n), self.copies), 1)

    def after(self, slot):
        """The next slot of the ring."""
        return lax.select(slot == self.num_buffers - 1, 0, slot + 1)

    def fetch(self, cursor, copy: Callable[..., Any]):
        """Starts the copies `copy(n, index, j, slot)` of a block, once.

        Returns:
            The cursor `(n, i, slot)` of the block after it, also across lists.
        """
        n, i, slot = cursor
        for j in range(self.copies):
            index = i * self.copies + j
            pl.when(index < self.seen(n))(copy(n, index, j, slot).start)
        is_last = i + 1 >= self.num_blocks(n)
        # Past the last list comes one without pages, for ever.
        n = lax.select(is_last, jnp.minimum(n + 1, self.number), n)
        return n, lax.select(is_last, 0, i + 1), self.after(slot)

    def valid(self, n, index):
        """Tokens of the page at this place up to the last position; 0 past the end."""
        first = self.page(n, index) * self.page_size
        valid = jnp.clip(self.last + 1 - first, 0, self.page_size)
        return jnp.where(index < self.seen(n), valid, 0)

    def visible(self, n, i, positions, bit, first_position=0):
        """Which rows `(R, 1)` see which tokens of block i, `(R, block)`."""
        token = lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        key_positions = jnp.full((1, self.block), self.last + 1, jnp.int32)
        seeing = jnp.zeros((1, self.block), jnp.int32)
        has_mask = self.ids.shape[0] == 2
        for j in range(self.copies):
            index = i * self.copies + j
            offset = token - j * self.page_size
            is_in_page = (offset >= 0) & (offset < self.valid(n, index))
            first = self.page(n, index) * self.page_size
            key_positions = jnp.where(is_in_page, first + offset, key_positions)
            if has_mask:
                bits = self.ids[1, n * self.listed + index]
                seeing = jnp.where(is_in_page, bits, seeing)
        visible = key_positions <= positions
        if first_position:
            visible &= key_positions >= first_position
        return visible & ((seeing & bit) != 0) if has_mask else visible
