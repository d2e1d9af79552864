"""Pages in host memory, and those of them that a device keeps to read.

A step moves the listed pages that the device lacks, one by one, and nothing else: slots
are given to them by who was read longest ago. The page of the newest tokens lies on the
device until it is full.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from kvjax.stores import buffers
from pallas_kernels.shared.quantized import Rows

Memory = Literal["pinned_host", "device"]

SPACES = {
    "pinned_host": jax.memory.Space.Host,
    "device": jax.memory.Space.Device,
}


class Hosted(NamedTuple):
    """Rows of pages beyond the device's memory: they are only sliced and overwritten.

    What moves them follows the memory that they are in; :func:`place` chose it.
    """

    rows: Float[Rows, "B Hkv NP P D2"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape


class Offloaded(NamedTuple):
    """The pages of a row: full ones in host memory, some of them on the device too.

    The device has C slots for each KV head: C - 1 of pages that were read, and the last
    of the page of the newest tokens, which the host gets when it is full. A slot that
    is read holds a full page, or is the last: read in that order, positions in slots
    tell a token that is there from one that is not as positions in pages do.
    """

    host: Hosted
    slots: Float[Rows, "B Hkv C P D2"]
    held: Int[Array, "B Hkv C_1"]  # the page in each slot but the last, -1 = none
    used: Int[Array, "B Hkv C_1"]  # the length of the text when it was last listed
    asked: Int[Array, "B"]  # pages listed so far, of all KV heads; no newest ones
    moved: Int[Array, "B"]  # how many of them came over the link

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all pages."""
        return self.host.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.slots.dtype


# --- memories


def place(rows: Float[Rows, "B Hkv NP P D2"], memory: Memory) -> Hosted:
    """Puts rows into a memory of the machine."""
    return Hosted(jax.tree.map(lambda x: jax.device_put(x, SPACES[memory]), rows))


def memory_of(hosted: Hosted) -> Memory:
    """Returns the memory that rows are in."""
    is_host = any(map(buffers.in_host, jax.tree.leaves(hosted)))
    return "pinned_host" if is_host else "device"


def on_device(hosted: Hosted) -> Float[Rows, "B Hkv NP P D2"]:
    """Returns all rows in the device's memory."""
    return jax.tree.map(_to_device, hosted.rows)


def _to_device(x: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Device)


def _as(x: Array, other: Array) -> Array:
    """Returns the array in the memory of the other."""
    return jax.device_put(x, jax.typeof(other).memory_space)


# --- making and writing


