"""The softmax of Triton kernels, a block of keys at a time, in units of log 2."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def add_block(m, l, acc, logits, v, OPERAND: tl.constexpr):
    """The running maximum, sum and weighted values, with those of a block too.

    `logits (BLOCK_ROWS, BLOCK_TOKENS)` are -inf where a row does not see the key.
    """
    m_new = tl.maximum(m, tl.max(logits, 1))
    # A row that has seen nothing: -inf - -inf would be NaN.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(m - base)
    l = l * decay + tl.sum(weights, 1)
    weights = weights.to(v.dtype).to(OPERAND)
    acc = acc * decay[:, None]
    acc += tl.dot(weights, v.to(OPERAND), input_precision="ieee")
    return m_new, l, acc


@triton.jit
@no_type_check
def store(
    out_ptr,  # (lists, splits, R, D) f32
    lse_ptr,  # (lists, splits, R) f32
    m,
    l,
    acc,
    which,  # of the lists
    row,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes the part of a list; out 0 and lse -inf for a row that saw no key."""
    part, splits = tl.program_id(1), tl.num_programs(1)
    is_row = row < ROWS
    positive = tl.where(l == 0, 1.0, l)
    lse = tl.where(l == 0, float("-inf"), m * 0.6931471805599453 + tl.log(positive))
    row += part * ROWS
    lse_ptr += which * splits * ROWS
    out_ptr += which * splits * (ROWS * HEAD_DIM)
    tl.store(lse_ptr + row, lse, mask=is_row)
    out = acc / positive[:, None]
    place = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(out_ptr + place, out, mask=is_row[:, None])
