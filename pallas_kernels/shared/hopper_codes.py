"""Codes of quantised rows as operands of matrix products on Hopper GPUs.

A product reads its second operand from shared memory alone. Codes arrive there as they
are stored; a block of them becomes floats in registers, which are written beside, where
the product reads them: no float leaves the multiprocessor.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.shared import hopper
from pallas_kernels.shared.hopper import BLOCK, plgpu
from pallas_kernels.shared.quantized import Format, Quantized, narrowed

TILE = 64  # numbers of a row that are written at once
LEAST_GROUP = 32  # numbers that share a scale


def unsupported(*rows: Any) -> str | None:
    """Says why codes cannot be read, from their formats; None if they can."""
    for part in (x for one in rows for x in formats_of(one)):
        if part.bits == 4 and part.size % (2 * TILE):
            return f"D={part.size} must be a multiple of {2 * TILE} for 4 bits"
        if part.group % LEAST_GROUP:
            return f"groups of {part.group} must be multiples of {LEAST_GROUP}"
    return None


def formats_of(rows: Any) -> tuple[Format, ...]:
    """Returns the formats of the parts of a row; none, of floats."""
    return rows.layout.parts if isinstance(rows, Quantized) else ()


def ring(stages: int, width: int) -> Any:
    """Shared memory of blocks of codes, whose lines are in tiles of 64 bytes."""
    return plgpu.SMEM(
        (stages, BLOCK, width),
        jnp.uint8,
        transforms=(plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(TILE)),
    )


def load_scales(part: Format, scales: Any) -> list[jax.Array]:
    """Reads scales `(BLOCK, C)` of a block's rows from memory: `hopper.column`s."""
    read = functools.partial(plgpu.load, layout=hopper.column(), optimized=False)
    bits = [read(scales.at[:, i]).astype(jnp.uint32) for i in range(part.scales)]
    return [lax.bitcast_convert_type(x << 16, jnp.float32) for x in bits]


def write(part: Format, codes: Any, scales: Sequence[jax.Array], into: Any) -> None:
    """Writes a block's numbers `(BLOCK, D)` where a matrix product reads them.

    Args:
        part: how they are stored.
        codes: `(BLOCK, bytes)` of a `ring`.
        scales: as :func:`load_scales` returns them.
        into: a `hopper.operand`.
    """
    for byte in range(0, part.codes, TILE):
        tile = codes.at[:, pl.ds(byte, TILE)]
        packed = plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if part.bits == 8:
            found = _floats(packed)
            found = jnp.where(found > 127.0, found - 256.0, found)
            tiles = {byte: found * hopper.across(scales[0], TILE)}
        else:
            # The first half of a row's numbers is in the low halves of the bytes. The
            # others are shifted as floats: bytes have bitwise operations alone.
            halves = {
                byte: _floats(packed & 15),
                part.codes + byte: _floats(packed & 240) / 16,
            }
            groups = part.size // part.group
            tiles = {
                first: x * _by_number(scales[:groups], first, part.group)
                - _by_number(scales[groups:], first, part.group)
                for first, x in halves.items()
            }
        for first, numbers in tiles.items():
            into[:, pl.ds(first, TILE)] = narrowed(numbers, into.dtype)


def _floats(codes):
    # Below 256, what bfloat16 holds; of 16 bits, registers are those of a product.
    return plgpu.layout_cast(codes.astype(jnp.bfloat16), hopper.tile()).astype(
        jnp.float32
    )


def _by_number(scales, first, group):
    """The scale of each of the `TILE` numbers from one on, `(BLOCK, TILE)`."""
    own = hopper.across(scales[first // group], TILE)
    if group >= TILE:
        return own
    number = plgpu.broadcasted_iota(jnp.int32, (BLOCK, TILE), 1, layout=hopper.tile())
    return jnp.where(
        number < group, own, hopper.across(scales[first // group + 1], TILE)
    )
