"""A prompt read in blocks of queries, each of which shares its first query's list."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.interface import CacheSpec
from kvjax.methods.hip import page_lists
from kvjax.methods.hip.options import Options
from kvjax.stores import buffers, contiguous, paged
from pallas_kernels.page_attention import page_attention


class SparsePrompt(NamedTuple):
    """State of :func:`kvjax.hip` while it reads a prompt in blocks, one layer."""

    store: paged.Paged
    # The pages of the last block that has begun: the next token may continue it.
    open_list: Int[Array, "B H K"]

    @property
    def length(self) -> Int[Array, "B"]:
        """The tokens so far."""
        return self.store.length


class Blocks(NamedTuple):
    """The rows of a chunk, by which they are cut into blocks of queries."""

    rotated: Float[Array, "B Hq T D"]
    start: Int[Array, "B"]  # position of the chunk's first token
    lengths: Int[Array, "B"]


def init(options: Options, spec: CacheSpec) -> SparsePrompt:
    """Makes an empty store, and the list of no block."""
    store = paged.paged(spec, options.page_size, extremes=False)
    heads = spec.num_q_heads if options.per == "query" else spec.num_kv_heads
    shape = spec.batch, heads, sum(options.parts(spec))
    return SparsePrompt(store, buffers.allocate(shape, jnp.int32, fill=-1.0))


def prefill(
    options: Options,
    state: SparsePrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[SparsePrompt, Float[Array, "B Hq T D"]]:
    """Attends from every token to the pages that the first query of its block chose.

    And to every page from that query's window up to the token itself. Only a query that
    is there chooses, so that how a prompt is cut into chunks changes nothing.
    """
    start, size, tokens = state.length, options.query_block, q.shape[2]
    store = paged.extend(state.store, k, v, lengths)
    rotated, _ = contiguous.rotate_queries(store.spec, q, store.length, lengths)
    blocks = Blocks(rotated, start, lengths)

    def read(
        open_list: Int[Array, "B H K"], number: Int[Array, ""]
    ) -> tuple[Int[Array, "B H K"], Float[Array, "B Hq R D"]]:
        first = (start // size + number) * size
        return read_block(options, store, blocks, first, open_list)

    # As many blocks as a chunk can touch, wherever in one it starts.
    numbers = jnp.arange((tokens + size - 2) // size + 1, dtype=jnp.int32)
    open_list, outs = lax.scan(read, state.open_list, numbers)
    outs = jnp.moveaxis(outs, 0, 2)
    outs = outs.reshape(*outs.shape[:2], -1, outs.shape[-1])
    place = (start % size)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    out = jnp.take_along_axis(outs, place[:, None, :, None], axis=2)
    return SparsePrompt(store, open_list), out.astype(q.dtype)


def read_block(
    options: Options,
    store: paged.Paged,
    blocks: Blocks,
    first: Int[Array, "B"],
    open_list: Int[Array, "B H K"],
) -> tuple[Int[Array, "B H K"], Float[Array, "B Hq R D"]]:
    """Attends from those tokens of a block that the chunk has.

    Args:
        options: of the method.
        store: with the chunk written.
        blocks: of the chunk.
        first: position of the block's first token.
        open_list: pages of the block before, or of this one if it has begun already.

    Returns:
        The list of the last block that has begun; the attention of all rows of this
        one, of which those outside the chunk hold nothing.
    """
    tokens = blocks.rotated.shape[2]
    offset = first - blocks.start
    row = jnp.arange(options.query_block, dtype=jnp.int32)
    place = offset[:, None] + row
    is_read = (place >= 0) & (place < blocks.lengths[:, None])
    place = jnp.clip(place, 0, tokens - 1)
    queries = jnp.take_along_axis(
        blocks.rotated, place[:, None, :, None], axis=2, mode="clip"
    )
    begins = is_read[:, :1, None]
    found = page_lists.list_pages(options, store, queries[:, :, :1], first)
    listed = jnp.where(begins, found, open_list)
    # Pages that begin within the block: each token sees those up to its own.
    page_size, num_pages = options.page_size, store.pages.shape[2]
    more = 1 + jnp.arange(-(-(options.query_block - 1) // page_size), dtype=jnp.int32)
    within = (first // page_size)[:, None] + more
    last = (first + options.query_block - 1) // page_size
    is_there = (within <= last[:, None]) & (within < num_pages)
    within = jnp.where(is_there, within, -1)[:, None]
    within = jnp.broadcast_to(within, (*listed.shape[:2], within.shape[-1]))
    out, _ = page_attention(
        queries,
        store.pages,
        jnp.concatenate([within, listed], axis=-1),
        jnp.where(is_read, first[:, None] + row, -1),
        sm_scale=store.spec.sm_scale,
    )
    return listed, out


def finish(state: SparsePrompt) -> paged.Paged:
    """Goes on with the store: steps search by themselves."""
    return state.store
