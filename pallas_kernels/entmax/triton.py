"""The threshold of entmax on NVIDIA GPUs in Triton: a program per row of scores.

A short row stays in registers; a long one is read again for every step, from a cache
that holds it more likely than not. The method is that of :mod:`.equations`.

Bytes: the scores once, or once for every step.
"""

import functools
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.entmax import equations
from pallas_kernels.shared import triton_call

RESIDENT = 1 << 14  # scores of a row in registers: 32 in each of 512 threads
CHUNK = 1 << 13  # scores of a longer row read together
WARP_SCORES = 512  # scores a warp


def unsupported(scores, *, alpha) -> str | None:
    """Says why the kernel cannot run on such scores, or None."""
    del alpha
    if scores.dtype != jnp.float32:
        return f"scores are {scores.dtype}, it knows float32"
    if not scores.size or scores.shape[-1] >= 1 << 31:
        return f"scores {scores.shape} must be from 1 to 2**31 - 1 a row"
    return triton_call.unsupported()


def solve(scores, *, alpha, interpret=False):
    """See :func:`pallas_kernels.entmax.solve`."""
    *batch, length = scores.shape
    chunk = triton.next_power_of_2(length)
    chunk = chunk if chunk <= RESIDENT else CHUNK
    one = jax.ShapeDtypeStruct((*batch, 1), jnp.float32)
    call = functools.partial(
        triton_call.call,
        grid=(math.prod(batch),),
        interpret=interpret,
        num_warps=min(max(chunk // WARP_SCORES, 1), 16),
    )
    top, tau = call(
        _entmax_solve,
        scores,
        out_shape=(one, one),
        **static(alpha),
        NEWTON=alpha <= 2,
        STEPS=equations.MAX_STEPS if alpha <= 2 else 30,
        tolerance=16 * float(jnp.finfo(jnp.float32).eps),
        width=1 - length ** (1 - alpha),
        LENGTH=length,
        CHUNK=chunk,
    )
    return equations.Threshold(top, tau)


def static(alpha: float) -> dict:
    """Constants of alpha for `excess_of` and `powers`."""
    exponent = 1 / (alpha - 1) - 1
    is_whole = exponent >= 0 and abs(exponent - round(exponent)) < 1e-9
    whole = round(exponent) if is_whole else -1
    return {"scale": alpha - 1, "exponent": exponent, "WHOLE": whole}


@triton.jit
@no_type_check
def excess_of(scores, top, tau, scale: tl.constexpr):
    """The excess of `equations.shifted` over tau, or 0."""
    z = tl.where(scores == top, 0.0, scale * (scores - top))
    return tl.maximum(z - tau, 0.0)


@triton.jit
@no_type_check
def powers(excess, exponent: tl.constexpr, WHOLE: tl.constexpr):
    """`equations.powers`."""
    if WHOLE == 0:
        slope = tl.where(excess > 0, 1.0, 0.0)
    elif WHOLE > 0:
        slope = excess
        for _ in tl.static_range(WHOLE - 1):
            slope *= excess
    else:
        log = tl.log(tl.where(excess > 0, excess, 1.0))
        slope = tl.where(excess > 0, tl.exp(exponent * log), 0.0)
    return slope * excess, slope


@triton.jit
@no_type_check
def _scores(row_ptr, i, LENGTH: tl.constexpr, CHUNK: tl.constexpr):
    place = i * CHUNK + tl.arange(0, CHUNK)
    return tl.load(row_ptr + place, mask=place < LENGTH, other=float("-inf"))


@triton.jit
@no_type_check
def _sums(
    held,
    row_ptr,
    top,
    tau,
    scale: tl.constexpr,
    exponent: tl.constexpr,
    WHOLE: tl.constexpr,
    LENGTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`equations.Sums` of the scores held, or else of the row."""
    excess = excess_of(held, top, tau, scale)
    totals, slopes = powers(excess, exponent, WHOLE)
    for i in range(1, tl.cdiv(LENGTH, CHUNK)):
        scores = _scores(row_ptr, i, LENGTH, CHUNK)
        excess = excess_of(scores, top, tau, scale)
        total, slope = powers(excess, exponent, WHOLE)
        totals += total
        slopes += slope
    return tl.sum(totals, 0), tl.sum(slopes, 0)


@triton.jit
@no_type_check
def _entmax_solve(
    # in
    scores_ptr,  # (rows, N) f32
    # out
    top_ptr,  # (rows,) f32
    tau_ptr,  # (rows,) f32
    scale: tl.constexpr,  # alpha - 1
    exponent: tl.constexpr,  # of the slope: 1 / (alpha - 1) - 1
    WHOLE: tl.constexpr,  # the same where it is a whole number, else -1
    NEWTON: tl.constexpr,
    STEPS: tl.constexpr,
    tolerance: tl.constexpr,
    width: tl.constexpr,  # of the bracket that is halved
    LENGTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + row * LENGTH
    held = _scores(row_ptr, 0, LENGTH, CHUNK)
    tops = held
    is_nan = held != held
    for i in range(1, tl.cdiv(LENGTH, CHUNK)):
        scores = _scores(row_ptr, i, LENGTH, CHUNK)
        tops = tl.maximum(tops, scores)
        is_nan |= scores != scores
    top = tl.max(tl.where(is_nan, float("-inf"), tops), 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    tau = tl.full((), -1.0, tl.float32)
    if NEWTON:
        step = 0
        excess = tl.full((), float("inf"), tl.float32)
        while (step < STEPS) & (excess > tolerance):
            total, slope = _sums(
                held, row_ptr, top, tau, scale, exponent, WHOLE, LENGTH, CHUNK
            )
            # total ** (2 - alpha), which is positive wherever it counts.
            shrunk = tl.exp((1 - scale) * tl.log(tl.where(total == 0, 1.0, total)))
            move = (total - shrunk) / tl.where(slope == 0, 1.0, slope)
            tau = tl.where(total > 1, tau + move, tau)
            excess = total - 1
            step += 1
    else:
        bracket = tl.full((), width, tl.float32)
        for _ in range(STEPS):
            bracket = bracket / 2
            total, _slope = _sums(
                held, row_ptr, top, tau + bracket, scale, exponent, WHOLE, LENGTH, CHUNK
            )
            tau = tl.where(total >= 1, tau + bracket, tau)
    is_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    tl.store(top_ptr + row, tl.where(is_nan, float("nan"), top))
    tl.store(tau_ptr + row, tau)
