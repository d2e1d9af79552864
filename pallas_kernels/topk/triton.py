"""`top_k` on NVIDIA GPUs in Triton: the k-th highest, then what is above it, packed.

A short row is one program's, which keeps its keys in registers: 32 halvings fix the
bits of the k-th highest. A long row is shared out in parts over all of the GPU: four
passes count the parts' keys by digits of 8 bits, of those that share the k-th highest's
digits so far, so that the counts also say how much each part will choose. In both,
prefix sums give every chosen index its place. XLA sorts the k found if asked to.

Bytes: the scores of a short row once, of a long one five times.
"""

import functools
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax

from pallas_kernels.shared import triton_call

RESIDENT = 1 << 14  # scores of a row in registers: 32 in each of 512 threads
PART = 1 << 13  # scores of a longer row that a program takes; both below 2**15
WARP_SCORES = 512  # scores a warp
DIGIT_BITS = 8


def unsupported(scores, count, *, k, order) -> str | None:
    """Says why the kernel cannot run on such arrays, or None."""
    del count, k, order
    if scores.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"scores are {scores.dtype}, the most precise it knows is float32"
    if not scores.size or scores.shape[-1] >= 1 << 31:
        return f"scores {scores.shape} must be from 1 to 2**31 - 1 a row"
    return triton_call.unsupported()


def top_k(scores, count, *, k, order, interpret=False):
    """See :func:`pallas_kernels.topk.top_k`."""
    *batch, length = scores.shape
    num_rows = math.prod(batch)
    if count is None:
        count = jnp.full(batch, k, jnp.int32)
    count = jnp.clip(count.astype(jnp.int32), 0, k).reshape(num_rows)
    is_short = triton.next_power_of_2(length) <= RESIDENT
    find = _of_short_rows if is_short else _of_long_rows
    # The interpreter's bfloat16 is an integer; widening is exact.
    lines = scores.reshape(num_rows, length)
    lines = lines.astype(jnp.float32) if interpret else lines
    indices = find(lines, count, k, interpret).reshape(*batch, k)
    values = jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=-1)
    values = jnp.where(indices < 0, -jnp.inf, values)
    if order == "score":
        # As the indices rise, the lower one stays first among equals.
        values, place = lax.top_k(values, k)
        indices = jnp.take_along_axis(indices, place, axis=-1)
    return values, indices


