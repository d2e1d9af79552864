"""A conversation whose keys and values lie in the host's memory: nothing else changes.

A prompt, an answer, a second prompt behind it and another answer, on one model twice:
bit for bit the same, and over the link goes what a cache in plain Python misses.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moved import Cache, kinds
from tiny import TEXT, tiny_model

from kvjax import registry
from kvjax.decoding import feeding, reader
from kvjax.decoding.feeding import CHOOSE
from kvjax.stores.counting import total
from kvjax.stores.offloaded import Offloaded

MODEL = tiny_model()
PROMPTS = [list(TEXT[:61].encode()), list(TEXT[200:237].encode())]
SECOND = np.array([list(TEXT[300:321].encode()), list(TEXT[500:521].encode())])
ANSWER, NEXT = 11, 9
CASES = [
    # Pages of 4 tokens with keys, of which a step lists 4, and 2 more are kept.
    ("quest:budget=16,page_size=4", 8, 4, 4 + 2, 4 * 2 * 8 * 4),
    # Values of single tokens.
    ("token_select:budget=12,num_sinks=2,window=3", 7, 1, 12 + 7, 8 * 4),
]


class Recorded(NamedTuple):
    """A state, and what the newest step attended to."""

    state: Any
    attended: Any


@functools.cache
def recording(spec):
    """The method over :class:`Recorded` states."""
    method = registry.parse(spec)

    def finish(state):
        ended = method.finish(state)
        spec = ended.spec
        q, kv = (
            jax.ShapeDtypeStruct((spec.batch, heads, 1, spec.head_dim), spec.dtype)
            for heads in (spec.num_q_heads, spec.num_kv_heads)
        )

        def attended(q, kv):
            return method.inspect_step(method.append(ended, kv, kv), q)[2].attended

        found = jax.eval_shape(attended, q, kv)
        return Recorded(ended, jnp.full(found.shape, -1, found.dtype))

    def append(state, k, v):
        return state._replace(state=method.append(state.state, k, v))

    def inspect_step(state, q):
        inner, out, found = method.inspect_step(state.state, q)
        return Recorded(inner, found.attended), out, found

    return method._replace(finish=finish, append=append, inspect_step=inspect_step)


def away(state):
    """The part of a layer's state that lies in the host's memory, if any does."""
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, Offloaded))
    return next((leaf for leaf in leaves if isinstance(leaf, Offloaded)), None)


def watch(before, after):
    del before
    found = [away(layer) for layer in after]
    counts = [None if x is None else (x.asked, x.moved) for x in found]
    return [layer.attended for layer in after], counts


def conversation(spec):
    """What was fed in both turns, and the states behind them."""
    method = recording(spec)
    room = ANSWER + SECOND.shape[1] + NEXT
    read = reader.prefill(MODEL, method, PROMPTS, max_new_tokens=room, chunk_size=32)
    answer = np.full((2, ANSWER), CHOOSE, np.int32)
    first = feeding.feed(MODEL, method, read, answer, watch=watch)
    wanted = np.pad(SECOND, ((0, 0), (0, NEXT)), constant_values=CHOOSE)
    read = reader.Prefilled(first.states, read.hidden, read.recent)
    second = feeding.feed(MODEL, method, read, wanted.astype(np.int32), watch=watch)
    return first, second


@pytest.mark.parametrize(("inner", "cache", "page", "slots", "num_bytes"), CASES)
def test_two_turns_are_those_without_it(inner, cache, page, slots, num_bytes):
    ours = conversation(f"offload:cache={cache}+{inner}")
    theirs = conversation(inner)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.tokens, other.tokens)
        np.testing.assert_array_equal(mine.log_probs[:, 1:], other.log_probs[:, 1:])
        for a, b in zip(mine.watched[0], other.watched[0], strict=True):
            np.testing.assert_array_equal(a, b)
    assert set(ours[1].tokens[:, -NEXT:].flat) - {0}

    # Over both turns the device keeps what it read: one cache of each head serves them.
    for layer, state in enumerate(ours[1].states):
        held = away(state)
        assert kinds(held.host)["device"] == 0
        assert held.unit == num_bytes
        lists, asked, moved = (
            np.concatenate([turn.watched[0][layer] for turn in theirs]),
            *(
                np.concatenate([turn.watched[1][layer][i] for turn in ours])
                for i in range(2)
            ),
        )
        for b, prompt in enumerate(PROMPTS):
            caches = [Cache(slots) for _ in range(2)]
            for step, attended in enumerate(lists[:, b]):
                length = len(prompt) + step + 1
                for cache_of_head, tokens in zip(caches, attended, strict=True):
                    pages = {int(t) // page for t in tokens if t >= 0}
                    cache_of_head.ask(pages - {(length - 1) // page}, length)
                assert total(asked)[step, b] == sum(x.asked for x in caches)
                assert total(moved)[step, b] == sum(x.moved for x in caches)
            assert 0 < sum(x.moved for x in caches) < sum(x.asked for x in caches)
