"""Buffers of a cache: allocate, write, gather. Positions out of range write nothing."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvjax.interface import CacheSpec
from pallas_kernels.shared.quantized import (
    SCALES,
    Holds,
    Layout,
    Quantized,
    Rows,
    Storage,
    WithNewest,
    every_token,
    floats,
    room_for_scales,
    stored,
)

# What a new floating-point buffer holds. Tests set a huge finite number, so that any
# weight on a slot that was never written shows in the output. Not NaN: attention reads
# unwritten values with a weight of exactly 0, and masking them would copy the cache.
fill_value: float = 0.0


# The fields of a store that hold rows, by what these are: its `ROWS`.
KEYS_AND_VALUES: Mapping[str, Holds] = types.MappingProxyType(
    {"k": "keys", "v": "values"}
)

HUGE = float(0x7149)  # the bits of 1e30 in bfloat16

MOST_SCATTERS = 16  # of one token each; a longer chunk is one scatter
TILE, LANES = 32, 128  # rows of bytes that a TPU has together, and numbers side by side

Update = Literal["set", "min", "max"]


def allocate(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, fill: float | None = None
) -> Array:
    """Makes a buffer, of `fill` if given. All memory of a state comes from here."""
    if fill is not None:
        return jnp.full(shape, fill, dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.full(shape, fill_value, dtype)
    return jnp.zeros(shape, dtype)


def allocate_rows(spec: CacheSpec, shape: tuple[int, ...], holds: Holds) -> Rows:
    """Makes a buffer of rows: of keys, of values, or of keys with their values behind.

    Args:
        spec: how they are kept.
        shape: of the buffer, without its last axis.
        holds: what a row is.
    """
    if not isinstance(spec.storage, Storage):
        return allocate((*shape, _numbers(spec, holds)), spec.dtype)
    parts = spec.storage.parts(holds)
    codes, scales = sum(p.codes for p in parts), room_for_scales(parts)
    # Where what was never written should show, a code of 0 would hide its scale.
    code, scale = (0.0, 0.0) if fill_value == 0 else (85.0, HUGE)
    return Quantized(
        allocate((*shape, codes), jnp.uint8, fill=code),
        allocate((*shape, scales), SCALES, fill=scale),
        Layout(parts, spec.dtype),
    )


def _numbers(spec: CacheSpec, holds: Holds) -> int:
    return spec.head_dim * (2 if holds == "both" else 1)


def lengths(spec: CacheSpec) -> Int[Array, "B"]:
    """The clock of an empty state: no tokens in any row."""
    return jnp.zeros((spec.batch,), jnp.int32)


def chunk_positions(
    length: Int[Array, "B"], lengths: Int[Array, "B"] | None, size: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns absolute positions of a right-padded chunk, and which of them are real.

    Args:
        length: tokens before it.
        lengths: tokens in it; None means all.
        size: of the chunk, padding included.
    """
    offset = jnp.arange(size, dtype=jnp.int32)
    fresh = jnp.full_like(length, size) if lengths is None else lengths
    return length[:, None] + offset, offset < fresh[:, None]


def write(
    buffer: Rows,
    rows: Rows,
    slots: Int[Array, "B *H T"],
    valid: Bool[Array, "B *H T"],
    update: Update = "set",
) -> Any:
    """Writes `rows (B, H, T, ...)` at `slots` of `buffer (B, H, S, ...)`.

    A row that is not valid, or whose slot lies past the end, is dropped: never clamped
    onto a slot that holds something else. `slots` may also be `(B, H, T)`. With `min`
    or `max` a slot keeps the extreme of what it holds and what is written.
    """
    valid = valid & (slots >= 0)
    if slots.ndim == 2 and rows.shape[2] == 1:
        count = valid[:, 0].astype(jnp.int32)
        return write_run(buffer, rows, slots[:, 0], count, update)

    def one(buffer: Array, rows: Array) -> Array:
        return _scatter(buffer, rows, slots, valid, update)

    return jax.tree.map(one, buffer, stored(buffer, rows))


