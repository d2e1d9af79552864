"""Keys and values as kernels on TPU multiply with them: floats, or codes with scales.

Codes are not decoded. bfloat16 holds every one, so that the matrix unit multiplies
queries with codes, and the logits that come out are multiplied by the tokens' scales;
weights are multiplied by scales before they meet the codes of values. Where groups of
numbers have scales of their own, a query's numbers lie in a row for each group and the
products are added afterwards: a few rows more cost the matrix unit nothing.

Codes lie in rows, one a token, or in columns: tokens last. Scales lie in columns.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shared.quantized import Format, Quantized, Rows
from pallas_kernels.shared.tpu_blocks import LANES, clear, dot, wide_dot

SUBLANES = 8
MAX_ROWS = 256  # of queries, one a group: products of a block stay within a megabyte
# Codes of 4 bits lie around it: of a weight that is rounded, what it does to products
# is least there.
MIDDLE = 7.5

Block = Sequence[jax.Array]  # of each array that rows lie in, in VMEM


@dataclasses.dataclass(frozen=True)
class Floats:
    """Keys, or values, in floats: blocks `(block, ...)`, a row for each token.

    Attributes:
        size: numbers of one, D.
        lanes: of a block, first and end, that are multiplied.
        first: the lane among these of its first number.
    """

    size: int
    lanes: tuple[int, int]
    first: int = 0

    tokens_last = (False,)  # of each array that rows lie in

    @property
    def width(self) -> int:
        """Lanes of the queries and of the outputs."""
        return self.lanes[1] - self.lanes[0]

    def rows(self, rows: int) -> int:
        """Returns the number of rows of queries for so many."""
        return rows

    def arrays(self, rows: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the arrays that lie in HBM, `(..., S, D)`."""
        return (rows,)

    def queries(self, q: jax.Array) -> tuple[jax.Array, ...]:
        """Queries `(..., R, D)` as :meth:`logits` takes them."""
        behind = self.width - self.first - self.size
        return (jnp.pad(q, ((0, 0),) * (q.ndim - 1) + ((self.first, behind),)),)

    def outputs(self, sums: jax.Array) -> jax.Array:
        """Rows `(..., R, D)` from those of :meth:`weighted`."""
        return sums[..., self.first : self.first + self.size]

    def numbers(self, block: Block) -> jax.Array:
        """Returns the numbers that are multiplied, `(block, width)`."""
        return block[0][:, self.lanes[0] : self.lanes[1]]

    def logits(self, queries: Block, block: Block) -> jax.Array:
        """Products `(R, block)` with keys."""
        return dot(queries[0], self.numbers(block), 1)

    def weighted(
        self, weights: jax.Array, block: Block, held: jax.Array | None = None
    ) -> jax.Array:
        """Sums of values by weights `(R, block)` in float32."""
        del held  # see `clear`
        values = self.numbers(block)
        return dot(weights.astype(values.dtype), values, 0)

    def clear(self, refs: Sequence[Any], valid: jax.Array) -> None:
        """Makes what lies there from token `valid` on finite."""
        clear(refs[0], valid)


