"""Rows of a cache in 8 or 4 bits: what is stored of them, and how they are read again.

A :class:`Quantized` stands where an array of rows may: its leaves have the array's axes
but for the last, so that what moves whole rows (a slice, a gather, a write) is the same
for both: `jax.tree.map` over the buffer. What computes with rows asks for their numbers
(:func:`floats`), of a block at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8, UInt16

Holds = Literal["keys", "values", "both"]  # what a row of a buffer is

# Scales are bfloat16, the upper halves of float32, with its exponents. They are kept as
# their bits: on a CPU, XLA turns a whole buffer of bfloat16 into float32 to slice it.
SCALES = jnp.uint16
LARGEST = 1e36  # numbers beyond are stored as this: sums over a row stay finite
SPARE = 16  # newest tokens that can be taken back, or read at once, beside a residual


@dataclasses.dataclass(frozen=True)
class Format:
    """The way that rows of `size` numbers are stored.

    Attributes:
        size: numbers in a row.
        bits: 8 are symmetric around 0, with one scale a row; 4 are packed two to a
            byte, with a scale and an offset for every `group` numbers.
        group: divides `size`; with 8 bits the whole row.
        turned: a row is stored as its Hadamard transform, which spreads an outlier over
            all numbers.
    """

    size: int
    bits: Literal[8, 4]
    group: int
    turned: bool = False

    @property
    def codes(self) -> int:
        """The bytes of a row's codes."""
        return self.size * self.bits // 8

    @property
    def scales(self) -> int:
        """The scales of a row, offsets among them."""
        return self.size // self.group * (1 if self.bits == 8 else 2)


