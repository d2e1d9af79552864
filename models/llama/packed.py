"""Matrices as integers with scales, of 8 or 4 bits, and the products with them.

A packed matrix stands in the tree of parameters where the float `kernel` stood. It is
made once, while a checkpoint is read; a product makes floats of it a part at a time.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Int8, Shaped, UInt8

from kvjax.interface import Params
from models.family import Packing

GROUP = 32  # inputs that share a scale
# With more rows than these a product takes longer than the floats it is made of.
_FEW_ROWS = 32
# Outputs of a group that are floats at once: 256 KB, which a core's cache holds.
_CHUNK = 2048


class Format(NamedTuple):
    """The way in which a file stores a matrix in integers."""

    bits: Literal[8, 4]  # of a code, as it is kept
    scales: str  # dtype of scales
    has_lowest: bool

    @property
    def codes(self) -> str:
        """The dtype of `values`."""
        return "int8" if self.bits == 8 and not self.has_lowest else "uint8"


Kind = Format | Literal["int8", "int4"] | None  # what a matrix is kept as


class Blocks(NamedTuple):
    """A matrix as a file stores it, on the host, outputs first: see :class:`Packed`."""

    values: Any  # (O, I * bits / 8)
    scales: Any  # (O, I / GROUP)
    lowest: Any  # (O, I / GROUP), or None

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes of the matrix: outputs, inputs."""
        return self.scales.shape[0], GROUP * self.scales.shape[1]