def write_chunk(
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
    # A slice that would pass the end is moved back; what it has more is as it was.
    first = jnp.minimum(length // page_size, num_pages - most)

    def one(host: Array, pages: Array) -> Array:
        def one_row(b: Int[Array, ""], host: Array) -> Array:
            where = _at(b, 0, first[b], pages.ndim)
            shape = (1, pages.shape[1], most, *pages.shape[3:])
            fresh = lax.dynamic_slice(pages, where, shape)
            return lax.dynamic_update_slice(host, _as(fresh, host), where)

        return lax.fori_loop(jnp.int32(0), jnp.int32(batch), one_row, host)

    return Hosted(jax.tree.map(one, hosted.rows, pages))


def offloaded(host: Hosted, length: Int[Array, "B"], slots: int) -> Offloaded:
    """Makes pages of which the device holds none but the newest.

    Args:
        host: all pages.
        length: tokens in each row.
        slots: of other pages that the device has room for.
    """
    batch, heads, num_pages, page_size = host.shape[:4]
    newest = jnp.minimum(length // page_size, num_pages - 1)

    def with_newest(host: Array) -> Array:
        empty = (batch, heads, slots + 1, *host.shape[3:])

        def one_row(b: Int[Array, ""], kept: Array) -> Array:
            shape = (1, heads, 1, *host.shape[3:])
            page = lax.dynamic_slice(host, _at(b, 0, newest[b], host.ndim), shape)
            where = _at(b, 0, slots, host.ndim)
            return lax.dynamic_update_slice(kept, _to_device(page), where)

        kept = buffers.allocate(empty, host.dtype)
        return lax.fori_loop(jnp.int32(0), jnp.int32(batch), one_row, kept)

    shape = (batch, heads, slots)
    return Offloaded(
        host,
        jax.tree.map(with_newest, host.rows),
        buffers.allocate(shape, jnp.int32, fill=-1.0),
        buffers.allocate(shape, jnp.int32, fill=-1.0),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


def newest_slot(pages: Offloaded, length: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns the position in all slots of the token at position `length`."""
    page_size = pages.shape[3]
    return (pages.slots.shape[2] - 1) * page_size + length % page_size


def keep_full(pages: Offloaded, length: Int[Array, "B"]) -> Offloaded:
    """Writes the newest page of rows in which it is full to the host.

    Args:
        length: tokens in each row, the newest just written.
    """
    heads, num_pages, page_size = pages.shape[1:4]
    page = length // page_size - 1
    # A row that is past its end has dropped its newest tokens.
    is_full = (length % page_size == 0) & (page >= 0) & (page < num_pages)
    rows, count = _which(is_full)
    last = pages.slots.shape[2] - 1

    def one(host: Array, slots: Array) -> Array:
        def one_row(i: Int[Array, ""], host: Array) -> Array:
            b = rows[i]
            shape = (1, heads, 1, *slots.shape[3:])
            full = lax.dynamic_slice(slots, _at(b, 0, last, slots.ndim), shape)
            where = _at(b, 0, page[b], host.ndim)
            return lax.dynamic_update_slice(host, _as(full, host), where)

        return lax.fori_loop(jnp.int32(0), count, one_row, host)

    host = Hosted(jax.tree.map(one, pages.host.rows, pages.slots))
    return pages._replace(host=host)


def newest_page(pages: Offloaded) -> Float[Rows, "B Hkv 1 P D2"]:
    """Returns the page of the newest tokens."""
    return jax.tree.map(lambda x: x[:, :, -1:], pages.slots)


# --- reading


def bring(
    pages: Offloaded, page_ids: Int[Array, "B H K"], length: Int[Array, "B"]
) -> tuple[Offloaded, Int[Array, "B H K"]]:
    """Moves the listed pages that the device lacks, over those read longest ago.

    Args:
        page_ids: -1 = none; H is Hkv, or Hq lists. Of one KV head not more than there
            are slots beside the newest page's, which comes free.
        length: tokens in each row.

    Returns:
        The pages, and the slots of those listed, -1 = none.
    """
    batch, heads, num_pages, page_size = pages.shape[:4]
    newest = ((length - 1) // page_size)[:, None, None]
    by_head = page_ids.reshape(batch, heads, -1)
    listed = jnp.where(by_head == newest, -1, by_head)
    slot_of = _slots_of(pages.held, num_pages)

    # Each missing page once, though several query heads list it.
    ordered = selection.in_order(listed)
    before = jnp.pad(ordered[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    is_asked = (ordered >= 0) & (ordered != before)
    is_missing = is_asked & (_taken(slot_of, ordered) < 0)

    # What is listed now was used last: slots of other pages come before its own.
    asked_of_all = selection.is_listed(listed, num_pages)
    is_used = _taken(asked_of_all, pages.held) & (pages.held >= 0)
    now = length[:, None, None]
    used = jnp.where(is_used, now, pages.used)
    by_age = jnp.argsort(used, axis=-1, stable=True).astype(jnp.int32)
    rank = jnp.cumsum(is_missing, -1, dtype=jnp.int32) - 1
    slot = jnp.where(is_missing, _taken(by_age, rank), used.shape[-1])

    held = buffers.write(pages.held, ordered, slot, is_missing)
    used = buffers.write(used, jnp.broadcast_to(now, slot.shape), slot, is_missing)
    slots = _move(pages, ordered, slot, is_missing)
    last = pages.slots.shape[2] - 1
    places = _taken(_slots_of(held, num_pages), by_head)
    places = jnp.where(by_head == newest, last, jnp.where(by_head < 0, -1, places))
    brought = pages._replace(
        slots=slots,
        held=held,
        used=used,
        asked=pages.asked + is_asked.sum((1, 2), dtype=jnp.int32),
        moved=pages.moved + is_missing.sum((1, 2), dtype=jnp.int32),
    )
    return brought, places.reshape(page_ids.shape)


def _move(
    pages: Offloaded,
    page: Int[Array, "B Hkv M"],
    slot: Int[Array, "B Hkv M"],
    is_missing: Bool[Array, "B Hkv M"],
) -> Float[Rows, "B Hkv C P D2"]:
    """Copies pages into slots, those that are missing and no others."""
    which, count = _which(is_missing.reshape(-1))
    heads, listed = page.shape[1:]
    page, slot = page.reshape(-1), slot.reshape(-1)

    def one(i: Int[Array, ""], slots: Rows) -> Rows:
        entry = which[i]
        b, h = entry // (heads * listed), entry // listed % heads

        def move(slots: Array, host: Array) -> Array:
            shape = (1, 1, 1, *host.shape[3:])
            rows = lax.dynamic_slice(host, _at(b, h, page[entry], host.ndim), shape)
            where = _at(b, h, slot[entry], host.ndim)
            return lax.dynamic_update_slice(slots, _to_device(rows), where)

        return jax.tree.map(move, slots, pages.host.rows)

    return lax.fori_loop(jnp.int32(0), count, one, pages.slots)


def _slots_of(held: Int[Array, "B Hkv C_1"], num_pages: int) -> Int[Array, "B Hkv NP"]:
    """Returns the slot of every page, -1 where none holds it."""
    slots = jnp.arange(held.shape[-1], dtype=jnp.int32)
    none = jnp.full((*held.shape[:2], num_pages), -1, jnp.int32)
    return buffers.write(none, jnp.broadcast_to(slots, held.shape), held, held >= 0)


def _taken(x: Array, index: Int[Array, "B Hkv M"]) -> Array:
    return jnp.take_along_axis(x, jnp.maximum(index, 0), axis=-1)


def _which(flags: Array) -> tuple[Int[Array, "N"], Int[Array, ""]]:
    """Returns where flags are True, those places first, and how many they are."""
    (places,) = jnp.nonzero(flags, size=flags.size, fill_value=0)
    return places.astype(jnp.int32), flags.sum(dtype=jnp.int32)


def _at(
    row: Int[Array, ""],
    head: int | Int[Array, ""],
    page: int | Int[Array, ""],
    ndim: int,
) -> tuple[Int[Array, ""], ...]:
    """The place of a page, as slices name it: of one type also where 64 bits are on."""
    places = (row, head, page, *[0] * (ndim - 3))
    return tuple(jnp.asarray(place, jnp.int32) for place in places)