def _of_short_rows(scores, count, k, interpret):
    num_rows, length = scores.shape
    block = triton.next_power_of_2(length)
    return triton_call.call(
        _top_k_of_row,
        scores,
        count,
        out_shape=jax.ShapeDtypeStruct((num_rows, k), jnp.int32),
        grid=(num_rows,),
        interpret=interpret,
        num_warps=min(max(block // WARP_SCORES, 1), 16),
        LENGTH=length,
        K=k,
        BLOCK=block,
        BLOCK_K=triton.next_power_of_2(k),
    )


def _of_long_rows(scores, count, k, interpret):
    num_rows, length = scores.shape
    parts = triton.cdiv(length, PART)
    call = functools.partial(
        triton_call.call,
        grid=(num_rows * parts,),
        interpret=interpret,
        num_warps=max(PART // WARP_SCORES, 1),
        LENGTH=length,
        PARTS=parts,
        BLOCK=PART,
    )
    bins = 1 << DIGIT_BITS
    digit = jnp.arange(bins, dtype=jnp.int32)
    threshold = jnp.zeros(num_rows, jnp.uint32)
    above = jnp.zeros((num_rows, parts), jnp.int32)
    equal = above
    wanted: Any = None
    remaining: Any = None  # of those wanted, below the digits found so far
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        # (rows, parts, bins): keys of the digits found so far, by their next one.
        histogram = call(
            _top_k_digits,
            scores,
            threshold,
            jnp.full(1, shift, jnp.uint32),  # no constant: one kernel for all passes
            out_shape=jax.ShapeDtypeStruct((num_rows, parts, bins), jnp.int32),
            BITS=DIGIT_BITS,
        )
        at_least = lax.cumsum(histogram.sum(1), axis=1, reverse=True)
        if wanted is None:
            wanted = remaining = jnp.minimum(count, at_least[:, 0])
        # The highest digit that leaves enough at or above it.
        is_enough = (at_least >= remaining[:, None]) & (digit > 0)
        highest = is_enough.sum(1, dtype=jnp.int32)[:, None]
        remaining -= jnp.where(digit == highest + 1, at_least, 0).sum(1)
        above += jnp.where(digit > highest[:, None], histogram, 0).sum(2)
        equal = jnp.where(digit == highest[:, None], histogram, 0).sum(2)
        threshold |= highest[:, 0].astype(jnp.uint32) << shift
    indices = call(
        _top_k_pack,
        scores,
        threshold,
        remaining,
        lax.cumsum(above, axis=1) - above,
        lax.cumsum(equal, axis=1) - equal,
        out_shape=jax.ShapeDtypeStruct((num_rows, k), jnp.int32),
        K=k,
    )
    # Nobody wrote past what was wanted.
    is_chosen = jnp.arange(k, dtype=jnp.int32) < wanted[:, None]
    return jnp.where(is_chosen, indices, -1)


@triton.jit
@no_type_check
def _keys(row_ptr, first, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Unsigned integers in the order of the scores; 0 is never chosen."""
    place = first + tl.arange(0, BLOCK)
    scores = tl.load(row_ptr + place, mask=place < LENGTH, other=float("-inf"))
    bits = scores.to(tl.float32).to(tl.uint32, bitcast=True)
    keys = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(keys <= 0x007FFFFF, 0, keys)  # -inf, and NaN of its sign


@triton.jit
@no_type_check
def _pack(out_ptr, keys, threshold, equals, above, equal, first, BLOCK: tl.constexpr):
    """Writes the indices of the keys above the threshold and of some at it.

    `equals` of the row's keys at the threshold are wanted; `above` and `equal` are how
    many lie above and at it before this block.
    """
    # Two counts below 2**15 in a number.
    is_above, is_equal = keys > threshold, keys == threshold
    counts = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
    rank = equal + (counts >> 16)
    is_chosen = is_above | (is_equal & (rank <= equals))
    place = above + (counts & 0xFFFF) + tl.minimum(rank, equals) - 1
    tl.store(out_ptr + place, first + tl.arange(0, BLOCK), mask=is_chosen)


@triton.jit
@no_type_check
def _top_k_of_row(
    # in
    scores_ptr,  # (rows, N)
    count_ptr,  # (rows,) i32
    # out
    out_ptr,  # (rows, K) i32
    LENGTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    keys = _keys(scores_ptr + row * LENGTH, 0, LENGTH, BLOCK)
    open_keys = tl.sum((keys > 0).to(tl.int32), 0)
    wanted = tl.minimum(tl.load(count_ptr + row), open_keys)
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        is_enough = tl.sum((keys >= higher).to(tl.int32), 0) >= wanted
        threshold = tl.where(is_enough, higher, threshold)
        bit = bit >> 1
    equals = wanted - tl.sum((keys > threshold).to(tl.int32), 0)
    _pack(out_ptr + row * K, keys, threshold, equals, 0, 0, 0, BLOCK)
    place = tl.arange(0, BLOCK_K)
    tl.store(out_ptr + row * K + place, -1, mask=(place >= wanted) & (place < K))


@triton.jit
@no_type_check
def _top_k_digits(
    # in
    scores_ptr,  # (rows, N)
    threshold_ptr,  # (rows,) u32: digits found so far, then zeros
    shift_ptr,  # (1,) u32: of the digit to count
    # out
    out_ptr,  # (rows, parts, 2 ** BITS) i32
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    row_ptr = scores_ptr + row.to(tl.int64) * LENGTH
    keys = _keys(row_ptr, part * BLOCK, LENGTH, BLOCK)
    shift = tl.load(shift_ptr)
    # In two steps: a shift by 32 is undefined.
    differs = ((keys ^ tl.load(threshold_ptr + row)) >> shift) >> BITS
    digits = ((keys >> shift) & ((1 << BITS) - 1)).to(tl.int32)
    histogram = tl.histogram(digits, 1 << BITS, mask=(keys > 0) & (differs == 0))
    first = tl.program_id(0).to(tl.int64) << BITS
    tl.store(out_ptr + first + tl.arange(0, 1 << BITS), histogram)


@triton.jit
@no_type_check
def _top_k_pack(
    # in
    scores_ptr,  # (rows, N)
    threshold_ptr,  # (rows,) u32
    equals_ptr,  # (rows,) i32
    above_ptr,  # (rows, parts) i32
    equal_ptr,  # (rows, parts) i32
    # out
    out_ptr,  # (rows, K) i32
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    row_ptr = scores_ptr + row.to(tl.int64) * LENGTH
    _pack(
        out_ptr + row.to(tl.int64) * K,
        _keys(row_ptr, part * BLOCK, LENGTH, BLOCK),
        tl.load(threshold_ptr + row),
        tl.load(equals_ptr + row),
        tl.load(above_ptr + tl.program_id(0)),
        tl.load(equal_ptr + tl.program_id(0)),
        part * BLOCK,
        BLOCK,
    )
