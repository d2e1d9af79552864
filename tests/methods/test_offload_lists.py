"""Pages of `topk_completion` and clusters of `squeezed` in the host's memory."""

import functools
import itertools

import drive
import jax
import numpy as np
import pytest
from moved import Cache, kinds
from tiny import TEXT, tiny_model

import kvjax
from kvjax import registry
from kvjax.methods.offload import offload
from kvjax.stores.counting import total
from kvjax.stores.offloaded import Offloaded
from kvjax.testing import subject

PAGE, CACHE, CAPACITY = 4, 8, 56
STREAM = drive.make_stream((1, 7, 40, 29), 14, heads=(4, 2), head_dim=8)
SPEC = drive.make_spec(STREAM, CAPACITY, layer=7)
PAGE_BYTES = PAGE * 2 * 8 * 4
COMPLETION = "topk_completion:selector=pages,charge=none,budget=16"
SQUEEZED = "squeezed:clusters=0.3,budget=12,tail=3"


def parsed(spec):
    return registry.parse(spec, **subject.SMALL)


def lying_away(state) -> list[Offloaded]:
    """What of a state lies in the host's memory."""

    def is_away(leaf):
        return isinstance(leaf, Offloaded)

    return list(filter(is_away, jax.tree.leaves(state, is_leaf=is_away)))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        # In one pass over pages, of which the first and the last count in part.
        (COMPLETION, "float32"),
        (f"{COMPLETION},per=query,lam=0,num_sinks=3,tail=2", "float32"),
        # By token: outliers, moments; and what leaves a window.
        (f"{COMPLETION},feature_map=mean,num_outliers=1,window=3", "float32"),
        (f"{COMPLETION},feature_map=moment,window=0,num_sinks=0", "bfloat16"),
        (f"quantize:bits=8+{COMPLETION},feature_map=mean", "float32"),
        (f"{SQUEEZED},sparsity=0.5,per=query", "bfloat16"),
        (f"quantize:keys=8,values=4+{SQUEEZED}", "float32"),
    ],
)
def test_is_the_method_bit_for_bit(spec, dtype):
    """Outputs, lists and proofs, over prompts in chunks and rows that are evicted."""
    method, made = parsed(spec), drive.make_spec(STREAM, CAPACITY, dtype, layer=7)
    chunks = [(1, 7, 15, 4), (0, 0, 25, 25)]
    run, expected = (
        drive.run(one, made, STREAM, chunks)
        for one in (offload(method, cache=CACHE), method)
    )
    for ours, theirs in zip(
        jax.tree.leaves((run.prompt_out, run.out, run.diagnostics)),
        jax.tree.leaves((expected.prompt_out, expected.out, expected.diagnostics)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    for rows in lying_away(run.state):
        assert (total(rows.moved)[2:] > 4).all()
        assert (total(rows.moved) < total(rows.asked)).any()
        assert kinds(rows.host)["device"] == 0


# --- what moves, by a cache in plain Python


@functools.cache
def stepped(spec):
    """The states behind every step, and what each step attended to."""
    method = offload(parsed(spec), cache=CACHE)
    state, _ = drive.prefill(method, SPEC, STREAM)
    state = jax.jit(method.finish)(state)
    step = jax.jit(functools.partial(drive.step, method))
    states, attended = [state], []
    for inputs in zip(*drive.step_inputs(STREAM), strict=True):
        state, (_, diagnostics) = step(states[-1], inputs)
        states.append(state)
        attended.append(np.asarray(diagnostics.attended))
    return states, attended


def follow(spec, size, slots, slots_of, leaving=None):
    """Asserts slot by slot what each step asks for, and what comes, of every row.

    A token that is `leaving` places behind the newest is read before, on its way into
    the middle, unless the prompt had it there, or among two sinks.
    """
    states, attended = stepped(spec)
    assert lying_away(states[0])
    for index in range(len(lying_away(states[0]))):
        for b, prompt in enumerate(STREAM.prompts):
            caches = [Cache(slots) for _ in range(2)]
            for step, state in enumerate(states[1:]):
                rows, length = lying_away(state)[index], prompt + step + 1
                lists = attended[step][b].reshape(2, -1)
                left = -1 if leaving is None else length - 1 - leaving
                for head, cache in enumerate(caches):
                    if left >= max(prompt - 1, 2):
                        cache.ask({left // size} - {(length - 1) // size}, length)
                    tokens = {int(x) for x in lists[head]} - {-1}
                    pages = {x // size for x in slots_of(state, b, head, tokens)}
                    cache.ask(pages - {(length - 1) // size}, length)
                    np.testing.assert_array_equal(rows.held[b, head], cache.held)
                assert total(rows.asked)[b] == sum(cache.asked for cache in caches)
                assert total(rows.moved)[b] == sum(cache.moved for cache in caches)


@pytest.mark.parametrize(
    ("options", "most", "leaving"),
    [
        # Of 16 tokens 2 are sinks and 1 the tail: three pages for others, one of
        # sinks, and the 5 newest touch two.
        ("", 3 + 1 + 2, 1 + 4),
        # Two lists of two pages of the 11 others; sinks of 3, and the 6 newest.
        (",per=query,lam=0,num_sinks=3,tail=2", 2 * 2 + 1 + 3, None),
    ],
)
def test_the_pages_that_move_are_those_of_a_cache_in_python(options, most, leaving):
    """Each once, though it holds sinks and what was retrieved; the newest is free."""
    slots = most + CACHE // PAGE
    follow(COMPLETION + options, PAGE, slots, lambda *args: args[3], leaving)


def test_the_keys_and_values_that_move_are_those_of_a_cache_in_python():
    """Both alike; a token of the clusters where they have it, others in their own."""

    def slots_of(state, b, head, tokens):
        members, fixed = np.asarray(state.members)[b, head], int(state.fixed[b])
        where = {int(x): slot for slot, x in enumerate(members[:fixed])}
        return {where.get(x, x) for x in tokens}

    follow(SQUEEZED, 1, 12 + 3 + STREAM.steps + CACHE, slots_of)


@pytest.mark.parametrize(
    ("spec", "link"),
    [(COMPLETION, 6 * PAGE_BYTES), (SQUEEZED, 29 * 2 * 8 * 4)],
)
def test_bytes_over_the_link_are_at_most_those_listed(spec, link):
    """Of each row and head: six pages; 12, 3 and 14 tokens."""
    inner = parsed(spec)
    traffic = offload(inner).traffic(SPEC, 40)
    assert traffic == inner.traffic(SPEC, 40)._replace(link=4 * 2 * link)
    assert offload(inner).traffic(SPEC, 8).link == 4 * 2 * 8 * 2 * 8 * 4
    assert offload(inner, memory="device").traffic(SPEC, 40).link == 0
    states, _ = stepped(spec)
    for before, after in itertools.pairwise(states):
        moved = sum(
            (total(new.moved) - total(old.moved)).sum() * new.unit
            for old, new in zip(lying_away(before), lying_away(after), strict=True)
        )
        assert moved <= traffic.link


def test_a_longer_text_leaves_centroids_and_members_on_the_device():
    """No key, and no value."""
    method, found = offload(parsed(SQUEEZED), cache=CACHE), []
    for capacity in (256, 512):
        made = drive.make_spec(STREAM, capacity=capacity, layer=7)
        state = jax.eval_shape(lambda s=made: method.finish(method.init(s)))
        centroids = state.centroids.size * 4 + 2 * state.size.size * 4
        device = kinds(jax.jit(lambda s=made: method.finish(method.init(s)))())
        assert device["pinned_host"] == 4 * 2 * capacity * 2 * 8 * 4
        found.append(device["device"] - centroids - 4 * state.members.size)
    assert found[0] == found[1]


# --- prompts that go on, and a model


def test_a_sealed_prompt_goes_on_in_the_hosts_memory():
    """Clustered once, whatever comes behind it; rows that moved went back."""
    found = []
    for method in (parsed(SQUEEZED), offload(parsed(SQUEEZED), cache=CACHE)):
        k, v, q = (np.asarray(x)[:, :, :40] for x in (STREAM.k, STREAM.v, STREAM.q))
        first = np.asarray([1, 7, 30, 20], np.int32)
        rest = np.asarray([0, 3, 10, 9], np.int32)
        state = method.init(SPEC)
        read = jax.jit(method.prefill)
        state, _ = read(state, q[:, :, :30], k[:, :, :30], v[:, :, :30], first)
        state = jax.jit(method.hooks.seal)(state)
        if found:
            assert kinds(state.store.k)["device"] == 0
        state, out = read(state, q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], rest)
        state = jax.jit(method.finish)(state)
        inputs = [x[0] for x in drive.step_inputs(STREAM)]
        step = jax.jit(functools.partial(drive.step, method))
        found.append((out, step(state, inputs)[1]))
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "inner",
    [
        "topk_completion:selector=pages,budget=48,page_size=8,feature_map=mean",
        "squeezed:budget=32,tail=16",
    ],
)
def test_a_model_generates_the_same(inner):
    """In real memories, from the prompt's first chunk to the last step."""
    texts = [TEXT[:400], TEXT[:90]]
    ours, theirs = (
        kvjax.generate(tiny_model(), spec, texts, max_new_tokens=24, chunk_size=128)
        for spec in (f"offload:cache=16+{inner}", inner)
    )
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]