@dataclasses.dataclass(frozen=True)
class Codes:
    """Keys, or values, as codes and bits of scales.

    Blocks are `(block, W)`, or tokens last `(W, block)`, and `(C, block)`.

    Attributes:
        part: their format.
        dtype: the numbers' dtype: of queries, and of weights that meet codes.
        start: the first byte of their codes in a row.
        first_scale: the first of their scales.
        tokens_last: of the codes and of the scales.
    """

    part: Format
    dtype: jax.typing.DTypeLike
    start: int
    first_scale: int
    tokens_last: tuple[bool, bool]

    @property
    def first(self) -> int:
        """The lane of its first number, where whole tiles of lanes are multiplied."""
        is_cut = self.part.bits == 8 and not self.tokens_last[0]
        return self.start % LANES if is_cut else 0

    @property
    def width(self) -> int:
        """Lanes of the queries and of the outputs."""
        if self.tokens_last[0]:
            return self.part.size
        return -(-(self.first + self.part.size) // LANES) * LANES

    @property
    def groups(self) -> int:
        """Scales of a token, its offsets aside."""
        return self.part.size // self.part.group

    def rows(self, rows: int) -> int:
        """Returns the number of rows of queries for so many: whole tiles."""
        return -(-rows // SUBLANES) * SUBLANES

    def arrays(self, rows: Quantized) -> tuple[jax.Array, ...]:
        """Returns the arrays in HBM: codes, scales `(..., C, S)`.

        Axes are swapped where XLA has them so already: no copy. Codes are
        `(..., S, W)`, or `(..., W, S)`.
        """
        return tuple(
            jnp.swapaxes(x, -1, -2) if is_last else x
            for x, is_last in zip(rows[:2], self.tokens_last, strict=True)
        )

    def queries(self, q: jax.Array) -> tuple[jax.Array, ...]:
        """Queries `(..., R, D)` as :meth:`logits` takes them; R becomes whole tiles.

        Returns:
            Rows `(..., groups * R, width)`: those of a group have its numbers alone,
            and 0 where others lie. Sums of a group's numbers, `(..., groups, R, 1)`.
        """
        rows, axes = q.shape[-2], ((0, 0),) * (q.ndim - 2)
        behind = self.width - self.first - self.part.size
        lanes = self.first, behind
        q = jnp.pad(q, (*axes, (0, self.rows(rows) - rows), lanes))
        lane = jnp.arange(self.width, dtype=jnp.int32)
        of_group = (lane - self.first) // self.part.group
        spread = [
            jnp.where(of_group == g, q, jnp.zeros_like(q)) for g in range(self.groups)
        ]
        sums = [x.astype(jnp.float32).sum(-1, keepdims=True) for x in spread]
        return jnp.concatenate(spread, axis=-2), jnp.stack(sums, axis=-3)

    def outputs(self, sums: jax.Array) -> jax.Array:
        """Rows `(..., R, D)` from those of :meth:`weighted`."""
        return sums[..., self.first : self.first + self.part.size]

    def logits(self, queries: Block, block: Block) -> jax.Array:
        """Products `(R, block)` with keys."""
        q, sums = queries
        scales = _scales(block[1])
        products = self._by_group(self._product(q, self._codes(block[0]), is_key=True))
        total = products[0] * self._scale(scales, 0)
        for g in range(1, self.groups):
            total += products[g] * self._scale(scales, g)
        if self.part.bits == 4:
            for g in range(self.groups):
                total -= sums[g] * self._offset(scales, g)
        return total

    def weighted(
        self, weights: jax.Array, block: Block, held: jax.Array | None = None
    ) -> jax.Array:
        """Sums `(R, width)` of values by weights `(R, block)` in float32.

        Only the lanes where numbers lie count: see :meth:`outputs`. Tokens outside the
        mask `held (1, block)` may have any scales, if their weight is 0.
        """
        scales = _scales(block[1])
        if held is not None:
            scales = jnp.where(held, scales, 0.0)
        scaled = [weights * self._scale(scales, g) for g in range(self.groups)]
        met = jnp.concatenate(scaled, axis=0).astype(self.dtype)
        codes = self._codes(block[0])
        products = self._by_group(self._product(met, codes, is_key=False))
        if self.part.bits == 8:
            return products[0]
        rounded = self._by_group(met.astype(jnp.float32))
        sums = []
        for g in range(self.groups):
            # Weights were rounded before they met codes, and the middle's share is
            # taken off as they were then: their error is that of a code's distance from
            # the middle, as it would be of a decoded number.
            offset = self._offset(scales, g) / MIDDLE - self._scale(scales, g)
            off = (rounded[g] + weights * offset).sum(1, keepdims=True)
            sums.append(products[g] - MIDDLE * off)
        total, lane = sums[0], lax.broadcasted_iota(jnp.int32, sums[0].shape, 1)
        for g, own in enumerate(sums[1:], 1):
            total = jnp.where(lane < g * self.part.group, total, own)
        return total

    def clear(self, refs: Sequence[Any], valid: jax.Array) -> None:
        """Codes are always finite, and :meth:`weighted` masks their scales."""

    def _by_group(self, x):
        rows = x.shape[0] // self.groups
        return [x[g * rows : (g + 1) * rows] for g in range(self.groups)]

    def _scale(self, scales, group):
        return _row(scales, self.first_scale + group)

    def _offset(self, scales, group):
        return _row(scales, self.first_scale + self.groups + group)

    def _codes(self, stored):
        """The codes in bfloat16, `(block, width)` or tokens last: it holds them all."""
        end = self.start + self.part.codes
        if self.tokens_last[0]:
            stored = stored[self.start : end]
        elif self.part.bits == 8:
            first = self.start - self.first
            stored = stored[:, first : first + self.width]
        elif self.part.codes % LANES:
            stored = _nibbles(stored, is_behind=self.start > 0)
            return stored.astype(jnp.bfloat16)
        else:
            stored = stored[:, self.start : end]
        if self.part.bits == 8:
            return pltpu.bitcast(stored, jnp.int8).astype(jnp.bfloat16)
        wide = stored.astype(jnp.int32)
        axis = 0 if self.tokens_last[0] else 1
        halves = jnp.concatenate([wide & 15, wide >> 4], axis=axis)
        return halves.astype(jnp.bfloat16)

    def _product(self, a, codes, is_key):
        """`dot` with codes; of float32 exact in its products."""
        multiply = wide_dot if a.dtype == jnp.float32 else dot
        return multiply(a, codes, int(is_key != self.tokens_last[0]))


Operand = Floats | Codes


def operand(rows: Rows) -> Operand:
    """Keys, or values, of a contiguous cache.

    Rows that do not fill whole tiles of lanes XLA lays out tokens last.
    """
    if not isinstance(rows, Quantized):
        return Floats(rows.shape[-1], (0, rows.shape[-1]))
    (part,) = rows.layout.parts
    tokens_last = bool(rows.codes.shape[-1] % LANES), True
    return Codes(part, rows.dtype, 0, 0, tokens_last)


def stored_dtype(rows: Rows) -> str:
    """The dtype that rows lie in, as tuning tables spell it."""
    return str(rows.codes.dtype if isinstance(rows, Quantized) else rows.dtype)


def unsupported_rows(rows: int, *formats: Format) -> str | None:
    """Says why so many query rows cannot be there once for each group, or None."""
    groups = max(part.size // part.group for part in formats)
    each = -(-rows // SUBLANES) * SUBLANES * groups
    if each > MAX_ROWS:
        return (
            f"{rows} query rows, {each} with one for each of {groups} groups, must be "
            f"at most {MAX_ROWS}"
        )
    return None


def fused(rows: Rows) -> tuple[Operand, Operand]:
    """Keys and values of rows that hold the keys and, behind them, the values."""
    if not isinstance(rows, Quantized):
        size = rows.shape[-1] // 2
        if size % LANES:  # both are multiplied: 0 where the other lies
            return Floats(size, (0, 2 * size)), Floats(size, (0, 2 * size), size)
        return Floats(size, (0, size)), Floats(size, (size, 2 * size))
    keys, values = rows.layout.parts
    tokens_last = bool(rows.codes.shape[-1] % LANES), True
    return (
        Codes(keys, rows.dtype, 0, 0, tokens_last),
        Codes(values, rows.dtype, keys.codes, keys.scales, tokens_last),
    )


def _row(scales, index):
    return scales[index : index + 1]


def _scales(bits):
    """Scales `(C, block)` in float32 of the bits that are stored of them.

    They may lie page by page, `(pages, C, P)`.
    """
    if bits.ndim == 3:
        return jnp.concatenate([_scales(bits[j]) for j in range(len(bits))], axis=1)
    return lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)


def _nibbles(stored, is_behind):
    """Numbers of the low halves of 64 bytes, then of the high ones, of rows of 128.

    They are moved to their lanes where four lie in a word, before they are widened.
    """
    here = pltpu.bitcast(stored, jnp.int32)
    there = pltpu.roll(here, LANES // 2, 1)
    low, high = (there, here) if is_behind else (here, there)
    lane = lax.broadcasted_iota(jnp.int32, here.shape, 1)
    high = lax.shift_right_logical(high, 4)
    words = jnp.where(lane < LANES // 2, low, high) & 0x0F0F0F0F
    return pltpu.bitcast(words, jnp.int8)
