"""`page_attention` on NVIDIA GPUs in Triton: A100, L4, and beside Mosaic on Hopper.

Grid: lists x splits of a list x blocks of query rows. A program goes through its part
of a list a block of tokens at a time, each token's page looked up on its own, so that
pages are of any size: online softmax, then XLA merges the splits. A list is as long as
its last page that is seen; a -1 before that costs no bytes.

Bytes per block: `block_tokens * 2 * D * itemsize`; nothing else grows with the cache.
"""

import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.splits import merge

BLOCK_BYTES = 16 << 10  # of the keys of a block: two stages fit twice into 100 KB
MAX_ROWS = 64  # query rows of a program
MAX_SPLITS = 64
PROGRAMS_PER_CORE = 2


def unsupported(
    q, pages, page_ids, query_positions, mask=None, *, sm_scale, alpha
) -> str | None:
    """Why the kernel cannot, from shapes, dtypes and the device; None if it can."""
    del query_positions, mask, sm_scale
    if alpha != 1:
        return f"{alpha=}: its softmax merges blocks, which entmax cannot"
    head_dim, dtypes = q.shape[3], (jnp.bfloat16, jnp.float16, jnp.float32)
    if q.dtype != pages.dtype or q.dtype not in dtypes:
        return f"dtypes {q.dtype}, {pages.dtype} must be one of 16 or 32 bits"
    if head_dim not in (16, 32, 64, 128, 256):
        return f"D={head_dim} must be a power of two from 16 to 256"
    if not page_ids.shape[2] or not q.shape[2]:
        return f"{page_ids.shape[2]} pages and {q.shape[2]} rows must be positive"
    if page_ids.shape[2] * pages.shape[3] >= 1 << 31:
        return f"{page_ids.shape[2]} pages of {pages.shape[3]} must be below 2**31"
    return triton_call.unsupported()


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask=None,
    *,
    sm_scale,
    alpha,
    interpret=False,
    splits=None,
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    del alpha  # 1
    batch, num_q_heads, num_rows, head_dim = q.shape
    num_kv_heads, num_pages, page_size, width = pages.shape[1:]
    lists, listed = page_ids.shape[1:]
    rows = num_q_heads // lists * num_rows
    block_rows = min(max(triton.next_power_of_2(rows), 16), MAX_ROWS)
    block_tokens = BLOCK_BYTES // (head_dim * pages.dtype.itemsize)
    block_tokens = min(max(block_tokens, 16), 128)
    row_blocks = triton.cdiv(rows, block_rows)
    if splits is None:
        most = triton.cdiv(listed * page_size, 2 * block_tokens)
        wanted = PROGRAMS_PER_CORE * triton_call.num_cores()
        wanted = triton.cdiv(wanted, batch * lists * row_blocks)
        splits = max(min(wanted, most, MAX_SPLITS), 1)
    out, lse = triton_call.call(
        _page_attention,
        q,
        pages,
        page_ids.astype(jnp.int32),
        _ends(page_ids, pages, query_positions),
        query_positions.astype(jnp.int32),
        page_ids if mask is None else mask.astype(jnp.int8),
        out_shape=(
            jax.ShapeDtypeStruct((batch * lists, splits, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch * lists, splits, rows), jnp.float32),
        ),
        grid=(batch * lists, splits, row_blocks),
        interpret=interpret,
        # Products of float32 are sums in registers.
        num_warps=8 if q.dtype == jnp.float32 else 4,
        scale=sm_scale * math.log2(math.e),
        LISTS=lists,
        LISTED=listed,
        KV_HEADS=num_kv_heads,
        NUM_PAGES=num_pages,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        STEPS=num_rows,
        ROWS=rows,
        BLOCK_ROWS=block_rows,
        BLOCK_TOKENS=block_tokens,
        HAS_MASK=mask is not None,
        # Where a head's elements exceed 32 bits, its offsets do.
        OFFSET=tl.int64 if num_pages * page_size * width >= 1 << 31 else tl.int32,
        # The interpreter multiplies bfloat16 as the integers that hold it.
        OPERAND=tl.float32 if interpret else _TYPES[q.dtype.name],
    )
    out, lse = merge(out, lse, axis=1)
    shape = batch, num_q_heads, num_rows
    return out.reshape(*shape, head_dim), lse.reshape(shape)


_TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


def _ends(page_ids, pages, query_positions):
    """`(B, H)`: how long each list is, up to its last page that a row sees."""
    listed, (num_pages, page_size) = page_ids.shape[2], pages.shape[2:4]
    last = query_positions.max(1)[:, None, None]
    is_seen = (page_ids >= 0) & (page_ids < num_pages) & (page_ids * page_size <= last)
    place = jnp.arange(1, listed + 1, dtype=jnp.int32)
    return jnp.where(is_seen, place, 0).max(-1)


@triton.jit
@no_type_check
def _page_attention(
    # in
    q_ptr,  # (B * L, R, D)
    pages_ptr,  # (B * Hkv, NP, P, 2 D)
    ids_ptr,  # (B * L, K) i32
    ends_ptr,  # (B * L,) i32
    positions_ptr,  # (B, T) i32
    mask_ptr,  # (B * L, K, T) i8, or anything
    # out
    out_ptr,  # (B * L, splits, R, D) f32
    lse_ptr,  # (B * L, splits, R) f32
    scale: tl.constexpr,  # of the logits, in base 2
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    OFFSET: tl.constexpr,
    OPERAND: tl.constexpr,
):
    part, splits = tl.program_id(1), tl.num_programs(1)
    which = tl.program_id(0).to(tl.int64)  # of B * L lists
    batch = which // LISTS
    head = batch * KV_HEADS + which % LISTS // (LISTS // KV_HEADS)
    pages_ptr += head * (NUM_PAGES * PAGE_SIZE * 2 * HEAD_DIM)
    ids_ptr += which * LISTED

    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, HEAD_DIM)
    is_row = row < ROWS
    q_ptr += which * (ROWS * HEAD_DIM)
    q = tl.load(q_ptr + row[:, None] * HEAD_DIM + lane, mask=is_row[:, None], other=0.0)
    positions = tl.load(
        positions_ptr + batch * STEPS + row % STEPS, mask=is_row, other=-1
    )
    last = tl.max(positions, 0)  # nothing later is read

    m = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    blocks = tl.cdiv(tl.load(ends_ptr + which) * PAGE_SIZE, BLOCK_TOKENS)
    share = tl.cdiv(blocks, splits)
    begin = part * share
    for i in range(begin, tl.minimum(begin + share, blocks)):
        token = i * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        slot = token // PAGE_SIZE
        page = tl.load(ids_ptr + slot, mask=slot < LISTED, other=-1)
        position = page * PAGE_SIZE + token % PAGE_SIZE
        is_held = (page >= 0) & (page < NUM_PAGES) & (position <= last)
        offset = position.to(OFFSET)[:, None] * (2 * HEAD_DIM) + lane
        k = tl.load(pages_ptr + offset, mask=is_held[:, None], other=0.0)
        v = tl.load(pages_ptr + HEAD_DIM + offset, mask=is_held[:, None], other=0.0)
        seen = is_held & (position <= positions[:, None])
        if HAS_MASK:
            flag = (which * LISTED + slot) * STEPS + (row % STEPS)[:, None]
            seen &= tl.load(mask_ptr + flag, mask=slot < LISTED, other=0) != 0
        logits = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision="ieee")
        logits = tl.where(seen, logits * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))
        # A row that has seen nothing: -inf - -inf would be NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(m - base)
        l = l * decay + tl.sum(weights, 1)
        weights = weights.to(v.dtype).to(OPERAND)
        acc = acc * decay[:, None]
        acc += tl.dot(weights, v.to(OPERAND), input_precision="ieee")
        m = m_new

    positive = tl.where(l == 0, 1.0, l)
    lse = tl.where(l == 0, float("-inf"), m * 0.6931471805599453 + tl.log(positive))
    row += part * ROWS
    lse_ptr += which * splits * ROWS
    out_ptr += which * splits * (ROWS * HEAD_DIM)
    tl.store(lse_ptr + row, lse, mask=is_row)
    out = acc / positive[:, None]
    tl.store(out_ptr + row[:, None] * HEAD_DIM + lane, out, mask=is_row[:, None])
