"""`page_scores` on NVIDIA GPUs in Triton: products with the statistics, read once.

Grid: KV heads of all rows x blocks of pages. A program takes all query heads of a KV
head, so that they share one read, and reduces over them before it writes; many programs
on a multiprocessor keep many reads on their way.

Bytes per program: `2 * BLOCK_BYTES` of statistics, and 4 for each page and score.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.page_scores.reference import squares
from pallas_kernels.shared import triton_call

BLOCK_BYTES = 16 << 10  # of each of the two statistics
MAX_GROUP = 64  # query heads of a program
_TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


def unsupported(q, first, second, **static) -> str | None:
    """Says why the kernels cannot, from shapes, dtypes and device; None if they can."""
    del static
    dtypes = {x.dtype.name for x in (q, first, second)}
    heads, num_pages, head_dim = first.shape[1:]
    if len(dtypes) > 1 or not dtypes <= set(_TYPES):
        names = ", ".join(sorted(dtypes))
        return f"dtypes {names} must be all alike, of 16 or 32 bits"
    if head_dim not in (16, 32, 64, 128, 256):
        return f"D={head_dim} must be a power of two from 16 to 256"
    if q.shape[1] > MAX_GROUP * heads:
        return f"{q.shape[1]} query heads must be at most {MAX_GROUP} a KV head"
    if not q.size or not 1 <= num_pages * head_dim < 1 << 31:
        return f"q {q.shape} and pages {first.shape} must be from 1 to 2**31 - 1 a head"
    return triton_call.unsupported()


def page_bounds(q, page_min, page_max, *, group_reduce, interpret=False):
    """See :func:`pallas_kernels.page_scores.page_bounds`."""
    heads = q.shape[1] if group_reduce == "none" else page_min.shape[1]
    shape = q.shape[0], heads, page_min.shape[2]
    return _over_pages(
        _page_bounds,
        (q, page_min, page_max),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        interpret,
        REDUCE=group_reduce,
    )


def page_moments(q, page_mean, page_variance, *, interpret=False):
    """See :func:`pallas_kernels.page_scores.page_moments`."""
    square, *rest = squares(q)
    shape = *q.shape[:2], page_mean.shape[2]
    return _over_pages(
        _page_moments,
        (q, square, *(rest or [square]), page_mean, page_variance),
        (jax.ShapeDtypeStruct(shape, jnp.float32),) * 2,
        interpret,
        HAS_REST=bool(rest),
    )


def _over_pages(kernel, arrays, out_shape, interpret, **static):
    q, statistics = arrays[0], arrays[-1]
    batch, heads, num_pages, head_dim = statistics.shape
    group = q.shape[1] // heads
    block = max(BLOCK_BYTES // (head_dim * statistics.dtype.itemsize), 16)
    block = min(block, max(triton.next_power_of_2(num_pages), 16))
    return triton_call.call(
        kernel,
        *arrays,
        out_shape=out_shape,
        grid=(batch * heads, triton.cdiv(num_pages, block)),
        interpret=interpret,
        # Products of float32 are sums in registers.
        num_warps=8 if q.dtype == jnp.float32 else 4,
        **static,
        GROUP=group,
        ROWS=max(triton.next_power_of_2(group), 16),  # of a product
        NUM_PAGES=num_pages,
        HEAD_DIM=head_dim,
        BLOCK=block,
        # The interpreter multiplies bfloat16 as the integers that hold it.
        OPERAND=tl.float32 if interpret else _TYPES[q.dtype.name],
    )


@triton.jit
@no_type_check
def _heads(
    ptr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Rows of the query heads of this program's KV head, and of zeros."""
    row = tl.arange(0, ROWS)[:, None]
    ptr += tl.program_id(0).to(tl.int64) * (GROUP * HEAD_DIM)
    place = row * HEAD_DIM + tl.arange(0, HEAD_DIM)
    return tl.load(ptr + place, mask=row < GROUP, other=0.0).to(OPERAND)


