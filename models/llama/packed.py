"""Matrices as integers with scales, of 8 or 4 bits, and the products with them.

A packed matrix stands in the tree of parameters where the float `kernel` stood. It is
made once, while a checkpoint is read; a product makes floats of it a part at a time.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, UInt8

from kvjax.interface import Params
from models.family import Packing

GROUP = 32  # inputs that share a scale
# With more rows than these a product takes longer than the floats it is made of.
_FEW_ROWS = 32
# Outputs of a group that are floats at once: 256 KB, which a core's cache holds.
_CHUNK = 2048


class Packed(NamedTuple):
    """A matrix whose groups are `lowest + scale * n`, n in 0 .. 255 or 0 .. 15.

    In 4 bits a byte holds two inputs of one group, half a group apart: the first in its
    low bits. Scales are bfloat16, which overflows where float32 does.
    """

    values: UInt8[Array, "I*bits/8 O"]
    scales: BFloat16[Array, "I/GROUP O"]
    lowest: BFloat16[Array, "I/GROUP O"]

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes of the matrix: inputs, outputs."""
        return GROUP * self.scales.shape[0], self.scales.shape[1]

    @property
    def size(self) -> int:
        """The number of weights; scales are none."""
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> str:
        """The name of the format."""
        return "int8" if self.values.shape[0] == self.shape[0] else "int4"


def refuse(params: Params, purpose: str) -> None:
    """Raises ValueError if any matrix is packed: `purpose` needs floats."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Packed))
    found = next((node.dtype for node in nodes if isinstance(node, Packed)), None)
    if found is not None:
        raise ValueError(
            f"weights={found!r} cannot be {purpose}: load the model with weights=None."
        )


def check_inputs(inputs: int, weights: Packing, name: str) -> None:
    """Raises ValueError unless groups divide the inputs of a matrix."""
    if weights is not None and inputs % GROUP:
        raise ValueError(
            f"{name} has {inputs} inputs, which groups of {GROUP} do not divide: "
            f"leave weights={weights!r} out."
        )


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


def shapes(target: jax.ShapeDtypeStruct, weights: Literal["int8", "int4"]) -> Packed:
    """Returns `jax.ShapeDtypeStruct`s of a packed matrix."""
    return jax.eval_shape(lambda x: pack(x, weights), target)


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
    # x . (lowest + scale * n): the first product has a row a group.
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
    # Chunks are alike; a matrix that none divides is one.
    chunk = next((n for n in range(_CHUNK, 255, -1) if outputs % n == 0), outputs)

    def of_chunk(start):
        def add(group, out):
            def row(array):
                return lax.dynamic_slice(array, (group, start), (1, chunk))

            product = jnp.zeros_like(out)
            total = jnp.zeros((x.shape[0], 1), jnp.float32)
            for rows, integers in parts:
                size = rows.shape[1] // groups
                some = lax.dynamic_slice_in_dim(rows, group * size, size, 1)
                values = lax.dynamic_slice(
                    matrix.values, (group * size, start), (size, chunk)
                )
                product += jnp.matmul(some, integers(values))
                total += some.sum(1, keepdims=True)
            scale, lowest = (
                row(array).astype(jnp.float32)
                for array in (matrix.scales, matrix.lowest)
            )
            return out + product * scale + total * lowest

        empty = jnp.zeros((x.shape[0], chunk), jnp.float32)
        return lax.fori_loop(0, groups, add, empty)

    if chunk == outputs:
        return of_chunk(0)
    chunks = lax.map(of_chunk, chunk * jnp.arange(outputs // chunk))
    return chunks.swapaxes(0, 1).reshape(x.shape[0], outputs)


def _parts(x: Float[Array, "B I"], matrix: Packed) -> list[tuple[Array, Callable]]:
    """Lists inputs with the function from `values` to the integers that they meet."""

    def floats(values: Any) -> Array:
        return values.astype(jnp.float32)

    if matrix.dtype == "int8":
        return [(x, floats)]
    # x is split as the bytes are, so that no integers are moved.
    halves = x.reshape(x.shape[0], -1, 2, GROUP // 2)
    first, second = (halves[:, :, n].reshape(x.shape[0], -1) for n in (0, 1))
    return [
        (first, lambda values: floats(values & 15)),
        (second, lambda values: floats(values >> 4)),
    ]
