"""`page_attention` on NVIDIA GPUs in Triton: A100, L4, and beside Mosaic on Hopper.

Grid: lists x splits of a list x blocks of query rows. A program goes through its part
of a list a block of tokens at a time: online softmax, then XLA merges the splits.

Codes of quantised pages become floats in registers. Turned rows are read as they are:
queries are turned before, and results back.

Bytes per block: `block_tokens` rows of floats, or of codes and scales; nothing else
grows with the cache.
"""

import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shared import triton_call, triton_lists, triton_softmax
from pallas_kernels.shared.quantized import Quantized, turned
from pallas_kernels.shared.split_k import joined, merge
from pallas_kernels.shared.triton_lists import (
    head_of,
    rows_of,
    seen_by,
    tokens_of,
)
from pallas_kernels.shared.triton_rows import of_head, vectors

MAX_FEATURES = 64  # of a surrogate


def unsupported(
    q,
    pages,
    page_ids,
    query_positions,
    mask=None,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    first_position=0,
) -> str | None:
    """Says why the kernels cannot, from shapes, dtypes and device; None if they can."""
    del query_positions, mask, initial, sm_scale, first_position
    if surrogate is not None and surrogate.shift.shape[2] > MAX_FEATURES:
        return f"{surrogate.shift.shape[2]} features must be at most {MAX_FEATURES}"
    return triton_lists.unsupported(q, pages, page_ids)


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask=None,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    first_position=0,
    interpret=False,
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    keys, values = triton_lists.turned_like(pages)
    q = turned(keys, q)
    inputs = triton_lists.inputs(q, pages, page_ids, query_positions, mask)
    static = triton_lists.static(q, pages, page_ids, mask, interpret)
    rows, head_dim = static["ROWS"], static["HEAD_DIM"]
    features, weighing = 0, (q,) * 3  # or anything
    if surrogate is not None:
        directions = turned(keys, surrogate.directions)
        features, weighing = _padded(surrogate._replace(directions=directions))
    if surrogate is not None or isinstance(pages, Quantized):
        # Two sums of the values, or floats of both keys and values, are in registers.
        static["num_warps"] = 8
    parts = static["grid"][:2]
    of_rows = (*parts, rows, head_dim), (*parts, rows)
    shapes = *of_rows, *(of_rows if features else ((1,), (1,)))
    out, lse, *sums = triton_call.call(
        _page_attention,
        *inputs,
        *weighing,
        out_shape=tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes),
        **static,
        scale=sm_scale * math.log2(math.e),
        FIRST=first_position,
        FEATURES=features,
    )
    out, lse = merge(out, lse, axis=1)
    out = turned(values, out.reshape(q.shape))
    softmax = joined(out, lse.reshape(q.shape[:3]), initial)
    if surrogate is None:
        return softmax
    taken, mass = (x.sum(1) for x in sums)
    taken = turned(values, taken.reshape(q.shape))
    return *softmax, taken, mass.reshape(q.shape[:3])


def _padded(surrogate):
    """The surrogate with a power of two of features; those added weigh nothing."""
    directions, shift, shares = surrogate
    count = shift.shape[2]
    features = max(triton.next_power_of_2(count), 16)
    last = (0, features - count)
    none = (0, 0)
    return features, (
        jnp.pad(directions, (none, none, last, none)),
        jnp.pad(shift, (none, none, last)),
        jnp.pad(shares, (none, none, none, last)),
    )


