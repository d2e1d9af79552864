"""Rows in the host's memory: chunks are written there, and blocks come back.

A buffer has tokens in slots `(B, Hkv, S, D)`, or in pages `(B, Hkv, NP, P, D2)`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.interface import CacheSpec
from kvjax.stores import buffers
from pallas_kernels.decode_attention import decode_attention, streamed_attention
from pallas_kernels.decode_attention.reference import BLOCK
from pallas_kernels.shared.quantized import Rows

Memory = Literal["pinned_host", "device"]

WORD = 4  # bytes
SPACES = {
    "pinned_host": jax.memory.Space.Host,
    "device": jax.memory.Space.Device,
}


class Hosted(NamedTuple):
    """Rows beyond the device's memory: they are only sliced and overwritten.

    What moves them follows the memory that they are in; :func:`place` chose it.
    """

    rows: Float[Rows, "B Hkv *N D"]

    ONE_DEVICE = "a cache beyond the device's memory"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.rows.dtype


AnyRows = Rows | Hosted  # a buffer of rows, wherever it is


def page_size_of(rows: Rows | Hosted) -> int:
    """Returns the tokens that move together: a page, or those that share words.

    A TPU moves words of neighbouring tokens: two of bfloat16, and four of bytes. Where
    slots do not divide so, one token.
    """
    if rows.ndim == 5:
        return rows.shape[3]
    return _together(
        min(x.dtype.itemsize for x in jax.tree.leaves(rows)), rows.shape[2]
    )


def tokens_together(spec: CacheSpec) -> int:
    """Returns how many tokens of a layer move together, where they are in slots."""
    is_stored = spec.storage is not None
    width = 1 if is_stored else jnp.dtype(spec.dtype).itemsize
    return _together(width, spec.capacity)


def _together(width: int, slots: int) -> int:
    size = max(1, WORD // width)
    return 1 if slots % size else size


def num_pages_of(rows: Rows | Hosted) -> int:
    """Returns how many there are of what moves together."""
    return rows.shape[2] if rows.ndim == 5 else rows.shape[2] // page_size_of(rows)


# --- memories


def place(rows: Float[Rows, "B Hkv *N D"], memory: Memory) -> Hosted:
    """Puts rows into a memory of the machine."""
    return Hosted(jax.tree.map(lambda x: jax.device_put(x, SPACES[memory]), rows))


def memory_of(hosted: Hosted) -> Memory:
    """Returns the memory that rows are in."""
    is_host = any(map(buffers.in_host, jax.tree.leaves(hosted)))
    return "pinned_host" if is_host else "device"


def on_device(hosted: Hosted) -> Float[Rows, "B Hkv *N D"]:
    """Returns all rows in the device's memory."""
    return jax.tree.map(to_device, hosted.rows)


def to_device(x: Array) -> Array:
    """Returns an array in the device's memory."""
    return jax.device_put(x, jax.memory.Space.Device)


def beside(x: Array, other: Array) -> Array:
    """Returns the array in the memory of the other."""
    return jax.device_put(x, jax.typeof(other).memory_space)


def at(
    row: int | Int[Array, ""],
    head: int | Int[Array, ""],
    page: int | Int[Array, ""],
    ndim: int,
) -> tuple[Int[Array, ""], ...]:
    """The place of a page, as slices name it: of one type also where 64 bits are on."""
    places = (row, head, page, *[0] * (ndim - 3))
    return tuple(jnp.asarray(place, jnp.int32) for place in places)


def take_pages(
    x: Array,
    row: int | Int[Array, ""],
    head: int | Int[Array, ""],
    page: int | Int[Array, ""],
    page_size: int,
    *,
    heads: int,
    pages: int = 1,
) -> Array:
    """Slices adjacent pages of some heads of a row, in pages or in slots."""
    scale = page_size if x.ndim == 4 else 1
    shape = (1, heads, pages * scale, *x.shape[3:])
    return lax.dynamic_slice(x, at(row, head, page * scale, x.ndim), shape)


def put_pages(
    x: Array,
    pages: Array,
    row: int | Int[Array, ""],
    head: int | Int[Array, ""],
    page: int | Int[Array, ""],
    page_size: int,
) -> Array:
    """Overwrites pages, with those of any memory, as :func:`take_pages` slices."""
    scale = page_size if x.ndim == 4 else 1
    where = at(row, head, page * scale, x.ndim)
    return lax.dynamic_update_slice(x, beside(pages, x), where)


def which(flags: Bool[Array, "N"]) -> tuple[Int[Array, "N"], Int[Array, ""]]:
    """Returns where flags are True, those places first, and how many they are."""
    (places,) = jnp.nonzero(flags, size=flags.size, fill_value=0)
    return places.astype(jnp.int32), flags.sum(dtype=jnp.int32)


# --- writing


