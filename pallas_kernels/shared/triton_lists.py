"""Lists of pages as Triton kernels walk through them: a block of tokens at a time.

Each token's page is looked up on its own, so that pages are of any size. A list is as
long as its last page that is seen; a -1 before that costs no bytes.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shared import triton_call, triton_rows
from pallas_kernels.shared.quantized import Quantized, split

BLOCK_BYTES = 16 << 10  # of the keys of a block: two stages fit twice into 100 KB
MAX_ROWS = 64  # query rows of a program
MAX_SPLITS = 64
PROGRAMS_PER_CORE = 2


def unsupported(q, pages, page_ids) -> str | None:
    """Says why the kernels cannot, from shapes, dtypes and device; None if they can."""
    if not page_ids.shape[2] or not q.shape[2]:
        return f"{page_ids.shape[2]} pages and {q.shape[2]} rows must be positive"
    if page_ids.shape[2] * pages.shape[3] >= 1 << 31:
        return f"{page_ids.shape[2]} pages of {pages.shape[3]} must be below 2**31"
    return triton_rows.unsupported(q, pages)


def grid(q, lists: int, tokens: int) -> tuple[int, int, int]:
    """Lists of so many tokens, parts that fill the device, blocks of query rows."""
    batch, blocks = q.shape[0], sizes(q, lists)
    row_blocks = triton.cdiv(blocks["ROWS"], blocks["BLOCK_ROWS"])
    most = triton.cdiv(tokens, 2 * blocks["BLOCK_TOKENS"])
    wanted = PROGRAMS_PER_CORE * triton_call.num_cores()
    wanted = triton.cdiv(wanted, batch * lists * row_blocks)
    return batch * lists, max(min(wanted, most, MAX_SPLITS), 1), row_blocks


def turned_like(pages: Any) -> tuple[Any, Any]:
    """Keys and values, for what is turned as they are; floats are not copied."""
    return split(pages) if isinstance(pages, Quantized) else (pages, pages)


def inputs(
    q, pages, page_ids, query_positions, mask
) -> tuple[jax.typing.ArrayLike, ...]:
    """The arrays that every kernel of queries takes, first."""
    return (
        q,
        *triton_rows.arrays_of(pages),
        page_ids.astype(jnp.int32),
        ends(page_ids, pages, query_positions),
        query_positions.astype(jnp.int32),
        page_ids if mask is None else mask.astype(jnp.int8),
    )


def static(q, pages, page_ids, mask, interpret) -> dict[str, Any]:
    """The sizes that every kernel of queries takes, and how it is called."""
    num_kv_heads, num_pages, page_size = pages.shape[1:4]
    lists, listed = page_ids.shape[1:]
    return {
        **triton_rows.static(q, num_pages * page_size, pages, interpret=interpret),
        "LISTS": lists,
        "LISTED": listed,
        "KV_HEADS": num_kv_heads,
        "NUM_PAGES": num_pages,
        "PAGE_SIZE": page_size,
        **sizes(q, lists),
        "HAS_MASK": mask is not None,
        "grid": grid(q, lists, listed * page_size),
    }


def sizes(q, lists: int) -> dict[str, int]:
    """Query rows of a list, and the blocks in which rows and tokens are taken."""
    rows = q.shape[1] // lists * q.shape[2]
    block_tokens = BLOCK_BYTES // (q.shape[3] * q.dtype.itemsize)
    return {
        "ROWS": rows,
        "BLOCK_ROWS": min(max(triton.next_power_of_2(rows), 16), MAX_ROWS),
        "BLOCK_TOKENS": min(max(block_tokens, 16), 128),
    }


def ends(page_ids, pages, query_positions):
    """The length of each list `(B, H)`, up to its last page that a row sees."""
    listed, (num_pages, page_size) = page_ids.shape[2], pages.shape[2:4]
    last = query_positions.max(1)[:, None, None]
    is_seen = (page_ids >= 0) & (page_ids < num_pages) & (page_ids * page_size <= last)
    place = jnp.arange(1, listed + 1, dtype=jnp.int32)
    return jnp.where(is_seen, place, 0).max(-1)


@triton.jit
@no_type_check
def head_of(which, LISTS: tl.constexpr, KV_HEADS: tl.constexpr):
    """The KV head of list `which` in the batch, of a row of it."""
    return which // LISTS * KV_HEADS + which % LISTS // (LISTS // KV_HEADS)


@triton.jit
@no_type_check
def rows_of(
    q_ptr,  # (B * L, R, D)
    positions_ptr,  # (B, T) i32
    which,
    row,
    LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Query rows of a list, `(BLOCK_ROWS, D)`, and their positions."""
    is_row = row < ROWS
    place = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
    q_ptr += which * (ROWS * HEAD_DIM)
    q = tl.load(q_ptr + place, mask=is_row[:, None], other=0.0)
    positions_ptr += which // LISTS * STEPS
    return q, tl.load(positions_ptr + row % STEPS, mask=is_row, other=-1)


@triton.jit
@no_type_check
def tokens_of(
    ids_ptr,  # (K,) i32, of the list
    i,
    LISTED: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Each token of block i: its slot of the list, its position, if it has a page."""
    token = i * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slot = token // PAGE_SIZE
    page = tl.load(ids_ptr + slot, mask=slot < LISTED, other=-1)
    is_page = (page >= 0) & (page < NUM_PAGES)
    return slot, page * PAGE_SIZE + token % PAGE_SIZE, is_page


@triton.jit
@no_type_check
def seen_by(
    mask_ptr,  # (B * L, K, T) i8, or anything
    which,
    slot,
    position,
    is_held,
    row,
    positions,
    LISTED: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """A mask `(BLOCK_ROWS, BLOCK_TOKENS)` of the tokens that each row sees."""
    seen = is_held & (position <= positions[:, None])
    if HAS_MASK:
        flag = (which * LISTED + slot) * STEPS + (row % STEPS)[:, None]
        seen &= tl.load(mask_ptr + flag, mask=slot < LISTED, other=0) != 0
    return seen
