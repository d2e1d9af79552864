"""Rows of a cache as Triton kernels read them: floats, or codes that become floats.

Codes and scales are loaded as they are stored, and multiplied out in registers: what is
read from memory is what is kept, and no row of floats is ever written.
"""

from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shared import triton_call
from pallas_kernels.shared.quantized import Quantized

TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


class Part(NamedTuple):
    """The place of keys or of values in the rows of a buffer: sizes, for a kernel."""

    width: int  # elements of a whole row: floats, or bytes of codes
    first: int  # of these
    bits: int  # of a code; 0 where there are floats
    group: int  # numbers that share a scale
    scales: int  # of a whole row, offsets among them
    first_scale: int
    largest: int = 0  # numbers beyond are read as it; 0 where the dtype holds them all


def parts_of(rows: Any, head_dim: int) -> list[Part]:
    """Returns the places of the vectors of `head_dim` numbers that a row is made of."""
    if not isinstance(rows, Quantized):
        width = rows.shape[-1]
        return [Part(width, x, 0, head_dim, 0, 0) for x in range(0, width, head_dim)]
    parts, first, first_scale = [], 0, 0
    width, scales = rows.codes.shape[-1], rows.scales.shape[-1]
    largest = int(jnp.finfo(rows.dtype).max) if rows.dtype == jnp.float16 else 0
    for part in rows.layout.parts:
        place = Part(width, first, part.bits, part.group, scales, first_scale, largest)
        parts.append(place)
        first, first_scale = first + part.codes, first_scale + part.scales
    return parts


def arrays_of(rows: Any) -> tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]:
    """Returns what a kernel reads rows from: elements, and scales or anything."""
    if isinstance(rows, Quantized):
        return rows.codes, rows.scales
    return rows, rows


def unsupported(q: Any, *rows: Any) -> str | None:
    """Says why the kernels cannot, from shapes, dtypes and device; None if they can."""
    head_dim, dtypes = q.shape[3], {x.dtype.name for x in (q, *rows)}
    if len(dtypes) > 1 or not dtypes <= set(TYPES):
        named = ", ".join(str(x.dtype) for x in (q, *rows))
        return f"dtypes {named} must be one of 16 or 32 bits"
    if head_dim not in (16, 32, 64, 128, 256):
        return f"D={head_dim} must be a power of two from 16 to 256"
    return triton_call.unsupported()


def static(q: Any, tokens: int, *rows: Any, interpret: Any) -> dict[str, Any]:
    """Returns what every kernel takes that reads `tokens` rows of a head."""
    keys, values = [part for one in rows for part in parts_of(one, q.shape[3])]
    widest = max(keys.width, values.width)
    return {
        # Products of float32 are sums in registers.
        "num_warps": 8 if q.dtype == jnp.float32 else 4,
        "HEAD_DIM": q.shape[3],
        "STEPS": q.shape[2],
        "KEYS": tuple(keys),
        "VALUES": tuple(values),
        # Where a head's elements exceed 32 bits, its offsets do.
        "OFFSET": tl.int64 if tokens * widest >= 1 << 31 else tl.int32,
        # The interpreter multiplies bfloat16 as the integers that hold it.
        "OPERAND": tl.float32 if interpret else TYPES[q.dtype.name],
        "interpret": interpret,
    }


@triton.jit
@no_type_check
def of_head(rows_ptr, scales_ptr, head, TOKENS: tl.constexpr, PART: tl.constexpr):
    """The rows of a head of so many tokens, and their scales."""
    WIDTH: tl.constexpr = PART[0]
    SCALES: tl.constexpr = PART[4]
    return rows_ptr + head * (TOKENS * WIDTH), scales_ptr + head * (TOKENS * SCALES)


@triton.jit
@no_type_check
def vectors(
    rows_ptr,  # (S, width), of a head
    scales_ptr,  # (S, scales) u16, of a head; anything where rows are floats
    position,
    is_needed,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """`(BLOCK_TOKENS, D)` at these positions, 0 where not needed."""
    WIDTH: tl.constexpr = PART[0]
    FIRST: tl.constexpr = PART[1]
    BITS: tl.constexpr = PART[2]
    GROUP: tl.constexpr = PART[3]
    SCALES: tl.constexpr = PART[4]
    FIRST_SCALE: tl.constexpr = PART[5]
    LARGEST: tl.constexpr = PART[6]
    position = position.to(OFFSET)
    is_row = is_needed[:, None]
    rows_ptr += FIRST
    scales_ptr += FIRST_SCALE
    if BITS == 4:
        GROUPS: tl.constexpr = HEAD_DIM // GROUP
        TOKENS: tl.constexpr = position.shape[0]
        place = position[:, None] * WIDTH + tl.arange(0, HEAD_DIM // 2)
        packed = tl.load(rows_ptr + place, mask=is_row, other=0)
        # The first half of a row's numbers is in the low halves of the bytes.
        codes = tl.permute(tl.join(packed & 15, packed >> 4), (0, 2, 1))
        codes = tl.reshape(codes, (TOKENS, GROUPS, GROUP)).to(tl.float32)
        place = position[:, None] * SCALES + tl.arange(0, GROUPS)
        steps = tl.load(scales_ptr + place, mask=is_row, other=0)
        offsets = tl.load(scales_ptr + GROUPS + place, mask=is_row, other=0)
        found = codes * _wide(steps)[:, :, None] - _wide(offsets)[:, :, None]
        found = tl.reshape(found, (TOKENS, HEAD_DIM))
    else:
        place = position[:, None] * WIDTH + tl.arange(0, HEAD_DIM)
        found = tl.load(rows_ptr + place, mask=is_row, other=0)
        if BITS == 8:
            place = position * SCALES
            scale = tl.load(scales_ptr + place, mask=is_needed, other=0)
            found = found.to(tl.int8, bitcast=True).to(tl.float32)
            found *= _wide(scale)[:, None]
    if LARGEST:  # a scale is rounded up, and its largest code may be beyond
        found = tl.minimum(tl.maximum(found, -LARGEST), LARGEST)
    return found


@triton.jit
@no_type_check
def _wide(scales):
    """Scales in float32, of which their bits are the upper halves."""
    return (scales.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
