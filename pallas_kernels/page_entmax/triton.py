"""`page_entmax` on NVIDIA GPUs in Triton: keys, the threshold, values of the support.

Keys fill the scores of every row and listed token, the threshold is found over them,
and then only the values of the support are read: weights of the rest are exactly 0.
Grid of the first and the last: lists x splits of a list x blocks of query rows; with
one threshold for all of a list, what the splits make just adds up.

Bytes: the keys of all listed pages, the values of the tokens that any query row of
a program gives weight to, and the scores, 4 a row and token: written once, and read by
each step of the solver and once more.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.entmax import equations
from pallas_kernels.entmax import triton as solver
from pallas_kernels.entmax.triton import excess_of, powers
from pallas_kernels.shared import triton_call, triton_lists
from pallas_kernels.shared.quantized import turned
from pallas_kernels.shared.triton_lists import (
    head_of,
    rows_of,
    seen_by,
    tokens_of,
)
from pallas_kernels.shared.triton_rows import of_head, vectors

SCORE_BYTES = 256 << 20  # more are a prompt's, which XLA takes a few rows at a time


def unsupported(
    q, pages, page_ids, query_positions, mask=None, tau=None, *, sm_scale, alpha
) -> str | None:
    """Says why the kernels cannot, from shapes, dtypes and device; None if they can."""
    del query_positions, mask, tau, sm_scale, alpha
    score_bytes = 4 * page_ids.shape[2] * pages.shape[3] * q.size // q.shape[3]
    if score_bytes > SCORE_BYTES:
        return f"scores of {score_bytes:,} bytes must be at most {SCORE_BYTES:,}"
    return triton_lists.unsupported(q, pages, page_ids)


def page_entmax(
    q,
    pages,
    page_ids,
    query_positions,
    mask=None,
    tau=None,
    *,
    sm_scale,
    alpha,
    interpret=False,
):
    """See :func:`pallas_kernels.page_entmax.page_entmax`."""
    keys, values = triton_lists.turned_like(pages)
    q = turned(keys, q)
    inputs = triton_lists.inputs(q, pages, page_ids, query_positions, mask)
    static = triton_lists.static(q, pages, page_ids, mask, interpret)
    lists, splits, _ = static["grid"]
    rows, head_dim = static["ROWS"], static["HEAD_DIM"]
    tokens = static["LISTED"] * static["PAGE_SIZE"]
    scores = triton_call.call(
        _page_entmax_scores,
        *inputs,
        out_shape=jax.ShapeDtypeStruct((lists, rows, tokens), jnp.float32),
        **_without(static, "VALUES"),
        sm_scale=sm_scale,
    )
    if tau is None:
        solved = solver.solve(scores, alpha=alpha, interpret=interpret)
        threshold = equations.Threshold(*(x[..., 0] for x in solved))
    else:
        tau = tau.reshape(lists, rows)
        threshold = equations.Threshold(jnp.zeros_like(tau), tau)
    _, rows_of_pages, scales, page_ids, ends, _, _ = inputs
    acc, total, moment = (
        x.sum(1)
        for x in triton_call.call(
            _page_entmax_values,
            scores,
            *threshold,
            rows_of_pages,
            scales,
            page_ids,
            ends,
            out_shape=(
                jax.ShapeDtypeStruct((lists, splits, rows, head_dim), jnp.float32),
                *(jax.ShapeDtypeStruct((lists, splits, rows), jnp.float32),) * 2,
            ),
            **_without(static, "KEYS", "STEPS", "HAS_MASK"),
            **solver.static(alpha),
        )
    )
    acc = turned(values, acc.reshape(q.shape))
    if tau is not None:
        return acc, total.reshape(q.shape[:3])
    value = equations.value(*threshold, total, moment, alpha)
    out = acc / equations.positive(total).reshape(q.shape[:3])[..., None]
    return out, value.reshape(q.shape[:3])


def _without(static, *names):
    return {name: x for name, x in static.items() if name not in names}


@triton.jit
@no_type_check
def _page_entmax_scores(
    # in
    q_ptr,  # (B * L, R, D)
    rows_ptr,  # (B * Hkv, NP, P, 2 D), or codes
    scales_ptr,  # (B * Hkv, NP, P, C) u16, or anything
    ids_ptr,  # (B * L, K) i32
    ends_ptr,  # (B * L,) i32
    positions_ptr,  # (B, T) i32
    mask_ptr,  # (B * L, K, T) i8, or anything
    # out
    out_ptr,  # (B * L, R, K * P) f32
    sm_scale: tl.constexpr,
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
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
    head = head_of(which, LISTS, KV_HEADS)
    rows_ptr, scales_ptr = of_head(
        rows_ptr, scales_ptr, head, NUM_PAGES * PAGE_SIZE, KEYS
    )
    ids_ptr += which * LISTED
    out_ptr += which * ROWS * (LISTED * PAGE_SIZE)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q, positions = rows_of(
        q_ptr, positions_ptr, which, row, LISTS, HEAD_DIM, STEPS, ROWS
    )
    last = tl.max(positions, 0)  # nothing later is read
    line = row.to(tl.int64)[:, None] * (LISTED * PAGE_SIZE)
    is_row = (row < ROWS)[:, None]

    blocks = tl.cdiv(tl.load(ends_ptr + which) * PAGE_SIZE, BLOCK_TOKENS)
    share = tl.cdiv(blocks, splits)
    begin = part * share
    for i in range(begin, tl.minimum(begin + share, blocks)):
        slot, position, is_page = tokens_of(
            ids_ptr, i, LISTED, NUM_PAGES, PAGE_SIZE, BLOCK_TOKENS
        )
        is_held = is_page & (position <= last)
        k = vectors(rows_ptr, scales_ptr, position, is_held, HEAD_DIM, KEYS, OFFSET)
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
        logits = tl.where(seen, logits * sm_scale, float("-inf"))
        token = i * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        tl.store(out_ptr + line + token, logits, mask=is_row & (slot < LISTED))
    # Behind the last page that is seen.
    rest = tl.cdiv(LISTED * PAGE_SIZE, BLOCK_TOKENS) - blocks
    share = tl.cdiv(rest, splits)
    begin = part * share
    nothing = tl.full((BLOCK_ROWS, BLOCK_TOKENS), float("-inf"), tl.float32)
    for i in range(begin, tl.minimum(begin + share, rest)):
        token = (blocks + i) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        is_token = token < LISTED * PAGE_SIZE
        tl.store(out_ptr + line + token, nothing, mask=is_row & is_token)


@triton.jit
@no_type_check
def _page_entmax_values(
    # in
    scores_ptr,  # (B * L, R, K * P) f32
    top_ptr,  # (B * L, R) f32
    tau_ptr,  # (B * L, R) f32
    rows_ptr,  # (B * Hkv, NP, P, 2 D), or codes
    scales_ptr,  # (B * Hkv, NP, P, C) u16, or anything
    ids_ptr,  # (B * L, K) i32
    ends_ptr,  # (B * L,) i32
    # out
    out_ptr,  # (B * L, splits, R, D) f32: not divided by their total
    total_ptr,  # (B * L, splits, R) f32: sum of the weights
    moment_ptr,  # (B * L, splits, R) f32: sum of the weights times their excess
    scale: tl.constexpr,  # alpha - 1
    exponent: tl.constexpr,
    WHOLE: tl.constexpr,
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    OFFSET: tl.constexpr,
    OPERAND: tl.constexpr,
):
    part, splits = tl.program_id(1), tl.num_programs(1)
    which = tl.program_id(0).to(tl.int64)  # of B * L lists
    head = head_of(which, LISTS, KV_HEADS)
    rows_ptr, scales_ptr = of_head(
        rows_ptr, scales_ptr, head, NUM_PAGES * PAGE_SIZE, VALUES
    )
    ids_ptr += which * LISTED
    scores_ptr += which * ROWS * (LISTED * PAGE_SIZE)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < ROWS
    line = row.to(tl.int64)[:, None] * (LISTED * PAGE_SIZE)
    top = tl.load(top_ptr + which * ROWS + row, mask=is_row, other=0.0)[:, None]
    tau = tl.load(tau_ptr + which * ROWS + row, mask=is_row, other=0.0)[:, None]

    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    blocks = tl.cdiv(tl.load(ends_ptr + which) * PAGE_SIZE, BLOCK_TOKENS)
    share = tl.cdiv(blocks, splits)
    begin = part * share
    for i in range(begin, tl.minimum(begin + share, blocks)):
        slot, position, _is_page = tokens_of(
            ids_ptr, i, LISTED, NUM_PAGES, PAGE_SIZE, BLOCK_TOKENS
        )
        token = i * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        is_score = is_row[:, None] & (slot < LISTED)
        scores = tl.load(scores_ptr + line + token, mask=is_score, other=float("-inf"))
        is_nan = scores != scores
        excess = tl.where(is_nan, scores, excess_of(scores, top, tau, scale))
        is_needed = tl.max(((excess > 0) | is_nan).to(tl.int32), 0)
        if tl.max(is_needed, 0) > 0:
            is_read = is_needed > 0
            v = vectors(
                rows_ptr, scales_ptr, position, is_read, HEAD_DIM, VALUES, OFFSET
            )
            weights, _slope = powers(excess, exponent, WHOLE)
            total += tl.sum(weights, 1)
            moment += tl.sum(weights * excess, 1)
            weights = weights.to(v.dtype).to(OPERAND)
            acc += tl.dot(weights, v.to(OPERAND), input_precision="ieee")

    lane = tl.arange(0, HEAD_DIM)
    first = (which * splits + part) * ROWS
    tl.store(total_ptr + first + row, total, mask=is_row)
    tl.store(moment_ptr + first + row, moment, mask=is_row)
    place = row[:, None] * HEAD_DIM + lane
    tl.store(out_ptr + first * HEAD_DIM + place, acc, mask=is_row[:, None])
