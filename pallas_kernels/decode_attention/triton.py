"""`decode_attention` on NVIDIA GPUs in Triton, over a quantised cache.

Grid: KV heads x splits of the cache x blocks of query rows. A program goes through its
part of the slots a block at a time: codes become floats in registers, then online
softmax; XLA merges the splits. Turned rows are read as they are: queries are turned
before, and results back. Without `key_positions`, slots behind the last position of a
program's rows are not read, nor those before its window.

Bytes per block: `block_tokens` rows of codes and scales; nothing else grows with the
cache but the logits, where they are asked for.
"""

import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.decode_attention.reference import only_seen
from pallas_kernels.shared import (
    triton_call,
    triton_lists,
    triton_rows,
    triton_softmax,
)
from pallas_kernels.shared.quantized import Quantized, turned
from pallas_kernels.shared.split_k import merge
from pallas_kernels.shared.triton_lists import rows_of
from pallas_kernels.shared.triton_rows import of_head, vectors


def unsupported(
    q,
    k,
    v,
    query_positions,
    key_positions,
    *,
    sm_scale,
    window,
    soft_cap,
    with_logits,
) -> str | None:
    """Says why the kernel cannot, from shapes, dtypes and device; None if it can."""
    del query_positions, key_positions, sm_scale, window, soft_cap, with_logits
    if not (isinstance(k, Quantized) and isinstance(v, Quantized)):
        # Of floats, XLA's two products read keys and values once as well.
        return "its keys and values must be quantised"
    if not k.shape[2] or not q.shape[2]:
        return f"{k.shape[2]} slots and {q.shape[2]} rows must be positive"
    if k.shape[2] >= (1 << 31) - 128:  # the most tokens of a block
        return f"{k.shape[2]} slots must be below 2**31 - 128"
    return triton_rows.unsupported(q, k, v)


def decode_attention(
    q,
    k,
    v,
    query_positions,
    key_positions,
    *,
    sm_scale,
    window=None,
    soft_cap=None,
    with_logits=False,
    interpret=False,
):
    """See :func:`pallas_kernels.decode_attention.decode_attention`."""
    heads, slots = k.shape[1:3]
    sizes = triton_lists.sizes(q, heads)
    grid = triton_lists.grid(q, heads, slots)
    static = triton_rows.static(q, slots, k, v, interpret=interpret)
    static["num_warps"] = 8  # floats of both keys and values are in registers
    rows, head_dim = sizes["ROWS"], q.shape[3]
    shapes = (*grid[:2], rows, head_dim), (*grid[:2], rows)
    shapes += ((grid[0], rows, slots) if with_logits else (1,),)
    query_positions = query_positions.astype(jnp.int32)
    held = query_positions  # or anything
    if key_positions is not None:
        held = key_positions.astype(jnp.int32)
    # The logits are in units of log 2, and those of tanh in units of the cap.
    per_log2 = math.log2(math.e)
    scale, cap = sm_scale * per_log2, 0.0
    if soft_cap is not None:
        scale, cap = sm_scale / soft_cap, soft_cap * per_log2
    out, lse, logits = triton_call.call(
        _decode_attention,
        turned(k, q),
        *triton_rows.arrays_of(k),
        *triton_rows.arrays_of(v),
        query_positions,
        held,
        out_shape=tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes),
        grid=grid,
        **sizes,
        **static,
        scale=scale,
        cap=cap,
        HEADS=heads,
        SLOTS=slots,
        WINDOW=window or 0,
        HELD_ROWS=0 if key_positions is None else key_positions.shape[0],
        HELD_HEADS=0 if key_positions is None else key_positions.shape[1],
        HAS_LOGITS=with_logits,
    )
    out, lse = merge(out, lse, axis=1)
    results = turned(v, out.reshape(q.shape)), lse.reshape(q.shape[:3])
    if not with_logits:
        return results
    seen = only_seen(logits, heads, query_positions, key_positions, window)
    return *results, seen


@triton.jit
@no_type_check
def _decode_attention(
    # in
    q_ptr,  # (B * Hkv, R, D)
    k_ptr,  # (B * Hkv, S, W) u8
    k_scales_ptr,  # (B * Hkv, S, C) u16
    v_ptr,  # as k_ptr
    v_scales_ptr,  # as k_scales_ptr
    positions_ptr,  # (B, T) i32
    held_ptr,  # (B or 1, Hkv or 1, S) i32, or anything
    # out
    out_ptr,  # (B * Hkv, splits, R, D) f32
    lse_ptr,  # (B * Hkv, splits, R) f32
    logits_ptr,  # (B * Hkv, R, S) f32, or not written
    scale: tl.constexpr,  # of the logits in base 2; with a cap, in units of it
    cap: tl.constexpr,  # in base 2, or 0
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,  # or 0
    HELD_ROWS: tl.constexpr,  # 0: slot s holds position s
    HELD_HEADS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    OFFSET: tl.constexpr,
    OPERAND: tl.constexpr,
):
    part, splits = tl.program_id(1), tl.num_programs(1)
    which = tl.program_id(0).to(tl.int64)  # of B * Hkv heads
    k_ptr, k_scales_ptr = of_head(k_ptr, k_scales_ptr, which, SLOTS, KEYS)
    v_ptr, v_scales_ptr = of_head(v_ptr, v_scales_ptr, which, SLOTS, VALUES)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < ROWS
    q, positions = rows_of(
        q_ptr, positions_ptr, which, row, HEADS, HEAD_DIM, STEPS, ROWS
    )
    last = tl.max(positions, 0)  # nothing later is read

    m = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    first, end = 0, SLOTS  # the first block, the last slot
    if HELD_ROWS:
        held_ptr += which // HEADS % HELD_ROWS * (HELD_HEADS * SLOTS)
        held_ptr += which % HELD_HEADS * SLOTS
    else:
        end = tl.minimum(last + 1, SLOTS)
        if WINDOW:
            oldest = tl.min(tl.where(is_row, positions, SLOTS), 0) - WINDOW + 1
            first = tl.maximum(oldest, 0) // BLOCK_TOKENS
    blocks = tl.cdiv(end, BLOCK_TOKENS)
    share = tl.cdiv(tl.maximum(blocks - first, 0), splits)
    begin = first + part * share
    for i in range(begin, tl.minimum(begin + share, blocks)):
        token = i * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        own = token
        if HELD_ROWS:
            own = tl.load(held_ptr + token, mask=token < SLOTS, other=-1)
        is_held = (token < SLOTS) & (own >= 0) & (own <= last)
        k = vectors(k_ptr, k_scales_ptr, token, is_held, HEAD_DIM, KEYS, OFFSET)
        v = vectors(v_ptr, v_scales_ptr, token, is_held, HEAD_DIM, VALUES, OFFSET)
        logits = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision="ieee")
        logits *= scale
        if cap > 0:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
            logits = cap * (1 - 2 / (1 + tl.exp(2 * logits)))
        if HAS_LOGITS:
            place = (which * ROWS + row)[:, None] * SLOTS + token
            is_logit = is_row[:, None] & (token < SLOTS)
            tl.store(logits_ptr + place, logits * 0.6931471805599453, mask=is_logit)
        seen = is_held & (own <= positions[:, None])
        if WINDOW:
            seen &= own > positions[:, None] - WINDOW
        logits = tl.where(seen, logits, float("-inf"))
        m, l, acc = triton_softmax.add_block(m, l, acc, logits, v, OPERAND)

    triton_softmax.store(out_ptr, lse_ptr, m, l, acc, which, row, HEAD_DIM, ROWS)