@triton.jit
@no_type_check
def _statistics(
    ptr,
    NUM_PAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """`(HEAD_DIM, BLOCK)` of this program's pages."""
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    ptr += tl.program_id(0).to(tl.int64) * (NUM_PAGES * HEAD_DIM)
    place = page * HEAD_DIM + tl.arange(0, HEAD_DIM)
    return tl.trans(tl.load(ptr + place, mask=page < NUM_PAGES, other=0.0).to(OPERAND))


@triton.jit
@no_type_check
def _store(
    ptr,
    scores,  # (ROWS, BLOCK), of which GROUP rows count
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ptr += tl.program_id(0).to(tl.int64) * GROUP * NUM_PAGES
    place = row.to(tl.int64) * NUM_PAGES + page
    tl.store(ptr + place, scores, mask=(row < GROUP) & (page < NUM_PAGES))


@triton.jit
@no_type_check
def _page_bounds(
    # in
    q_ptr,  # (B * Hkv, G, D)
    min_ptr,  # (B * Hkv, NP, D)
    max_ptr,  # (B * Hkv, NP, D)
    # out
    out_ptr,  # (B * Hkv, G, NP) f32; reduced: (B * Hkv, NP)
    REDUCE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    q = _heads(q_ptr, GROUP, ROWS, HEAD_DIM, OPERAND)
    high = _statistics(max_ptr, NUM_PAGES, HEAD_DIM, BLOCK, OPERAND)
    low = _statistics(min_ptr, NUM_PAGES, HEAD_DIM, BLOCK, OPERAND)
    # sum_d max(q_d min_d, q_d max_d): a positive q_d takes the max, a negative the min.
    zero = tl.zeros_like(q)
    bounds = tl.dot(tl.where(q < 0, zero, q), high, input_precision="ieee")
    bounds += tl.dot(tl.where(q < 0, q, zero), low, input_precision="ieee")
    if REDUCE == "none":
        _store(out_ptr, bounds, GROUP, ROWS, NUM_PAGES, BLOCK)
    else:
        is_head = tl.arange(0, ROWS)[:, None] < GROUP
        if REDUCE == "mean":
            reduced = tl.sum(tl.where(is_head, bounds, 0.0), 0) / GROUP
        else:
            reduced = tl.max(tl.where(is_head, bounds, float("-inf")), 0)
        _store(out_ptr, reduced[None, :], 1, 1, NUM_PAGES, BLOCK)


@triton.jit
@no_type_check
def _page_moments(
    # in
    q_ptr,  # (B * Hkv, G, D)
    square_ptr,  # (B * Hkv, G, D): `squares` of q, the first term
    rest_ptr,  # (B * Hkv, G, D): the second, if there is one
    mean_ptr,  # (B * Hkv, NP, D)
    variance_ptr,  # (B * Hkv, NP, D)
    # out
    out_mean_ptr,  # (B * Hkv, G, NP) f32
    out_variance_ptr,  # (B * Hkv, G, NP) f32
    HAS_REST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    q = _heads(q_ptr, GROUP, ROWS, HEAD_DIM, OPERAND)
    page_mean = _statistics(mean_ptr, NUM_PAGES, HEAD_DIM, BLOCK, OPERAND)
    page_variance = _statistics(variance_ptr, NUM_PAGES, HEAD_DIM, BLOCK, OPERAND)
    mean = tl.dot(q, page_mean, input_precision="ieee")
    _store(out_mean_ptr, mean, GROUP, ROWS, NUM_PAGES, BLOCK)
    square = _heads(square_ptr, GROUP, ROWS, HEAD_DIM, OPERAND)
    variance = tl.dot(square, page_variance, input_precision="ieee")
    if HAS_REST:
        rest = _heads(rest_ptr, GROUP, ROWS, HEAD_DIM, OPERAND)
        variance += tl.dot(rest, page_variance, input_precision="ieee")
    _store(out_variance_ptr, variance, GROUP, ROWS, NUM_PAGES, BLOCK)
