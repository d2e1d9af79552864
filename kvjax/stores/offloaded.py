"""Rows in host memory, and those of them that a device keeps to read.

A step moves the listed pages that the device lacks, one by one, and nothing else: slots
are given to them by who was read longest ago. The page of the newest tokens lies on the
device until it is full. Of rows in slots a page is the tokens that a machine moves
together, one or a few (:func:`kvjax.stores.hosted.page_size_of`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from kvjax.stores import buffers, counting, hosted
from kvjax.stores.hosted import Hosted, put_pages, take_pages
from pallas_kernels.shared.quantized import Rows


class Offloaded(NamedTuple):
    """The pages of a row: full ones in host memory, some of them on the device too.

    The device has C slots for each KV head: C - 1 of pages that were read, and the last
    of the page of the newest tokens, which the host gets when it is full. A slot that
    is read holds a full page, or is the last: read in that order, positions in slots
    tell a token that is there from one that is not as positions in pages do.
    """

    host: Hosted
    slots: Float[Rows, "B Hkv *C D2"]
    held: Int[Array, "B Hkv C_1"]  # the page in each slot but the last, -1 = none
    used: Int[Array, "B Hkv C_1"]  # the length of the text when it was last listed
    # Counts in two words, see `kvjax.stores.counting`: pages listed so far, of all KV
    # heads, no newest ones; and how many of them came over the link.
    asked: Int[Array, "B 2"]
    moved: Int[Array, "B 2"]

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

    @property
    def page_size(self) -> int:
        """The tokens that move together."""
        return hosted.page_size_of(self.host)

    @property
    def num_pages(self) -> int:
        return hosted.num_pages_of(self.host)

    @property
    def unit(self) -> int:
        """The bytes of a page of one KV head, which move together."""
        batch, heads = self.shape[:2]
        return buffers.num_bytes(self.host) // (batch * heads * self.num_pages)


class Streamed(NamedTuple):
    """Rows in host memory that a step reads all of, in blocks, or does not read."""

    host: Hosted
    newest: Float[Rows, "B Hkv P D"]  # the page of the newest token, there too
    asked: Int[Array, "B 2"]  # tokens read so far, of all KV heads, in two words
    moved: Int[Array, "B 2"]  # the same: all of them came over the link

    @property
    def shape(self) -> tuple[int, ...]:
        return self.host.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.host.dtype

    @property
    def page_size(self) -> int:
        """The tokens that move together, where not all do."""
        return hosted.page_size_of(self.host)

    @property
    def unit(self) -> int:
        """The bytes of a token of all KV heads."""
        return buffers.num_bytes(self.host) // (self.shape[0] * self.shape[2])


AnyRows = hosted.AnyRows | Offloaded | Streamed  # a buffer of rows, wherever it is


class Crossed(NamedTuple):
    """Bytes that steps of each row listed, and of them those that were moved."""

    asked: Float[np.ndarray, "B"]
    moved: Float[np.ndarray, "B"]


def crossed(state: Any) -> Crossed | None:
    """Counts what was listed and moved since a prompt ended; None if nothing can be."""

    def is_counted(leaf: Any) -> bool:
        return isinstance(leaf, Offloaded | Streamed | Crossed)

    def counted(leaf: Offloaded | Streamed | Crossed) -> Crossed:
        if isinstance(leaf, Crossed):
            return leaf
        counts = (counting.total(x) for x in (leaf.asked, leaf.moved))
        return Crossed(*(leaf.unit * x.astype(np.float64) for x in counts))

    leaves = filter(is_counted, jax.tree.leaves(state, is_leaf=is_counted))
    counts = list(map(counted, leaves))
    if not counts:
        return None
    asked, moved = (np.sum(x, axis=0) for x in zip(*counts, strict=True))
    return Crossed(asked, moved)


# --- making and writing


def offloaded(host: Hosted, length: Int[Array, "B"], slots: int) -> Offloaded:
    """Makes pages of which the device holds none but the newest.

    Args:
        host: all pages.
        length: tokens in each row.
        slots: of other pages that the device has room for.
    """
    shape = (*host.shape[:2], slots)
    return Offloaded(
        host,
        _with_newest(host, length, slots),
        buffers.allocate(shape, jnp.int32, fill=-1.0),
        buffers.allocate(shape, jnp.int32, fill=-1.0),
        counting.none(length),
        counting.none(length),
    )


def streamed(host: Hosted, length: Int[Array, "B"]) -> Streamed:
    """Makes rows that are read in blocks, none of them yet.

    Args:
        host: all rows.
        length: tokens in each row.
    """
    newest = _with_newest(host, length, 0)
    return Streamed(host, newest, counting.none(length), counting.none(length))


def _with_newest(host: Hosted, length: Int[Array, "B"], slots: int) -> Any:
    """Makes empty slots on the device, and one behind them of the newest page."""
    batch, heads = host.shape[:2]
    num_pages, page_size = hosted.num_pages_of(host), hosted.page_size_of(host)
    newest = jnp.minimum(length // page_size, num_pages - 1)

    def one(host: Array) -> Array:
        def one_row(b: Int[Array, ""], kept: Array) -> Array:
            page = take_pages(host, b, 0, newest[b], page_size, heads=heads)
            return put_pages(kept, page, b, 0, slots, page_size)

        here = (slots + 1) * (page_size if host.ndim == 4 else 1)
        kept = buffers.allocate((batch, heads, here, *host.shape[3:]), host.dtype)
        return lax.fori_loop(jnp.int32(0), jnp.int32(batch), one_row, kept)

    return jax.tree.map(one, host.rows)


def newest_slot(pages: Offloaded, length: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns the position in all slots of the token at position `length`."""
    page_size = pages.page_size
    return pages.held.shape[-1] * page_size + length % page_size