@triton.jit
@no_type_check
def _page_attention(
    # in
    q_ptr,  # (B * L, R, D)
    rows_ptr,  # (B * Hkv, NP, P, 2 D), or codes
    scales_ptr,  # (B * Hkv, NP, P, C) u16, or anything
    ids_ptr,  # (B * L, K) i32
    ends_ptr,  # (B * L,) i32
    positions_ptr,  # (B, T) i32
    mask_ptr,  # (B * L, K, T) i8, or anything
    directions_ptr,  # (B * Hkv, F, D) f32; with F = 0, this and the next two anything
    shift_ptr,  # (B * Hkv, F) f32
    shares_ptr,  # (B * L, R, F) f32
    # out
    out_ptr,  # (B * L, splits, R, D) f32
    lse_ptr,  # (B * L, splits, R) f32
    taken_ptr,  # as out_ptr; with F = 0, this and the next not written
    mass_ptr,  # as lse_ptr
    scale: tl.constexpr,  # of the logits, in base 2
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    OFFSET: tl.constexpr,
    OPERAND: tl.constexpr,
    FIRST: tl.constexpr,
    FEATURES: tl.constexpr,
):
    part, splits = tl.program_id(1), tl.num_programs(1)
    which = tl.program_id(0).to(tl.int64)  # of B * L lists
    head = head_of(which, LISTS, KV_HEADS)
    rows_ptr, scales_ptr = of_head(
        rows_ptr, scales_ptr, head, NUM_PAGES * PAGE_SIZE, KEYS
    )
    ids_ptr += which * LISTED
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, HEAD_DIM)
    is_row = row < ROWS
    q, positions = rows_of(
        q_ptr, positions_ptr, which, row, LISTS, HEAD_DIM, STEPS, ROWS
    )
    last = tl.max(positions, 0)  # nothing later is read

    m = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    if FEATURES:
        feature = tl.arange(0, FEATURES)
        place = (head * FEATURES + feature)[:, None] * HEAD_DIM + lane
        directions = tl.load(directions_ptr + place)
        shift = tl.load(shift_ptr + head * FEATURES + feature)
        place = (which * ROWS + row)[:, None] * FEATURES + feature
        shares = tl.load(shares_ptr + place, mask=is_row[:, None], other=0.0)
        mass = tl.zeros((BLOCK_ROWS,), tl.float32)
        taken = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    blocks = tl.cdiv(tl.load(ends_ptr + which) * PAGE_SIZE, BLOCK_TOKENS)
    share = tl.cdiv(blocks, splits)
    begin = part * share
    for i in range(begin, tl.minimum(begin + share, blocks)):
        slot, position, is_page = tokens_of(
            ids_ptr, i, LISTED, NUM_PAGES, PAGE_SIZE, BLOCK_TOKENS
        )
        is_held = is_page & (position <= last) & (position >= FIRST)
        k = vectors(rows_ptr, scales_ptr, position, is_held, HEAD_DIM, KEYS, OFFSET)
        v = vectors(rows_ptr, scales_ptr, position, is_held, HEAD_DIM, VALUES, OFFSET)
        seen = seen_by(
            mask_ptr,
            which,
            slot,
            position,
            is_held,
            row,
            positions,
            LISTED,
            STEPS,
            HAS_MASK,
        )
        logits = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision="ieee")
        logits = tl.where(seen, logits * scale, float("-inf"))
        m, l, acc = triton_softmax.add_block(m, l, acc, logits, v, OPERAND)
        if FEATURES:  # in three products of 19 bits each: near float32
            keys = tl.trans(k.to(tl.float32))
            ell = tl.dot(directions, keys, input_precision="tf32x3")
            features = tl.exp(ell - shift[:, None])
            weights = tl.dot(shares, features, input_precision="tf32x3")
            weights = tl.where(seen, weights, 0.0)
            mass += tl.sum(weights, 1)
            taken += tl.dot(weights, v.to(tl.float32), input_precision="tf32x3")

    triton_softmax.store(out_ptr, lse_ptr, m, l, acc, which, row, HEAD_DIM, ROWS)
    if FEATURES:
        row += part * ROWS
        taken_ptr += which * splits * (ROWS * HEAD_DIM) + lane
        tl.store(taken_ptr + row[:, None] * HEAD_DIM, taken, mask=is_row[:, None])
        tl.store(mass_ptr + which * splits * ROWS + row, mass, mask=is_row)