def room_for_scales(parts: Sequence[Format]) -> int:
    """Returns the scales that a row has room for: those of all parts, and spare ones.

    In 1, 2, 4 or a multiple of 8 a TPU's kernels find them where XLA lays them out. In
    others, as the 9 of keys in 8 and values in 4 bits, XLA would lay out all of a cache
    anew in each call, in the room that is taken here.
    """
    number = sum(part.scales for part in parts)
    few = [some for some in (1, 2, 4) if number <= some]
    return few[0] if few else -(-number // 8) * 8


@dataclasses.dataclass(frozen=True)
class Storage:
    """The formats of the keys and of the values of a cache."""

    keys: Format
    values: Format

    def parts(self, holds: Holds) -> tuple[Format, ...]:
        """Returns the formats of a row that holds one of them, or both."""
        both = self.keys, self.values
        return {"keys": both[:1], "values": both[1:], "both": both}[holds]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a row, one behind the other; `dtype` is of the numbers read."""

    parts: tuple[Format, ...]
    dtype: jax.typing.DTypeLike

    @property
    def ends(self) -> list[int]:
        """The ends of parts but the last in a row of numbers."""
        return np.cumsum([part.size for part in self.parts])[:-1].tolist()


class Quantized(NamedTuple):
    """Rows in few bits, such as those of keys, or of keys with their values behind."""

    # Of each part in turn. Of 4 bits, the first half of a row's numbers are in the low
    # halves of the bytes.
    codes: UInt8[Array, "*B W"]
    # Of each part in turn, offsets behind scales; then 0: see `room_for_scales`. Bits.
    scales: UInt16[Array, "*B C"]
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return (*self.codes.shape[:-1], sum(part.size for part in self.layout.parts))

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.layout.dtype)


class WithNewest(NamedTuple):
    """Quantised rows of every token, and beside them the newest tokens as they came.

    A query reads the `residual` positions up to its own as they came, and what is older
    as it is stored. What is not held as it came is stored all the same.
    """

    rows: Quantized
    newest: Float[Array, "B H W D"]  # W = residual + SPARE; position p in slot p % W
    at: Int[Array, "B W"]  # the position in each slot, -1 = none; one run of positions

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers of every token."""
        return self.rows.shape

    @property
    def ndim(self) -> int:
        return self.rows.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.rows.dtype

    @property
    def residual(self) -> int:
        """The tokens that a query reads as they came."""
        return self.newest.shape[2] - SPARE

    def stored_until(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Returns the last position that each query reads as it is stored."""
        far = jnp.iinfo(jnp.int32).max
        oldest = jnp.where(self.at < 0, far, self.at).min(1)
        until = jnp.maximum(positions - self.residual, oldest[:, None] - 1)
        return jnp.minimum(positions, until)


Rows = Array | Quantized | WithNewest  # a buffer of rows, or some of its rows


def every_token(rows: Rows) -> Array | Quantized:
    """Returns a buffer without the newest tokens that may be kept beside it."""
    return rows.rows if isinstance(rows, WithNewest) else rows


def rewound(rows: Rows, length: Int[Array, "B"]) -> Rows:
    """Forgets what is kept beside a buffer of tokens from position `length` on."""
    if not isinstance(rows, WithNewest):
        return rows
    return rows._replace(at=jnp.where(rows.at < length[:, None], rows.at, -1))


def unsupported(*arrays: Any) -> str | None:
    """Says why a kernel that reads numbers alone cannot take these; None if it can."""
    if any(isinstance(x, Quantized) for x in arrays):
        return "its keys and values are quantised"
    return None


def unsupported_pair(k: Rows, v: Rows) -> str | None:
    """Says why a kernel of one kind of rows cannot take these; None if it can."""
    if isinstance(k, Quantized) != isinstance(v, Quantized):
        kinds = ["quantised" if isinstance(x, Quantized) else "floats" for x in (k, v)]
        return f"keys are {kinds[0]} and values {kinds[1]}: both must be the same"
    return None


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Splits rows of keys with their values behind into keys and values."""
    if isinstance(rows, WithNewest):
        halves = jnp.split(rows.newest, 2, axis=-1)
        parts = zip(_parts(rows.rows), halves, strict=True)
        keys, values = (WithNewest(*part, rows.at) for part in parts)
    elif isinstance(rows, Quantized):
        keys, values = _parts(rows)
    else:
        keys, values = jnp.split(rows, 2, axis=-1)
    return keys, values


def _parts(rows: Quantized) -> list[Quantized]:
    found, code, scale = [], 0, 0
    for part in rows.layout.parts:
        found.append(
            Quantized(
                rows.codes[..., code : code + part.codes],
                rows.scales[..., scale : scale + part.scales],
                Layout((part,), rows.layout.dtype),
            )
        )
        code, scale = code + part.codes, scale + part.scales
    return found


def floats(rows: Rows) -> Float[Array, "*B D"]:
    """Returns the numbers of rows, in the dtype they are read in."""
    return turned(rows, numbers(rows))


def numbers(rows: Rows) -> Float[Array, "*B D"]:
    """Returns the numbers that rows are stored as: turned, where they are."""
    if isinstance(rows, WithNewest):
        raise TypeError("rows with the newest beside them are read in two parts.")
    if not isinstance(rows, Quantized):
        return rows
    return _joined([narrowed(_decode(part), rows.dtype) for part in _parts(rows)])


def turned(
    like: Rows | np.ndarray | jax.ShapeDtypeStruct, x: Float[Array, "*B D"]
) -> Float[Array, "*B D"]:
    """Turns x as rows in `like` are turned, or back, which is the same.

    q . k is that of both turned, and a sum of turned values is the turned sum: a query
    and an output are turned instead of every key and value.
    """
    return _turned(like.layout, x) if isinstance(like, Quantized) else x


def _turned(layout: Layout, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    if not any(part.turned for part in layout.parts):
        return x
    parts = zip(jnp.split(x, layout.ends, axis=-1), layout.parts, strict=True)
    return _joined([_transform(one) if part.turned else one for one, part in parts])


def stored(like: Rows, rows: Rows) -> Rows:
    """Returns rows as the buffer `like` stores them, which they may be already."""
    if isinstance(rows, Quantized | WithNewest):  # of the same kind
        return rows
    like = every_token(like)
    if not isinstance(like, Quantized):
        return rows.astype(like.dtype)
    return encode(like.layout, rows)


def encode(layout: Layout, rows: Float[Array, "*B D"]) -> Quantized:
    """Quantises rows, whose numbers will be read in the layout's dtype."""
    # What is read again is of this dtype; what it cannot hold is not kept either.
    wide = rows.astype(layout.dtype).astype(jnp.float32)
    wide = _turned(layout, jnp.clip(wide, -LARGEST, LARGEST))
    parts = jnp.split(wide, layout.ends, axis=-1)
    encoded = [
        _encode(part, one) for part, one in zip(layout.parts, parts, strict=True)
    ]
    codes, scales = zip(*encoded, strict=True)
    joined = _joined(scales)
    spare = room_for_scales(layout.parts) - joined.shape[-1]
    if spare:
        joined = jnp.pad(joined, ((0, 0),) * (joined.ndim - 1) + ((0, spare),))
    return Quantized(_joined(codes), joined, layout)


def as_stored(like: Rows, rows: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns rows as they are read again once the buffer `like` has stored them."""
    return floats(stored(like, rows))


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _encode(
    part: Format, rows: Float[Array, "*B D"]
) -> tuple[UInt8[Array, "*B W"], UInt16[Array, "*B C"]]:
    if part.bits == 8:
        scales = _rounded_up(jnp.abs(rows).max(-1, keepdims=True) / 127)
        codes = jnp.round(rows / _divisor(scales))
        codes = jnp.clip(codes, -127, 127).astype(jnp.int8)
        return lax.bitcast_convert_type(codes, jnp.uint8), scales
    groups = rows.reshape(*rows.shape[:-1], -1, part.group)
    # From the ends as they are stored: a number between them is within half a scale. An
    # offset is stored as what is taken off.
    offsets = _rounded_up(-groups.min(-1))
    low = -_wide(offsets)[..., None]
    scales = _rounded_up((groups.max(-1) - low[..., 0]) / 15)
    codes = jnp.round((groups - low) / _divisor(scales)[..., None])
    codes = jnp.clip(codes, 0, 15).astype(jnp.uint8).reshape(rows.shape)
    low_half, high_half = jnp.split(codes, 2, axis=-1)
    packed = low_half | (high_half << 4)
    return packed, jnp.concatenate([scales, offsets], axis=-1)


def _decode(rows: Quantized) -> Float[Array, "*B D"]:
    (part,) = rows.layout.parts
    scales = _wide(rows.scales)
    if part.bits == 8:
        return _signed(rows.codes) * scales
    steps, offsets = jnp.split(scales, 2, axis=-1)
    halves = zip(
        _nibbles(rows.codes), _halves(part, steps), _halves(part, offsets), strict=True
    )
    decoded = [
        (_groups(n, step) * step[..., None] - offset[..., None]).reshape(n.shape)
        for n, step, offset in halves
    ]
    return jnp.concatenate(decoded, axis=-1)


def times_keys(q: Float[Array, "R D"], keys: Quantized) -> Float[Array, "R N"]:
    """Multiplies queries by stored keys `(N, D)`; sums are float32.

    What scales or offsets a whole row or group does so once it is a product. On a TPU
    XLA's default precision rounds operands to bfloat16: queries in float32, and of 4
    bits codes times their scales; codes alone it holds. Sums and offsets are multiplied
    in full: what they take off may be most of a product.
    """
    (part,) = keys.layout.parts
    scales = _wide(keys.scales)[:, : part.scales]
    if part.bits == 8:
        return _against(q, _signed(keys.codes)) * scales[:, 0]
    steps, offsets = jnp.split(scales, 2, axis=-1)
    low, high = _scaled(part, keys.codes, steps)
    product = _against(q[:, : part.codes], low) + _against(q[:, part.codes :], high)
    sums = _groups(q, offsets).sum(2)
    return product - _against(sums, offsets, lax.Precision.HIGHEST)


def _against(
    q: Float[Array, "R D"],
    keys: Float[Array, "N D"],
    precision: lax.Precision | None = None,
) -> Array:
    return jnp.einsum("rd,nd->rn", q, keys, precision=precision)


def weighted_sum(
    weights: Float[Array, "R N"], values: Quantized
) -> Float[Array, "R D"]:
    """Sums stored values `(N, D)` by weights; sums are float32.

    On a TPU weights are rounded to bfloat16 where they meet codes, as in
    :func:`times_keys`. They meet offsets rounded alike: what a weight loses is then
    lost of a number, as of floats, and not of its distance from the offset.
    """
    (part,) = values.layout.parts
    scales = _wide(values.scales)[:, : part.scales]
    if part.bits == 8:
        return (weights * scales[:, 0]) @ _signed(values.codes)
    steps, offsets = jnp.split(scales, 2, axis=-1)
    halves = _scaled(part, values.codes, steps)
    total = jnp.concatenate([weights @ half for half in halves], axis=-1)
    below = weights @ offsets
    return (_groups(total, below) - below[..., None]).reshape(total.shape)


def _signed(codes: UInt8[Array, "*B W"]) -> Float[Array, "*B W"]:
    return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


def _nibbles(codes: UInt8[Array, "*B W"]) -> list[Float[Array, "*B W"]]:
    # Joined before they are scaled, a CPU takes ten times as long.
    return [x.astype(jnp.float32) for x in (codes & 15, codes >> 4)]


def _scaled(
    part: Format, codes: UInt8[Array, "*B W"], steps: Float[Array, "*B C"]
) -> list[Float[Array, "*B W"]]:
    """Returns the first half of a row's numbers, and the second, without offsets."""
    return [
        (_groups(n, step) * step[..., None]).reshape(n.shape)
        for n, step in zip(_nibbles(codes), _halves(part, steps), strict=True)
    ]


def _halves(part: Format, x: Float[Array, "*B C"]) -> list[Float[Array, "*B N"]]:
    """Splits what groups have into that of the first half of a row and the second.

    A group in both halves becomes several.
    """
    each = part.group // math.gcd(part.codes, part.group)
    x = jnp.broadcast_to(x[..., None], (*x.shape, each))
    return jnp.split(x.reshape(*x.shape[:-2], -1), 2, axis=-1)


def _groups(x: Float[Array, "*B D"], like: Float[Array, "*A C"]) -> Array:
    """Cuts rows into as many groups as `like` has: `(*B, C, D / C)`."""
    return x.reshape(*x.shape[:-1], like.shape[-1], -1)


def _rounded_up(x: Float[Array, "*B"]) -> UInt16[Array, "*B"]:
    """The bits of the least bfloat16 that is not below x; of 0 where x is too small."""
    x = jnp.where(jnp.abs(x) < jnp.finfo(jnp.float32).tiny, 0.0, x)
    # A bfloat16 is the upper half of a float32, and larger numbers have larger bits, or
    # smaller where they are negative.
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = jnp.where(x > 0, bits + jnp.uint32(0xFFFF), bits) >> 16
    return up.astype(jnp.uint16)


def _wide(scales: UInt16[Array, "*B"]) -> Float[Array, "*B"]:
    bits = scales.astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


def _divisor(scales: UInt16[Array, "*B"]) -> Float[Array, "*B"]:
    wide = _wide(scales)
    return jnp.where(wide > 0, wide, 1.0)


def _transform(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    matrix = jnp.asarray(hadamard(x.shape[-1]))
    wide = x.astype(jnp.float32)
    product = jnp.einsum("...d,de->...e", wide, matrix, precision=lax.Precision.HIGHEST)
    return narrowed(product, x.dtype)


def narrowed(x: Float[Array, "*B D"], dtype: jax.typing.DTypeLike) -> Array:
    """Casts to a dtype; what only float16 cannot hold becomes its largest number."""
    most = float(jnp.finfo(dtype).max)
    if most < LARGEST:
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


@functools.cache
def hadamard(size: int) -> Float[np.ndarray, "D D"]:
    """An orthonormal matrix that is its own inverse: Hadamard's, of a power of two.

    Of another size it is made of blocks of the largest power of two that divides it.
    """
    block = np.ones((1, 1))
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    blocks = np.kron(np.eye(size // len(block)), block / np.sqrt(len(block)))
    return blocks.astype(np.float32)