def keep_full(pages: Offloaded, length: Int[Array, "B"]) -> Offloaded:
    """Writes the newest page of rows in which it is full to the host.

    Args:
        length: tokens in each row, the newest just written.
    """
    heads, num_pages, page_size = pages.shape[1], pages.num_pages, pages.page_size
    page = length // page_size - 1
    # A row that is past its end has dropped its newest tokens.
    is_full = (length % page_size == 0) & (page >= 0) & (page < num_pages)
    rows, count = hosted.which(is_full)
    last = pages.held.shape[-1]

    def one(host: Array, slots: Array) -> Array:
        def one_row(i: Int[Array, ""], host: Array) -> Array:
            b = rows[i]
            full = take_pages(slots, b, 0, last, page_size, heads=heads)
            return put_pages(host, full, b, 0, page[b], page_size)

        return lax.fori_loop(jnp.int32(0), count, one_row, host)

    host = Hosted(jax.tree.map(one, pages.host.rows, pages.slots))
    return pages._replace(host=host)


def newest_page(pages: Offloaded) -> Float[Rows, "B Hkv 1 P D2"]:
    """Returns the page of the newest tokens."""
    return jax.tree.map(lambda x: x[:, :, -1:], pages.slots)


def write_run(
    rows: AnyRows,
    new: Float[Rows, "B Hkv T D"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Any:
    """Writes as :func:`kvjax.stores.buffers.write_run`, wherever the buffer is.

    Raises:
        ValueError: for more than one token of a buffer that decodes from a host.
    """
    if isinstance(rows, Hosted):
        return hosted.write(rows, new, start, count)
    if not isinstance(rows, Offloaded | Streamed):
        return buffers.write_run(rows, new, start, count)
    check_one(new)
    if isinstance(rows, Streamed):
        return _write_through(rows, new, start, count)
    slot = newest_slot(rows, start)
    written = rows._replace(slots=buffers.write_run(rows.slots, new, slot, count))
    return keep_full(written, start + count)


def _write_through(
    rows: Streamed,
    new: Float[Rows, "B Hkv 1 D"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Streamed:
    """Writes a token to the newest page, and all of that to the host."""
    num_pages, page_size = hosted.num_pages_of(rows.host), rows.page_size
    newest = buffers.write_run(rows.newest, new, start % page_size, count)
    page = start // page_size
    places, number = hosted.which((count > 0) & (page < num_pages))

    def one(host: Array, newest: Array) -> Array:
        def one_row(i: Int[Array, ""], host: Array) -> Array:
            b = places[i]
            fresh = lax.dynamic_slice_in_dim(newest, b, 1, 0)
            return put_pages(host, fresh, b, 0, page[b], page_size)

        return lax.fori_loop(jnp.int32(0), number, one_row, host)

    host = Hosted(jax.tree.map(one, rows.host.rows, newest))
    return rows._replace(host=host, newest=newest)


def check_one(rows: Float[Rows, "B Hkv T D"]) -> None:
    """Raises ValueError unless there is one token to write."""
    if rows.shape[2] != 1:
        raise ValueError(
            f"{rows.shape[2]} tokens cannot be written at once to offloaded rows: "
            "append them one by one."
        )


# --- reading


def gather(
    rows: Rows | Offloaded, slots: Int[Array, "B H N"], length: Int[Array, "B"]
) -> tuple[Any, Float[Array, "B Hkv N D"]]:
    """Reads tokens as :func:`kvjax.stores.buffers.gather`, brought where they are not.

    Args:
        slots: positions of tokens; of one KV head not more than the device has room
            for beside the newest.
        length: tokens in each row.

    Returns:
        The buffer, and what was read.
    """
    if isinstance(rows, Offloaded):
        rows, _ = bring(rows, pages_of(rows, slots), length)
    return rows, read(rows, slots, length)


def read(
    rows: Rows | Offloaded, slots: Int[Array, "B H N"], length: Int[Array, "B"]
) -> Float[Array, "B Hkv N D"]:
    """Reads tokens as :func:`gather`, which were brought or are the newest."""
    if not isinstance(rows, Offloaded):
        return buffers.gather(rows, slots)
    size = rows.page_size
    places = places_of(rows, pages_of(rows, slots), length)
    places = jnp.where(places < 0, -1, places * size + jnp.maximum(slots, 0) % size)
    return buffers.gather(_by_token(rows.slots), places)


def pages_of(rows: Offloaded, slots: Int[Array, "B H N"]) -> Int[Array, "B Hkv N"]:
    """Returns the pages that tokens lie in, -1 = none."""
    slots = jnp.broadcast_to(slots, (*rows.shape[:2], slots.shape[2]))
    return jnp.where(slots < 0, -1, slots // rows.page_size)


def _by_token(slots: Float[Rows, "B Hkv *C D2"]) -> Float[Rows, "B Hkv S D2"]:
    """Returns slots of pages as slots of tokens."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1]), slots)


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
    batch, heads, num_pages = *pages.shape[:2], pages.num_pages
    newest = ((length - 1) // pages.page_size)[:, None, None]
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
    brought = pages._replace(
        slots=slots,
        held=held,
        used=used,
        asked=counting.add(pages.asked, is_asked.sum((1, 2), dtype=jnp.int32)),
        moved=counting.add(pages.moved, is_missing.sum((1, 2), dtype=jnp.int32)),
    )
    return brought, places_of(brought, page_ids, length)


def places_of(
    pages: Offloaded, page_ids: Int[Array, "B H K"], length: Int[Array, "B"]
) -> Int[Array, "B H K"]:
    """Returns the slots of pages, -1 where the device does not have them.

    Args:
        pages, page_ids, length: as of :func:`bring`.
    """
    newest = ((length - 1) // pages.page_size)[:, None, None]
    by_head = page_ids.reshape(*pages.shape[:2], -1)
    last = pages.held.shape[-1]
    places = _taken(_slots_of(pages.held, pages.num_pages), by_head)
    places = jnp.where(by_head == newest, last, places)
    return jnp.where(by_head < 0, -1, places).reshape(page_ids.shape)


def _move(
    pages: Offloaded,
    page: Int[Array, "B Hkv M"],
    slot: Int[Array, "B Hkv M"],
    is_missing: Bool[Array, "B Hkv M"],
) -> Float[Rows, "B Hkv *C D2"]:
    """Copies pages into slots, those that are missing and no others."""
    places, count = hosted.which(is_missing.reshape(-1))
    heads, listed = page.shape[1:]
    page, slot, page_size = page.reshape(-1), slot.reshape(-1), pages.page_size

    def one(i: Int[Array, ""], slots: Rows) -> Rows:
        entry = places[i]
        b, h = entry // (heads * listed), entry // listed % heads

        def move(slots: Array, host: Array) -> Array:
            rows = take_pages(host, b, h, page[entry], page_size, heads=1)
            return put_pages(slots, rows, b, h, slot[entry], page_size)

        return jax.tree.map(move, slots, pages.host.rows)

    return lax.fori_loop(jnp.int32(0), count, one, pages.slots)


def _slots_of(held: Int[Array, "B Hkv C_1"], num_pages: int) -> Int[Array, "B Hkv NP"]:
    """Returns the slot of every page, -1 where none holds it."""
    slots = jnp.arange(held.shape[-1], dtype=jnp.int32)
    none = jnp.full((*held.shape[:2], num_pages), -1, jnp.int32)
    return buffers.write(none, jnp.broadcast_to(slots, held.shape), held, held >= 0)


def _taken(x: Array, index: Int[Array, "B Hkv M"]) -> Array:
    return jnp.take_along_axis(x, jnp.maximum(index, 0), axis=-1)
