"""Problems that operations are compiled, tested and timed with: shapes, no numbers.

Each operation has a `cases.py`: `arguments` makes its arrays' shapes, `num_bytes` says
what must be read of them, and `CASES` names the problems that the kernels are compiled
for. They are of a layer of an 8B model unless their names say otherwise: 8 KV heads of
4 query heads and 128 dimensions, bfloat16, one batch row, 128K or 1M tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.shared.quantized import (
    SCALES,
    Format,
    Layout,
    Quantized,
    room_for_scales,
)

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
Q_HEADS = KV_HEADS * GROUP
SHORT, LONG = 1 << 17, 1 << 20
GROUP_OF_4 = 32  # numbers of 4 bits that share a scale


class Case(NamedTuple):
    """An operation and the shapes of a problem for it."""

    function: Callable[..., Any]  # also takes `implementation` and `interpret`
    arguments: tuple[Any, ...]


Cases = Mapping[str, Case]


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype)


def stored(
    *shape: int, bits: Sequence[Literal[8, 4]], dtype: Any = jnp.bfloat16
) -> Quantized:
    """Turned rows that are not there, of as many parts as there are `bits`."""
    size = shape[-1] // len(bits)
    parts = tuple(Format(size, b, size if b == 8 else GROUP_OF_4, True) for b in bits)
    codes: Any = array(*shape[:-1], sum(p.codes for p in parts), dtype=jnp.uint8)
    scales: Any = array(*shape[:-1], room_for_scales(parts), dtype=SCALES)
    return Quantized(codes, scales, Layout(parts, dtype))


def bytes_of(*arrays: Any) -> int:
    """The bytes of the arrays, of which there may be only shapes, or quantised rows."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
