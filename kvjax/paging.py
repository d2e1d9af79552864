"""A cache in pages, keys and values fused, with the extremes of each page's keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache
from kvjax.interface import CacheSpec
from kvjax.partials import Partial
from pallas_kernels.decode_attention import decode_attention


class Paged(NamedTuple):
    """Every token of a row, in pages in order of position."""

    spec: CacheSpec
    pages: Float[Array, "B Hkv NP P D2"]  # rotated keys, then values: D2 = 2 D
    page_min: Float[Array, "B Hkv NP D"]  # +inf while the page is empty
    page_max: Float[Array, "B Hkv NP D"]  # -inf while the page is empty
    length: Int[Array, "B"]


def paged(spec: CacheSpec, page_size: int) -> Paged:
    """An empty store of at least `spec.capacity` tokens a row."""
    num_pages = -(-spec.capacity // page_size)
    heads = (spec.batch, spec.num_kv_heads, num_pages)
    pages = cache.allocate((*heads, page_size, 2 * spec.head_dim), spec.dtype)
    low = cache.allocate((*heads, spec.head_dim), spec.dtype, fill=jnp.inf)
    high = cache.allocate((*heads, spec.head_dim), spec.dtype, fill=-jnp.inf)
    return Paged(spec, pages, low, high, cache.lengths(spec))


def extend(
    store: Paged,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None = None,
) -> Paged:
    """Rotates and writes the next tokens of each row; `lengths=None` means all T."""
    positions, valid = cache.chunk_positions(store.length, lengths, k.shape[2])
    count = valid.sum(-1, dtype=jnp.int32)
    length = store.length + count
    k = store.spec.rope(k, positions, length).astype(store.spec.dtype)
    fused = jnp.concatenate([k, v.astype(store.spec.dtype)], axis=-1)
    num_pages, page_size, width = store.pages.shape[2:]
    page = jnp.where(valid, positions // page_size, num_pages)

    def by_page():  # in place where a scatter is; flat pages would be copied on TPU
        def one_row(pages, fused, page, slot):
            return pages.at[:, page, slot].set(fused, mode="drop")

        return jax.vmap(one_row)(store.pages, fused, page, positions % page_size)

    def by_token():
        flat = store.pages.reshape(*store.pages.shape[:2], -1, width)
        written = cache.write_run(flat, fused, store.length, count)
        return written.reshape(store.pages.shape)

    pages = lax.platform_dependent(cpu=by_token, default=by_page)
    page_min = cache.write(store.page_min, k, page, valid, "min")
    page_max = cache.write(store.page_max, k, page, valid, "max")
    return Paged(store.spec, pages, page_min, page_max, length)


def views(store: Paged) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S D"]]:
    """Keys and values with every token in the slot of its position."""
    batch, num_kv_heads, num_pages, page_size, width = store.pages.shape
    fused = store.pages.reshape(batch, num_kv_heads, num_pages * page_size, width)
    k, v = jnp.split(fused, 2, axis=-1)
    return k, v


def attend_all(
    store: Paged, q: Float[Array, "B Hq T D"], positions: Int[Array, "B T"]
) -> Partial:
    """Causal attention of rotated queries at `positions` over every page."""
    k, v = views(store)
    return Partial(*decode_attention(q, k, v, positions, sm_scale=store.spec.sm_scale))


def is_available(store: Paged) -> Bool[Array, "B NP"]:
    """Pages that hold a token."""
    num_pages, page_size = store.pages.shape[2:4]
    first = jnp.arange(num_pages, dtype=jnp.int32) * page_size
    return first < store.length[:, None]


def tokens_of(
    page_ids: Int[Array, "B H K"], page_size: int, length: Int[Array, "B"]
) -> Int[Array, "B H N"]:
    """Positions held by the listed pages, -1 where there is no token; N = K * P."""
    within = jnp.arange(page_size, dtype=jnp.int32)
    positions = page_ids[..., None] * page_size + within
    held = (page_ids[..., None] >= 0) & (positions < length[:, None, None, None])
    positions = jnp.where(held, positions, -1)
    return positions.reshape(*page_ids.shape[:2], -1)
