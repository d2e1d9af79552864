"""Rows of scores on TPU: how they lie in VMEM, and sums over them.

A row of N scores is lines of 128, so that it fills whole registers whatever the number
of rows; lines are taken a tile at a time, a few rows in step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
SUBLANES = 8
MOST_ROWS = 8  # in step: more would only spill registers
VMEM_BYTES = 32 << 20  # half of the least that a generation has


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows in step, lines of 128 scores in a tile, tiles in a row."""

    rows: int
    lines: int
    num_tiles: int

    @property
    def length(self) -> int:
        """Scores of a row, padded."""
        return self.num_tiles * self.lines * LANES

    @property
    def block(self) -> tuple[int, int, int]:
        """Shape of the rows in step."""
        return self.rows, self.num_tiles * self.lines, LANES

    def at(self, i: jax.Array) -> slice | pl.Slice:
        """The lines of tile i."""
        return pl.ds(pl.multiple_of(i * self.lines, SUBLANES), self.lines)


def tiles(num_scores: int, copies: int) -> Tiles:
    """For rows of so many scores, each held `copies` times in 4 bytes."""
    lines = SUBLANES * math.ceil(num_scores / (SUBLANES * LANES))
    lines = min(lines, LANES)
    num_tiles = math.ceil(num_scores / (lines * LANES))
    room = VMEM_BYTES // 2 // (4 * copies * num_tiles * lines * LANES)
    rows = 1 << max(min(room, MOST_ROWS).bit_length() - 1, 0)
    return Tiles(rows, lines, num_tiles)


def unsupported(scores: Any, copies: int, more_bytes: int = 0) -> str | None:
    """Says why such rows cannot be held, or None; `more_bytes` are per row."""
    if scores.dtype.itemsize > 4:
        return f"scores are {scores.dtype}, the most precise it knows is float32"
    row_bytes = 4 * copies * tiles(scores.shape[-1], copies).length + more_bytes
    if row_bytes > VMEM_BYTES:
        return (
            f"a row of {scores.shape[-1]:,} scores takes {row_bytes:,} bytes of VMEM, "
            f"more than {VMEM_BYTES:,}"
        )
    return None


def pad(scores: jax.Array, tiles: Tiles) -> jax.Array:
    """`(..., N)` in float32 as `(rows of all blocks, lines, 128)`, filled with -inf."""
    num_rows, num_scores = math.prod(scores.shape[:-1]), scores.shape[-1]
    return jnp.pad(
        scores.astype(jnp.float32).reshape(num_rows, num_scores),
        ((0, -num_rows % tiles.rows), (0, tiles.length - num_scores)),
        constant_values=-jnp.inf,
    ).reshape(-1, *tiles.block[1:])


def sums(
    ref, tiles: Tiles, terms: Callable[[jax.Array], tuple[jax.Array, ...]]
) -> tuple[jax.Array, ...]:
    """Sums over each row of every term, `(rows, 8, 128)`, in every place alike.

    Args:
        ref: a block of rows.
        tiles: how they lie.
        terms: of a tile `(rows, lines, 128)`; float32 arrays of that shape.
    """
    total = _reduce(ref, tiles, terms, jnp.add, jnp.sum, 0.0)
    return tuple(jnp.broadcast_to(x, spread(tiles)) for x in total)


def most(ref, tiles: Tiles) -> jax.Array:
    """The largest of each row, `(rows, 8, 128)`, in every place alike."""
    (top,) = _reduce(ref, tiles, lambda x: (x,), jnp.maximum, jnp.max, -jnp.inf)
    return jnp.broadcast_to(top, spread(tiles))


def spread(tiles: Tiles) -> tuple[int, int, int]:
    """Shape of a number per row, in every place of a register alike."""
    return tiles.rows, SUBLANES, LANES


def _reduce(ref, tiles, terms, merge, reduce, start):
    groups = (tiles.rows, tiles.lines // SUBLANES, SUBLANES, LANES)

    def add(i, carry):
        parts = (reduce(x.reshape(groups), axis=1) for x in terms(ref[:, tiles.at(i)]))
        return tuple(map(merge, carry, parts))

    block = jax.ShapeDtypeStruct((tiles.rows, tiles.lines, LANES), ref.dtype)
    number = len(jax.eval_shape(terms, block))
    carry = (jnp.full(spread(tiles), start, jnp.float32),) * number
    carry = lax.fori_loop(0, tiles.num_tiles, add, carry)
    across = (reduce(x, axis=1, keepdims=True) for x in carry)
    return tuple(reduce(x, axis=2, keepdims=True) for x in across)
