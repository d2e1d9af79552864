"""Segments of a call and blocks of a store: lists that are given, not chosen."""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.stores import contiguous, paged, segments

TOKENS, BLOCK = 8, 4
PROMPTS = (19, 30, 0)


@functools.cache
def filled(page_size):
    stream = drive.make_stream(PROMPTS, 1, seed=1)
    spec = drive.make_spec(stream, capacity=31)
    q, k, v, lengths = drive.chunk(stream, [0] * 3, PROMPTS, size=32)
    store = paged.extend(paged.paged(spec, page_size), k, v, lengths)
    rotated, _ = contiguous.rotate_queries(spec, q, store.length, lengths)
    return stream, store, rotated, lengths


def first_block(blocks, slot, number):
    """Reads block 0 alone, and hands on where slots begin, and how many before."""
    listed = jnp.where(slot.is_sparse[:, None, None], jnp.array([0, -1]), -1)
    listed = jnp.broadcast_to(listed, (3, 2, 2)).astype(jnp.int32)
    return listed, (slot.start, slot.valid.sum(1, dtype=jnp.int32), number + 1)


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_a_whole_segment_reads_its_list_and_itself(page_size):
    """Whatever number of pages a block has; all else reads everything."""
    stream, store, q, lengths = filled(page_size)
    blocks = segments.blocks_of(store, BLOCK)
    assert blocks.low.shape[2] == -(-31 // BLOCK)
    assert blocks.pages_each == BLOCK // page_size
    assert segments.num_slots(32, TOKENS) == 5
    run = functools.partial(segments.attend, tokens=TOKENS, dense_tokens=8)
    numbers = jnp.arange(5, dtype=jnp.int32)
    out, (starts, counts, handed) = jax.jit(run, static_argnums=3)(
        blocks, q, lengths, first_block, numbers
    )
    assert handed.tolist() == [1, 2, 3, 4, 5]
    assert starts[:, 0].tolist() == [0, 8, 16, 19, 19]
    assert counts[:, 0].tolist() == [8, 8, 3, 0, 0]
    assert counts[:, 1].tolist() == [8, 8, 8, 6, 0]
    assert not counts[:, 2].any()
    for b, prompt in enumerate(PROMPTS):
        row = stream.row(b)
        attention = oracles.Attention(row)
        for t in range(prompt):
            start = t // TOKENS * TOKENS
            seen = list(range(t + 1))
            if start >= 8 and start + TOKENS <= prompt:
                seen = [*range(BLOCK), *range(start, t + 1)]
            for h in range(4):
                expected = attention(t, h, seen)[0]
                np.testing.assert_allclose(out[b, h, t], expected, atol=2e-6)


def test_extremes_of_a_block_are_those_of_its_keys():
    _, store, _, _ = filled(4)
    for page_size in (1, 2):
        blocks = segments.blocks_of(filled(page_size)[1], BLOCK)
        np.testing.assert_array_equal(blocks.low, store.page_min)
        np.testing.assert_array_equal(blocks.high, store.page_max)


def test_blocks_before_a_slot_end_where_it_begins():
    _, store, q, _ = filled(4)
    start = jnp.array([8, 16, 0], jnp.int32)
    slot = segments.Slot(q, start, jnp.ones((3, 8), bool), jnp.ones(3, bool))
    found = segments.is_before(segments.blocks_of(store, BLOCK), slot)
    assert found.sum(1).tolist() == [2, 4, 0]