class Packed(NamedTuple):
    """A matrix whose groups are `lowest + scale * n`, n in 0 .. 255 or 0 .. 15.

    In 4 bits a byte holds two inputs of one group, half a group apart: the first in its
    low bits. Without `lowest` n is from -128 or from -8 on; what a byte holds of the
    latter is n + 8. Scales made here are bfloat16, which overflows where float32 does;
    those that a file had are float16 or float32.
    """

    values: UInt8[Array, "I*bits/8 O"] | Int8[Array, "I O"]
    scales: Float[Array, "I/GROUP O"]
    lowest: Float[Array, "I/GROUP O"] | None

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes of the matrix: inputs, outputs."""
        return GROUP * self.scales.shape[0], self.scales.shape[1]

    @property
    def size(self) -> int:
        """The number of weights; scales are none."""
        return self.shape[0] * self.shape[1]

    @property
    def bits(self) -> int:
        """The bits that a code takes."""
        return 8 if self.values.shape[0] == self.shape[0] else 4

    @property
    def is_stored(self) -> bool:
        """Says if codes and scales are those of a file."""
        return self.scales.dtype != jnp.bfloat16

    @property
    def dtype(self) -> str:
        """The name of the format."""
        return f"{'stored ' * self.is_stored}int{self.bits}"


def refuse(params: Params, purpose: str) -> None:
    """Raises ValueError if any matrix is packed: `purpose` needs floats."""
    found = _packed(params)
    if found:
        weights = "stored" if found[0].is_stored else found[0].dtype
        raise ValueError(
            f"{weights=} cannot be {purpose}: load the model with weights=None."
        )


def notes(params: Params) -> tuple[str, ...]:
    """Says which matrices are not as the file stores them, if others are."""
    found = _packed(params)
    stored = sum(matrix.is_stored for matrix in found)
    anew = len(found) - stored
    if not stored or not anew:
        return ()
    return (
        f"{anew} of {len(found)} matrices in integers are rounded anew to int8: their "
        "types in the file are more than codes with scales of 32 inputs.",
    )


def _packed(params: Params) -> list[Packed]:
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Packed))
    return [node for node in nodes if isinstance(node, Packed)]


def check_parts(inputs: int, place: Any, name: str) -> None:
    """Raises ValueError if devices would have parts of a group of inputs."""
    if not isinstance(place, jax.sharding.NamedSharding) or not place.spec:
        return
    axes, groups = place.spec[0] or (), inputs // GROUP
    parts = math.prod(place.mesh.shape[axis] for axis in axes)
    if groups % parts:
        raise ValueError(
            f"tensor={parts} does not divide the {groups} groups of {GROUP} inputs of "
            f"{name}: give fewer devices, or leave `weights` out."
        )


def check_inputs(inputs: int, weights: Packing | Format, name: str) -> None:
    """Raises ValueError unless groups divide the inputs of a matrix."""
    if weights is not None and inputs % GROUP:
        raise ValueError(
            f"{name} has {inputs} inputs, which groups of {GROUP} do not divide: "
            f"leave {weights=} out."
        )


def keep(blocks: Blocks) -> Packed:
    """Returns the matrix that a file stores so, inputs first; nothing is rounded."""
    lowest = None if blocks.lowest is None else blocks.lowest.T
    return Packed(blocks.values.T, blocks.scales.T, lowest)


def pack(matrix: Float[Array, "I O"], weights: Literal["int8", "int4"]) -> Packed:
    """Rounds a matrix to the nearest that the format can hold.

    A group of equal numbers has scale 0, and is its lowest.
    """
    most = {"int8": 255, "int4": 15}[weights]
    inputs, outputs = matrix.shape
    groups = matrix.astype(jnp.float32).reshape(inputs // GROUP, GROUP, outputs)
    # Rounded first: what is stored is what the integers are counted by. Differences are
    # taken last: the range of the largest floats is none.
    lowest = groups.min(1).astype(jnp.bfloat16)
    least = lowest.astype(jnp.float32)
    scales = (groups.max(1) / most - least / most).astype(jnp.bfloat16)
    scales = jnp.maximum(scales, 0)  # all may be below a lowest that was rounded
    inverse = _inverse(scales)
    steps = groups * inverse[:, None] - (least * inverse)[:, None]
    digits = jnp.clip(jnp.round(steps), 0, most).astype(jnp.uint8)
    if weights == "int4":
        low, high = jnp.split(digits, 2, axis=1)
        digits = low | high << 4
    return Packed(digits.reshape(-1, outputs), scales, lowest)


def _inverse(scales: BFloat16[Array, "N O"]) -> Float32[Array, "N O"]:
    # Of 0, 0; and never so large that it times a weight is infinite.
    wide, tiny = scales.astype(jnp.float32), jnp.finfo(jnp.float32).tiny
    return jnp.where(wide > tiny, 1 / jnp.maximum(wide, tiny), 0)


def shapes(
    target: jax.ShapeDtypeStruct, kind: Literal["int8", "int4"] | Format
) -> Packed:
    """Returns `jax.ShapeDtypeStruct`s of a packed matrix."""
    if not isinstance(kind, Format):
        return jax.eval_shape(lambda x: pack(x, kind), target)
    inputs, outputs = target.shape

    def kept():
        scales = jnp.zeros((inputs // GROUP, outputs), kind.scales)
        values = jnp.zeros((inputs * kind.bits // 8, outputs), kind.codes)
        return Packed(values, scales, scales if kind.has_lowest else None)

    return jax.eval_shape(kept)


def times(x: Float[Array, "B I"], matrix: Packed) -> Float32[Array, "B O"]:
    """Multiplies rows by a packed matrix, accumulated in float32."""
    if x.shape[0] > _FEW_ROWS:
        return _whole(x, matrix)
    # XLA's CPU backend takes ten times as long for one row times a converted matrix as
    # for one times floats; not if a group is converted at a time, into a core's cache.
    return lax.platform_dependent(x, matrix, cpu=_by_groups, default=_whole)


def _whole(x: Float[Array, "B I"], matrix: Packed) -> Float32[Array, "B O"]:
    groups, outputs = matrix.scales.shape
    scales = matrix.scales.astype(jnp.float32)[:, None]
    out = jnp.zeros((x.shape[0], outputs), jnp.float32)
    if matrix.lowest is not None:  # x . (lowest + scale * n): a row a group
        sums = x.reshape(x.shape[0], groups, GROUP).sum(2, dtype=jnp.float32)
        out = jnp.matmul(sums, matrix.lowest.astype(jnp.float32))
    for rows, integers in _parts(x, matrix):
        floats = integers(matrix.values).reshape(groups, -1, outputs) * scales
        flat = floats.astype(x.dtype).reshape(-1, outputs)
        out += jnp.matmul(rows, flat, preferred_element_type=jnp.float32)
    return out


def _by_groups(x: Float[Array, "B I"], matrix: Packed) -> Float32[Array, "B O"]:
    groups, outputs = matrix.scales.shape
    parts = _parts(x.astype(jnp.float32), matrix)
    sums = x.reshape(x.shape[0], groups, GROUP).sum(2, dtype=jnp.float32)
    scales, lowest = _bits(matrix.scales), matrix.lowest
    lowest = None if lowest is None else _bits(lowest)
    # Chunks are alike; a matrix that none divides is one.
    chunk = next((n for n in range(_CHUNK, 255, -1) if outputs % n == 0), outputs)

    def of_chunk(start):
        def add(group, out):
            def row(bits):
                found = lax.dynamic_slice(bits, (group, start), (1, chunk))
                found = lax.bitcast_convert_type(found, matrix.scales.dtype)
                return found.astype(jnp.float32)

            product = jnp.zeros_like(out)
            for rows, integers in parts:
                size = rows.shape[1] // groups
                some = lax.dynamic_slice_in_dim(rows, group * size, size, 1)
                values = lax.dynamic_slice(
                    matrix.values, (group * size, start), (size, chunk)
                )
                product += jnp.matmul(some, integers(values))
            out += product * row(scales)
            if lowest is not None:
                total = lax.dynamic_slice_in_dim(sums, group, 1, 1)
                out += total * row(lowest)
            return out

        empty = jnp.zeros((x.shape[0], chunk), jnp.float32)
        return lax.fori_loop(0, groups, add, empty)

    if chunk == outputs:
        return of_chunk(0)
    chunks = lax.map(of_chunk, chunk * jnp.arange(outputs // chunk))
    return chunks.swapaxes(0, 1).reshape(x.shape[0], outputs)


def _bits(scales: Float[Array, "N O"]) -> Shaped[Array, "N O"]:
    """Returns the bits of scales, as XLA's CPU backend makes floats of all to slice."""
    width = 8 * scales.dtype.itemsize
    return lax.bitcast_convert_type(scales, f"uint{width}")


def _parts(x: Float[Array, "B I"], matrix: Packed) -> list[tuple[Array, Callable]]:
    """Lists inputs with the function from `values` to the integers that they meet."""
    # Codes of 4 bits are stored as they are counted, from 0 or from -8.
    least = 0.0 if matrix.bits == 8 or matrix.lowest is not None else -8.0

    def floats(values: Any) -> Array:
        wide = values.astype(jnp.float32)
        return wide + least if least else wide

    if matrix.bits == 8:
        return [(x, floats)]
    # x is split as the bytes are, so that no integers are moved.
    halves = x.reshape(x.shape[0], -1, 2, GROUP // 2)
    first, second = (halves[:, :, n].reshape(x.shape[0], -1) for n in (0, 1))
    return [
        (first, lambda values: floats(values & 15)),
        (second, lambda values: floats(values >> 4)),
    ]