def write(
    hosted: Hosted,
    rows: Float[Rows, "B Hkv T D"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Hosted:
    """Writes the first `count` of rows from token `start` on; none past the end.

    The pages that they lie in come to the device for it, and go back.
    """
    batch, heads = hosted.shape[:2]
    num_pages, page_size = num_pages_of(hosted), page_size_of(hosted)
    size = rows.shape[2]
    most = min((size + page_size - 2) // page_size + 1, num_pages)
    # A slice that would pass the end is moved back; what it has more is as it was.
    first = jnp.minimum(start // page_size, num_pages - most)

    def window(host: Array) -> Array:
        def one_row(b: Int[Array, ""], found: Array) -> Array:
            kept = {"heads": heads, "pages": most}
            pages = take_pages(host, b, 0, first[b], page_size, **kept)
            return put_pages(found, pages, b, 0, 0, page_size)

        here = most if host.ndim == 5 else most * page_size
        found = jnp.zeros((batch, heads, here, *host.shape[3:]), host.dtype)
        found = lax.fori_loop(jnp.int32(0), jnp.int32(batch), one_row, found)
        return found.reshape(batch, heads, most * page_size, host.shape[-1])

    before = jax.tree.map(window, hosted.rows)
    after = buffers.write_run(before, rows, start - first * page_size, count)

    def one(host: Array, written: Array) -> Array:
        written = written.reshape(batch, heads, -1, *host.shape[3:])

        def one_row(b: Int[Array, ""], host: Array) -> Array:
            pages = lax.dynamic_slice_in_dim(written, b, 1, 0)
            return put_pages(host, pages, b, 0, first[b], page_size)

        return lax.fori_loop(jnp.int32(0), jnp.int32(batch), one_row, host)

    return Hosted(jax.tree.map(one, hosted.rows, after))


def write_pages(
    hosted: Hosted,
    pages: Float[Rows, "B Hkv NP P D2"],
    length: Int[Array, "B"],
    size: int,
) -> Hosted:
    """Writes the pages that at most `size` tokens behind `length` lie in.

    Args:
        pages: all of them, on the device, as they are to be.
    """
    batch, _, num_pages, page_size = pages.shape[:4]
    most = min((size + page_size - 2) // page_size + 1, num_pages)
    first = jnp.minimum(length // page_size, num_pages - most)

    def one(host: Array, pages: Array) -> Array:
        def one_row(b: Int[Array, ""], host: Array) -> Array:
            where = at(b, 0, first[b], pages.ndim)
            shape = (1, pages.shape[1], most, *pages.shape[3:])
            fresh = lax.dynamic_slice(pages, where, shape)
            return lax.dynamic_update_slice(host, beside(fresh, host), where)

        return lax.fori_loop(jnp.int32(0), jnp.int32(batch), one_row, host)

    return Hosted(jax.tree.map(one, hosted.rows, pages))


# --- reading


def num_slots(rows: AnyRows) -> int:
    """Counts the tokens that a buffer has room for."""
    return rows.shape[2] * _in_page(rows)


def _in_page(rows: AnyRows) -> int:
    return rows.shape[3] if rows.ndim == 5 else 1


def block(
    rows: AnyRows, start: int | Int[Array, ""], size: int
) -> Float[Rows, "B Hkv N D"]:
    """Brings `size` tokens from `start` on to the device, of every row and head."""
    page_size = _in_page(rows)
    num_pages, whole = rows.shape[2], size
    first = jnp.asarray(start, jnp.int32) // page_size
    if page_size > 1:
        # One page more where blocks need not begin with pages.
        spare = 2 if size % page_size or BLOCK % page_size else 0
        whole = min(size // page_size + spare, num_pages)
        first = jnp.minimum(first, num_pages - whole)
    offset = start - first * page_size

    def one(x: Array) -> Array:
        shape = (*x.shape[:2], whole, *x.shape[3:])
        pages = to_device(lax.dynamic_slice(x, at(0, 0, first, x.ndim), shape))
        tokens = pages.reshape(*x.shape[:2], whole * page_size, x.shape[-1])
        if tokens.shape[2] == size:
            return tokens
        return lax.dynamic_slice_in_dim(tokens, offset, size, 2)

    return jax.tree.map(one, rows.rows if isinstance(rows, Hosted) else rows)


def attend(
    q: Float[Array, "B Hq T D"],
    k: AnyRows,
    v: AnyRows,
    positions: Int[Array, "B T"],
    *,
    sm_scale: float,
) -> tuple[Float[Array, "B Hq T D"], Float[Array, "B Hq T"]]:
    """Attends causally to keys and values in slots; those of a host come by blocks.

    As :func:`pallas_kernels.decode_attention.decode_attention`.
    """
    if not isinstance(k, Hosted) and not isinstance(v, Hosted):
        out, lse = decode_attention(q, k, v, positions, sm_scale=sm_scale)
        return out, lse
    return streamed_attention(
        q,
        lambda start, size: (block(k, start, size), block(v, start, size)),
        num_slots(v),
        positions,
        sm_scale=sm_scale,
    )
