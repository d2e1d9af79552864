"""A cache in pages, keys and values fused, with the extremes of each page's keys."""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial
from kvjax.interface import CacheSpec
from kvjax.stores import buffers, contiguous, hosted, offloaded
from kvjax.stores.hosted import Hosted
from kvjax.stores.offloaded import Offloaded
from kvjax.stores.page_statistics import page_statistics
from pallas_kernels.decode_attention import streamed_attention
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Rows, WithNewest, every_token, stored


class Paged(NamedTuple):
    """Every token of a row, in pages in order of position."""

    spec: CacheSpec
    # Rotated keys, then values: D2 = 2 D. Beyond the device they are a `Hosted`, and
    # while decoding an `Offloaded`.
    pages: Float[Rows, "B Hkv NP P D2"]
    # None where the method has no use for extremes.
    page_min: Float[Array, "B Hkv NP D"]  # +inf while the page is empty
    page_max: Float[Array, "B Hkv NP D"]  # -inf while the page is empty
    length: Int[Array, "B"]

    ROWS = types.MappingProxyType({"pages": "both"})
    KEEPS_NEWEST = True


def paged(spec: CacheSpec, page_size: int, *, extremes: bool = True) -> Paged:
    """Makes an empty store of at least `spec.capacity` tokens a row.

    Args:
        spec: of the layer.
        page_size: tokens in a page.
        extremes: keep those of the keys of each page.
    """
    num_pages = -(-spec.capacity // page_size)
    heads = (spec.batch, spec.num_kv_heads, num_pages)
    pages = buffers.allocate_rows(spec, (*heads, page_size), "both")
    none: Any = None
    if not extremes:
        return Paged(spec, pages, none, none, buffers.lengths(spec))
    low = buffers.allocate((*heads, spec.head_dim), spec.dtype, fill=jnp.inf)
    high = buffers.allocate((*heads, spec.head_dim), spec.dtype, fill=-jnp.inf)
    return Paged(spec, pages, low, high, buffers.lengths(spec))


def extend(
    store: Paged,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None = None,
) -> Paged:
    """Rotates and writes the next tokens of each row; `lengths=None` means all T."""
    written, k, page, valid = _write(store, k, v, lengths)
    if store.page_min is None:
        return written
    return written._replace(
        page_min=buffers.write(store.page_min, k, page, valid, "min"),
        page_max=buffers.write(store.page_max, k, page, valid, "max"),
    )


def revise(
    store: Paged,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    count: Int[Array, "B"],
) -> Paged:
    """Appends one token, and gives the count - 1 before it new keys and values.

    The extremes of their pages are taken from the keys that are there then: what was
    overwritten leaves no trace.

    Args:
        store: without the new token.
        k, v: un-rotated, the new token last.
        count: from 1 to T, how many of the last rows are real; at most all the tokens.
    """
    before = store._replace(length=store.length - (count - 1))
    k, v = contiguous.real_first(k, count), contiguous.real_first(v, count)
    written = _write(before, k, v, count)[0]
    return _take_extremes(written, written.length, k.shape[2])


def rewind(store: Paged, count: Int[Array, "B"], most: int) -> Paged:
    """Takes back the newest `count` tokens, at most `most`, as if they had not come."""
    length = store.length - count
    pages = quantized.rewound(store.pages, length)
    shorter = store._replace(pages=pages, length=length)
    return _take_extremes(shorter, store.length, most)


def _write(
    store: Paged,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None,
) -> tuple[Paged, Float[Array, "B Hkv T D"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Writes the next tokens, and leaves the extremes of their pages as they were.

    Returns:
        The store; the rotated keys, their pages, and which of them are real.
    """
    positions, valid = buffers.chunk_positions(store.length, lengths, k.shape[2])
    count = valid.sum(-1, dtype=jnp.int32)
    length = store.length + count
    k = store.spec.rope(k, positions, length).astype(store.spec.dtype)
    fused = jnp.concatenate([k, v.astype(store.spec.dtype)], axis=-1)
    num_pages, page_size = store.pages.shape[2:4]
    page = jnp.where(valid, positions // page_size, num_pages)
    if isinstance(store.pages, Offloaded):
        pages, rows = _write_newest(store.pages, fused, store.length, count)
    elif isinstance(store.pages, Hosted):
        rows = stored(store.pages.rows, fused)
        pages = hosted.write(store.pages, rows, store.length, count)
    else:
        rows = stored(store.pages, fused)
        pages = _write_rows(every_token(store.pages), rows, positions, valid)
        pages = buffers.keep_newest(store.pages, pages, fused, positions, valid)
    # The extremes of keys are those of what is stored of them: they stay as they are
    # when a token is the newest no more.
    k = quantized.floats(rows)[..., : store.spec.head_dim]
    return store._replace(pages=pages, length=length), k, page, valid


def _write_newest(
    pages: Offloaded,
    fused: Float[Array, "B Hkv 1 D2"],
    length: Int[Array, "B"],
    count: Int[Array, "B"],
) -> tuple[Offloaded, Float[Rows, "B Hkv 1 D2"]]:
    """Writes one token behind `length` on the device, and there is its row as stored.

    A page that it fills goes to the host.
    """
    offloaded.check_one(fused)
    rows = stored(pages.slots, fused)
    slot = offloaded.newest_slot(pages, length)[:, None]
    slots = _write_rows(pages.slots, rows, slot, (count > 0)[:, None])
    written = pages._replace(slots=slots)
    return offloaded.keep_full(written, length + count), rows


def _write_rows(
    pages: Float[Rows, "B Hkv NP P D2"],
    rows: Float[Rows, "B Hkv T D2"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Any:
    """Writes rows at adjacent positions, of which the first are `valid`."""
    num_pages, page_size = pages.shape[2:4]
    page = jnp.where(valid, positions // page_size, num_pages)
    count = valid.sum(-1, dtype=jnp.int32)

    # In place where a scatter is; flat pages would be copied on TPU.
    def by_page(pages: Array, rows: Array) -> Array:
        def one_row(pages: Array, rows: Array, page: Array, slot: Array) -> Array:
            return pages.at[:, page, slot].set(rows, mode="drop")

        slot = positions % page_size
        for part in buffers.split_to_scatter(rows.shape[2]):
            pages = jax.vmap(one_row)(
                pages, rows[:, :, part], page[:, part], slot[:, part]
            )
        return pages

    def by_token(pages: Array, rows: Array) -> Array:
        flat = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
        written = buffers.write_run(flat, rows, positions[:, 0], count)
        return written.reshape(pages.shape)

    def write(pages: Array, rows: Array) -> Array:
        on_tpu, tile = {}, buffers.tile_of(page_size, pages.shape[-1], pages.dtype)
        if tile is not None and rows.shape[2] <= buffers.MOST_SCATTERS:

            def by_tile(pages: Array, rows: Array) -> Array:
                slot = positions % page_size
                return buffers.write_in_tiles(pages, rows, page, slot, tile)

            on_tpu = {"tpu": by_tile}
        return lax.platform_dependent(
            pages, rows, cpu=by_token, default=by_page, **on_tpu
        )

    return jax.tree.map(write, pages, rows)


def _take_extremes(store: Paged, end: Int[Array, "B"], newest: int) -> Paged:
    """Recomputes the extremes of the pages of the last `newest` tokens before `end`."""
    if store.page_min is None:
        return store
    num_pages, page_size = store.pages.shape[2:4]
    most = min(-(-(newest - 1) // page_size) + 1, num_pages)
    last = jnp.maximum(end - 1, 0) // page_size
    first = jnp.maximum(last - (most - 1), 0)
    which = first[:, None, None] + jnp.arange(most, dtype=jnp.int32)
    keys = buffers.gather(every_token(store.pages), which)[..., : store.spec.head_dim]
    position = which[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
    held = (position < store.length[:, None, None, None])[..., None]
    low = jnp.where(held, keys, jnp.inf).min(3)
    high = jnp.where(held, keys, -jnp.inf).max(3)
    count = last - first + 1
    return store._replace(
        page_min=buffers.write_run(store.page_min, low, first, count),
        page_max=buffers.write_run(store.page_max, high, first, count),
    )


def flat(store: Paged) -> Float[Rows, "B Hkv S D2"]:
    """Returns the rows of all pages, every token in the slot of its position."""
    pages = store.pages
    rows = jax.tree.map(
        lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1]), every_token(pages)
    )
    return pages._replace(rows=rows) if isinstance(pages, WithNewest) else rows


def views(store: Paged) -> tuple[Float[Rows, "B Hkv S D"], Float[Rows, "B Hkv S D"]]:
    """Returns keys and values with every token in the slot of its position."""
    return quantized.split(flat(store))


def attend_all(
    store: Paged, q: Float[Array, "B Hq T D"], positions: Int[Array, "B T"]
) -> Partial:
    """Attends causally from rotated queries at `positions` to every page.

    By the model's own normaliser, as :func:`kvjax.stores.contiguous.attend`.
    """
    if isinstance(store.pages, Hosted) and store.spec.alpha == 1:
        return _attend_hosted(store.spec, store.pages, q, positions)
    whole = contiguous.Contiguous(store.spec, *views(store), store.length)
    return contiguous.attend(whole, q, positions)


def _attend_hosted(
    spec: CacheSpec,
    pages: Hosted,
    q: Float[Array, "B Hq T D"],
    positions: Int[Array, "B T"],
) -> Partial:
    """Attends to pages that come to the device in blocks."""

    def take(start: Any, size: int) -> tuple[Rows, Rows]:
        return quantized.split(hosted.block(pages, start, size))

    slots = hosted.num_slots(pages)
    return Partial(
        *streamed_attention(q, take, slots, positions, sm_scale=spec.sm_scale)
    )


class Moments(NamedTuple):
    """Mean and variance of the keys of each complete page, element by element."""

    mean: Float[Array, "B Hkv NP D"]  # float32; undefined while the page is incomplete
    variance: Float[Array, "B Hkv NP D"]  # float32, over all P tokens


def moments(store: Paged) -> Moments:
    """Makes the moments of an empty store."""
    shape = store.page_min.shape
    return Moments(*(buffers.allocate(shape, jnp.float32) for _ in range(2)))


def update_moments(held: Moments, store: Paged, added: int) -> Moments:
    """Updates the pages that the newest of at most `added` tokens a row completed.

    Each is read again as a whole, whatever calls filled it, so that how tokens came
    does not change its statistics.

    Args:
        held: statistics before.
        store: with the new tokens written.
        added: most tokens that are new in any row.
    """
    num_pages, page_size = store.pages.shape[2:4]
    complete = store.length // page_size
    if isinstance(store.pages, Offloaded):
        # Only what a token has just completed is on the device.
        first = jnp.maximum(complete - 1, 0)
        count = (store.length % page_size == 0).astype(jnp.int32)
        newest = quantized.floats(offloaded.newest_page(store.pages))
        return _write_moments(held, newest[..., : store.spec.head_dim], first, count)
    most = min(-(-added // page_size), num_pages)
    # A page is written again if it was complete before: to the same numbers.
    first = jnp.maximum(complete - most, 0)
    which = first[:, None, None] + jnp.arange(most, dtype=jnp.int32)
    keys = buffers.gather(every_token(store.pages), which)[..., : store.spec.head_dim]
    return _write_moments(held, keys, first, complete - first)


def _write_moments(
    held: Moments,
    keys: Float[Array, "B Hkv N P D"],
    first: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Moments:
    *_, mean, variance = page_statistics(keys)

    def write(
        buffer: Float[Array, "B Hkv NP D"], rows: Float[Array, "B Hkv N D"]
    ) -> Float[Array, "B Hkv NP D"]:
        return buffers.write_run(buffer, rows, first, count)

    return Moments(write(held.mean, mean), write(held.variance, variance))


def keys_from(
    store: Paged, positions: Int[Array, "B H N"], run: int = 1
) -> Float[Array, "B H N R D"]:
    """Reads the keys of `run` tokens of one page from each position on.

    Args:
        store: on the device.
        positions: of the first token of a run, which must be one that a page holds.
        run: tokens, R; where the page ends sooner, its last so many.
    """
    pages, head_dim = every_token(store.pages), store.spec.head_dim
    batch, heads, _, page_size = pages.shape[:4]
    by_head = positions.reshape(batch, heads, -1)

    def read(rows: Array, by_head: Int[Array, "B Hkv N"], width: int) -> Array:
        def one(rows: Array, position: Int[Array, ""]) -> Array:
            where = position // page_size, position % page_size, jnp.int32(0)
            return lax.dynamic_slice(rows, where, (1, run, width))[0]

        of_head = jax.vmap(one, in_axes=(None, 0))
        return jax.vmap(jax.vmap(of_head))(rows, by_head)

    def whole(rows: Array, by_head: Int[Array, "B Hkv N"]) -> Array:
        return read(rows, by_head, rows.shape[-1])

    if isinstance(pages, quantized.Quantized):
        rows = jax.tree.map(lambda x: whole(x, by_head), pages)
        keys = quantized.floats(quantized.split(rows)[0])
    else:
        # The half of a row that is keys. For half of whole pages a TPU would lay out
        # all of them anew: elsewhere their values come along.
        keys = lax.platform_dependent(
            pages,
            by_head,
            cpu=lambda *given: read(*given, width=head_dim),
            default=lambda *given: whole(*given)[..., :head_dim],
        )
    return keys.reshape(batch, positions.shape[1], -1, run, head_dim)


class Listed(NamedTuple):
    """Listed pages where a kernel finds them: in the whole cache, or in some slots."""

    pages: Float[Rows, "B Hkv NP P D2"]
    page_ids: Int[Array, "B H K"]  # in `pages`, in the order of the list; -1 = none
    length: Int[Array, "B"]  # of what is there: the newest token is the last of it

    @property
    def positions(self) -> Int[Array, "B 1"]:
        """The position of the newest token in `pages`."""
        return self.length[:, None] - 1


def bring(store: Paged, page_ids: Int[Array, "B H K"]) -> tuple[Paged, Listed]:
    """Returns listed pages for a step to read, brought to the device if they are not.

    Where a method reads keys and values by it alone, and says in `Method.listed` how
    many pages, they can lie elsewhere.

    Args:
        store: with the newest token written.
        page_ids: distinct in a list, -1 = none; H is Hkv or Hq.
    """
    pages, length = store.pages, store.length
    if not isinstance(pages, Offloaded):
        return store, Listed(pages, page_ids, length)
    pages, slots = offloaded.bring(pages, page_ids, length)
    end = offloaded.newest_slot(pages, length - 1) + 1
    return store._replace(pages=pages), Listed(pages.slots, slots, end)


class Within(NamedTuple):
    """Listed pages where a kernel finds them, of whose tokens those of a run count."""

    pages: Float[Rows, "B Hkv NP P D2"]
    page_ids: Int[Array, "B H K"]  # in `pages`, in the order of the list; -1 = none
    first: int  # the position there before which no token counts
    last: Int[Array, "B 1"]  # and that behind which none does


def bring_within(
    store: Paged,
    page_ids: Int[Array, "B H K"],
    tokens: Int[Array, "B Hkv N"],
    first: int,
    end: Int[Array, "B"],
) -> tuple[Paged, Within]:
    """Returns listed pages as :func:`bring`, which come with the pages of tokens.

    Args:
        page_ids: of tokens from position `first` to before `end`.
        tokens: others that are read too, of any page; -1 = none.
    """
    pages, length = store.pages, store.length
    if not isinstance(pages, Offloaded):
        return store, Within(pages, page_ids, first, end[:, None] - 1)
    size = pages.page_size
    by_head = page_ids.reshape(*pages.shape[:2], -1)
    wanted = jnp.concatenate([by_head, offloaded.pages_of(pages, tokens)], axis=-1)
    pages, _ = offloaded.bring(pages, wanted, length)
    # The run begins within the first of some pages side by side, and ends within the
    # last of them: positions there tell what counts, as positions in the text do.
    ends = (end - 1) // size
    at_start = jnp.full_like(by_head[..., :1], first // size)
    at_end = jnp.broadcast_to(ends[:, None, None], at_start.shape)
    aside = jnp.concatenate([at_start, by_head, at_end], axis=-1)
    places = offloaded.places_of(pages, aside, length)
    last = places.shape[-1] - 1
    place = jnp.arange(1, last, dtype=jnp.int32)
    place = jnp.where(by_head == at_end, last, place)
    place = jnp.where(by_head == at_start, 0, place)
    place = jnp.where(by_head < 0, -1, place).reshape(page_ids.shape)
    stop = jnp.where(ends == first // size, 0, last) * size + (end - 1) % size
    found = Within(
        buffers.take(pages.slots, places), place, first % size, stop[:, None]
    )
    return store._replace(pages=pages), found


def fetch(
    store: Paged, positions: Int[Array, "B Hkv N"]
) -> tuple[Paged, Float[Array, "B Hkv N D"], Float[Array, "B Hkv N D"]]:
    """Reads keys and values of tokens, -1 = anything; :func:`bring` has them come."""
    if isinstance(store.pages, Offloaded):
        pages = offloaded.pages_of(store.pages, positions)
        store, _ = bring(store, pages)
    return store, *read(store, positions)


def read(
    store: Paged, positions: Int[Array, "B Hkv N"]
) -> tuple[Float[Array, "B Hkv N D"], Float[Array, "B Hkv N D"]]:
    """Reads as :func:`fetch` what was brought before."""
    if isinstance(store.pages, Offloaded):
        both = offloaded.read(store.pages, positions, store.length)
    else:
        both = buffers.gather(flat(store), positions)
    return both[..., : store.spec.head_dim], both[..., store.spec.head_dim :]


def is_available(store: Paged) -> Bool[Array, "B NP"]:
    """Says of every page whether it holds a token."""
    num_pages, page_size = store.pages.shape[2:4]
    first = jnp.arange(num_pages, dtype=jnp.int32) * page_size
    return first < store.length[:, None]


def tokens_of(
    page_ids: Int[Array, "B H K"], page_size: int, length: Int[Array, "B"]
) -> Int[Array, "B H N"]:
    """Lists the positions in listed pages, -1 where there is no token; N = K * P."""
    within = jnp.arange(page_size, dtype=jnp.int32)
    positions = page_ids[..., None] * page_size + within
    held = (page_ids[..., None] >= 0) & (positions < length[:, None, None, None])
    positions = jnp.where(held, positions, -1)
    return positions.reshape(*page_ids.shape[:2], -1)