def write_run(
    buffer: Rows,
    rows: Rows,
    start: Int[Array, "B"],
    count: Int[Array, "B"],
    update: Update = "set",
) -> Any:
    """Writes the first `count` of `rows (B, H, T, ...)` from slot `start >= 0` on.

    As :func:`write`, in place. A scatter is in place where XLA keeps it; on CPU it
    becomes a slice update fused into every reader of the buffer, and each such fusion
    writes into a copy of its own. So there it goes row by row. Elsewhere a scatter of
    more than one token copies: a few tokens are as many scatters.
    """
    run = jnp.arange(rows.shape[2], dtype=jnp.int32)
    slots, valid = start[:, None] + run, run < count[:, None]
    if isinstance(buffer, WithNewest):  # slots are positions
        written = write_run(buffer.rows, rows, start, count, update)
        return keep_newest(buffer, written, rows, slots, valid)

    def one(buffer: Array, rows: Array) -> Array:
        on_tpu, size = {}, buffer.shape[2]
        tile = tile_of(size, rows.shape[-1], buffer.dtype)
        if buffer.dtype == SCALES and tile and len(run) == 1 and update == "set":

            def as_page() -> Array:
                page = jnp.where(valid & (slots < size), 0, 1)
                pages = buffer[:, :, None]
                return write_in_tiles(pages, rows, page, slots, tile)[:, :, 0]

            on_tpu = {"tpu": as_page}
        return lax.platform_dependent(
            cpu=lambda: _write_slices(buffer, rows, start, count, update),
            default=lambda: _scatters(buffer, rows, slots, valid, update),
            **on_tpu,
        )

    return jax.tree.map(one, buffer, stored(buffer, rows))


