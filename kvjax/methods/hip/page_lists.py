"""The list of pages that one query reads: newest pages, sinks, and those searched for.

The search walks down a tree that is nowhere stored, over the keys themselves.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import selection, tree_search
from kvjax.interface import CacheSpec
from kvjax.methods.hip.options import Options
from kvjax.stores import paged


def list_pages(
    options: Options,
    store: paged.Paged,
    q: Float[Array, "B Hq 1 D"],
    position: Int[Array, "B"],
) -> Int[Array, "B H K"]:
    """Lists the pages that a rotated query at `position` reads, -1 = none.

    The newest pages come first, newest first, then the sinks, then what was found, best
    first: what has to make room for a new page is the lowest score.
    """
    found = search(options, store, q, position).ids
    newest, sinks = always_read(options, store.spec, position)
    heads = found.shape[1]
    always = jnp.concatenate([newest, sinks], axis=-1)[:, None]
    always = jnp.broadcast_to(always, (len(position), heads, always.shape[-1]))
    return jnp.concatenate([always, found], axis=-1)


def always_read(
    options: Options, spec: CacheSpec, position: Int[Array, "B"]
) -> tuple[Int[Array, "B W"], Int[Array, "B N"]]:
    """Returns the newest pages and the sinks of a query at `position`, -1 = none."""
    parts = options.parts(spec)
    current = position // options.page_size
    newest = current[:, None] - jnp.arange(parts.newest, dtype=jnp.int32)
    sinks = jnp.arange(parts.sinks, dtype=jnp.int32)
    sinks = jnp.where(sinks < first_of_window(options, position)[:, None], sinks, -1)
    return jnp.maximum(newest, -1), sinks


def first_of_window(options: Options, position: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns the oldest of the newest pages, w0; pages before it are complete."""
    current = position // options.page_size
    return jnp.maximum(current - options.window_pages + 1, 0)


def search(
    options: Options,
    store: paged.Paged,
    q: Float[Array, "B Hq 1 D"],
    position: Int[Array, "B"],
) -> tree_search.Found:
    """Searches the pages between sinks and window for the highest products with q."""
    spec = store.spec
    heads = spec.num_q_heads if options.per == "query" else spec.num_kv_heads
    count = first_of_window(options, position) - options.sink_pages
    count = jnp.broadcast_to(jnp.maximum(count, 0)[:, None], (spec.batch, heads))

    def score(page_ids: Int[Array, "B H N"]) -> Float[Array, "B H N"]:
        return page_scores(options, store, q, page_ids)

    return tree_search.tree_search(
        score,
        jnp.full_like(count, options.sink_pages),
        count,
        options.parts(spec).chosen,
        options.representative,
    )


def page_scores(
    options: Options,
    store: paged.Paged,
    q: Float[Array, "B Hq 1 D"],
    page_ids: Int[Array, "B H N"],
) -> Float[Array, "B H N"]:
    """Scores pages: the highest product of the query with every r-th key of each.

    A list of several heads takes the highest, or the mean, of theirs.
    """
    stride, page_size = options.key_stride, options.page_size
    # Keys that follow each other are read at once.
    starts = jnp.arange(0, 1 if stride == 1 else page_size, stride, dtype=jnp.int32)
    batch, heads, size = page_ids.shape
    positions = (page_ids[..., None] * page_size + starts).reshape(batch, heads, -1)
    keys = paged.keys_from(store, positions, page_size if stride == 1 else 1)
    keys = keys.reshape(batch, heads, size, -1, keys.shape[-1])
    queries = q.reshape(batch, heads, -1, q.shape[-1])
    logits = jnp.einsum(
        "bhgd,bhnrd->bhgnr", queries, keys, preferred_element_type=jnp.float32
    )
    highest = logits.max(-1).reshape(batch, -1, size)
    return selection.reduce_group(highest, heads, options.group_reduce)