def keep_newest(
    buffer: Rows,
    written: Any,
    rows: Rows,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Any:
    """Returns what was `written`, and beside it the newest tokens as `buffer` has them.

    Args:
        buffer: before; only if tokens are kept beside it is there anything to do.
        written: every token of it, the new ones too.
        rows: the new ones as they came.
        positions: of these, one behind the other.
        valid: which are real.
    """
    if not isinstance(buffer, WithNewest):
        return written
    size = buffer.newest.shape[2]
    # Of the tokens that share a slot only the newest may be written.
    last = jnp.where(valid, positions, -1).max(1, keepdims=True)
    valid, slots = valid & (positions > last - size), positions % size
    return WithNewest(
        written,
        write(buffer.newest, rows, slots, valid),
        write(buffer.at[:, None], positions[:, None], slots, valid)[:, 0],
    )


def split_to_scatter(tokens: int) -> list[slice]:
    """Splits `tokens` into parts to scatter in turn: singles if they are few."""
    if tokens > MOST_SCATTERS:
        return [slice(0, tokens)]
    return [slice(i, i + 1) for i in range(tokens)]


def _scatters(
    buffer: Array,
    rows: Array,
    slots: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    update: Update,
) -> Array:
    for part in split_to_scatter(rows.shape[2]):
        buffer = _scatter(
            buffer, rows[:, :, part], slots[:, part], valid[:, part], update
        )
    return buffer


def _scatter(
    buffer: Array,
    rows: Array,
    slots: Int[Array, "B *H T"],
    valid: Bool[Array, "B *H T"],
    update: Update,
) -> Array:
    slots = jnp.where(valid, slots, buffer.shape[2])

    if slots.ndim == 2:
        # (H, S, ...), (H, T, ...), (T,)
        def one_row(buffer: Array, rows: Array, slots: Int[Array, "T"]) -> Array:
            return getattr(buffer.at[:, slots], update)(rows, mode="drop")

        return jax.vmap(one_row)(buffer, rows, slots)

    # (S, ...), (T, ...), (T,)
    def one_head(buffer: Array, rows: Array, slots: Int[Array, "T"]) -> Array:
        return getattr(buffer.at[slots], update)(rows, mode="drop")

    return jax.vmap(jax.vmap(one_head))(buffer, rows, slots)


_UPDATES = {
    "set": lambda old, new: new,
    "min": jnp.minimum,
    "max": jnp.maximum,
}


def _write_slices(
    buffer: Array,
    rows: Array,
    start: Int[Array, "B"],
    count: Int[Array, "B"],
    update: Update,
) -> Array:
    batch, heads, size, *rest = rows.shape
    slots = buffer.shape[2]
    zero = jnp.int32(0)  # of one type with the indices also where 64 bits are on
    zeros = (zero,) * len(rest)
    if size > slots:  # more than fits: what does not is dropped before
        rows, size = rows[:, :, :slots], slots

    def one_row(b: Int[Array, ""], buffer: Array) -> Array:
        b = jnp.asarray(b, jnp.int32)  # outside of jit the loop counts in 64 bits
        fresh = lax.dynamic_slice(
            rows, (b, zero, zero, *zeros), (1, heads, size, *rest)
        )
        # A slice that would pass the end is moved back, and its rows up, by `over`.
        first = jnp.minimum(start[b], slots - size)
        over = start[b] - first
        where = (b, zero, first, *zeros)

        def write_slice(buffer: Array) -> Array:
            if size == 1 and update == "set":
                return lax.dynamic_update_slice(buffer, fresh, where)
            old = lax.dynamic_slice(buffer, where, fresh.shape)
            index = jnp.arange(size, dtype=jnp.int32) - over
            is_new = (index >= 0) & (index < count[b])
            is_new = is_new.reshape(1, 1, size, *(1 for _ in rest))
            new = _UPDATES[update](old, jnp.roll(fresh, over, axis=2))
            blended = jnp.where(is_new, new, old)
            return lax.dynamic_update_slice(buffer, blended, where)

        is_due = (count[b] > 0) & (over < size)
        return lax.cond(is_due, write_slice, lambda buffer: buffer, buffer)

    return lax.fori_loop(zero, jnp.int32(batch), one_row, buffer)


def tile_of(page_size: int, width: int, dtype: jax.typing.DTypeLike) -> int | None:
    """Returns how many rows are written at once on a TPU; None if one alone can be.

    A TPU has bytes in tiles of 32 rows and 128 lanes, and rows of another width, as of
    scales, as columns: 128 tokens side by side. For one row to be written, XLA lays out
    all pages anew, in smaller tiles or with heads or pages side by side; in a loop of
    steps before the loop, and for those who read them once more in every step.
    """
    if dtype not in (jnp.uint8, SCALES):
        return None
    tile = LANES if width % LANES else TILE
    return None if page_size % tile else tile


def write_in_tiles(
    pages: Shaped[Array, "B H NP P W"],
    rows: Shaped[Array, "B H T W"],
    page: Int[Array, "B T"],
    slot: Int[Array, "B T"],
    size: int,
) -> Shaped[Array, "B H NP P W"]:
    """Writes rows at `slot` of a `page`, token by token; none where there is no page.

    The tile of `size` rows around each is read, and written as a whole: in place.
    """
    batch, heads, num_pages, page_size, width = pages.shape
    row = jnp.arange(size, dtype=jnp.int32)[:, None]
    zero = jnp.int32(0)

    def write(i: Int[Array, ""], tiles: Array) -> Array:
        # Outside of jit the loop counts in 64 bits.
        b, t = (jnp.asarray(x, jnp.int32) for x in jnp.divmod(i, rows.shape[2]))
        where = b, zero, page[b, t], slot[b, t] // size, zero, zero
        old = lax.dynamic_slice(tiles, where, (1, heads, 1, 1, size, width))
        new = lax.dynamic_slice(rows, (b, zero, t, zero), (1, heads, 1, width))
        is_new = (row == slot[b, t] % size) & (page[b, t] < num_pages)
        blended = jnp.where(is_new, new[:, :, None, None], old)
        return lax.dynamic_update_slice(tiles, blended, where)

    tiles = pages.reshape(*pages.shape[:3], page_size // size, size, width)
    number = jnp.int32(batch * rows.shape[2])
    return lax.fori_loop(zero, number, write, tiles).reshape(pages.shape)


def gather(buffer: Rows, slots: Int[Array, "B H N"]) -> Array:
    """Reads `slots` of `buffer (B, Hkv, S, ...)`; a negative one reads slot 0: mask it.

    H is Hkv, or 1 where all heads read the same slots. Of a buffer with the newest
    tokens beside it, slots are positions.
    """
    taken = take(every_token(buffer), slots)
    read = floats(taken) if isinstance(taken, Quantized) else taken
    if not isinstance(buffer, WithNewest):
        return read
    place = jnp.maximum(slots, 0) % buffer.newest.shape[2]
    at = jnp.take_along_axis(buffer.at[:, None], place, axis=2)
    oldest = buffer.at.max(1) - buffer.residual  # the last that is read as stored
    is_new = (at == slots) & (at > oldest[:, None, None])
    return jnp.where(is_new[..., None], take(buffer.newest, place), read)


def take(buffer: Any, slots: Int[Array, "B H N"]) -> Any:
    """Copies slots, as :func:`gather` reads them, into a smaller buffer of the kind."""
    slots = jnp.broadcast_to(slots, (*buffer.shape[:2], slots.shape[2]))

    def one_head(buffer: Array, slots: Int[Array, "N"]) -> Array:
        return buffer.at[jnp.maximum(slots, 0)].get(mode="clip")

    def one(buffer: Array) -> Array:
        return jax.vmap(jax.vmap(one_head))(buffer, slots)

    return jax.tree.map(one, buffer)


def where(rows: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Takes what is new in some rows of every array, and what is old in the others."""

    def one(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(one, new, old)


def joined(buffers: Sequence[Any], axis: int) -> Any:
    """Joins buffers of one kind along an axis before their last."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), *buffers)


def write_newest(
    ring: Float[Array, "B H W *D"],
    rows: Float[Array, "B H T *D"],
    positions: Int[Array, "B T"],
    length: Int[Array, "B"],
) -> Float[Array, "B H W *D"]:
    """Writes the rows of the last W of `length` tokens, each in slot position % W.

    A slot keeps its newest row: older ones, and padding, are dropped.
    """
    size = ring.shape[2]
    end = length[:, None]
    is_newest = (positions < end) & (positions >= end - size)
    return write(ring, rows, positions % size, is_newest)


def newest_positions(length: Int[Array, "B"], size: int) -> Int[Array, "B W"]:
    """Returns the position in each slot of such a ring; negative in an empty one."""
    last = length[:, None] - 1
    slots = jnp.arange(size, dtype=jnp.int32)
    return last - (last - slots) % size


def in_host(x: Array) -> bool:
    """Says whether an array lies in the host's memory, by its type."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def num_bytes(state: Any) -> int:
    """Counts the bytes a state (or its `jax.eval_shape`) holds."""
    leaves = jax.tree.leaves(state)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def kv_bytes(spec: CacheSpec, tokens: int) -> int:
    """Counts the bytes of keys and values of `tokens` tokens, all rows and KV heads.

    In rows of their own: those of pages are of `both`, see :func:`row_bytes`.
    """
    return row_bytes(spec, tokens, "keys") + row_bytes(spec, tokens, "values")


def row_bytes(spec: CacheSpec, tokens: int, holds: Holds) -> int:
    """Counts the bytes of the rows of `tokens` tokens, scales too; of every KV head."""
    if isinstance(spec.storage, Storage):
        width = jnp.dtype(SCALES).itemsize
        parts = spec.storage.parts(holds)
        each = sum(part.codes for part in parts) + width * room_for_scales(parts)
    else:
        each = _numbers(spec, holds) * jnp.dtype(spec.dtype).itemsize
    return spec.batch * spec.num_kv_heads * tokens * each


def vector_bytes(spec: CacheSpec, vectors: int) -> int:
    """Counts the bytes of vectors of the cache's dtype, so many for each KV head."""
    itemsize = jnp.dtype(spec.dtype).itemsize
    return spec.batch * spec.num_kv_heads * vectors * spec.head_dim * itemsize
