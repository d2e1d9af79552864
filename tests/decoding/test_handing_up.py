"""What layers hand to each other while a prompt is read, layer by layer or at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_model

import kvjax
from kvjax import accounting
from kvjax.decoding import reader, saved_prompt
from kvjax.evaluation import together
from kvjax.interface import Hooks

LAYERS = 4  # what the second sparse layer chose shows in the keys of the last
MODEL = tiny_model(num_layers=LAYERS)
SEGMENT = 8
SIZES = {"segment": SEGMENT, "block": 4, "budget": 8, "dense_tokens": 8}
SIZES |= {"fusion": 0.9}  # so that the layer below has most of the say
PROMPTS = [[(7 * i * i + 3 * n) % 256 for i in range(n)] for n in (24, 45, 3)]
ROOM = {"max_new_tokens": 3, "chunk_size": 16}


@functools.cache
def critical(**options):
    return kvjax.critiprefill(kvjax.full(), **(SIZES | options))


@functools.cache
def hidden_of(method):
    return np.asarray(reader.prefill(MODEL, method, PROMPTS, **ROOM).hidden)


def read_in(parts, method):
    begun = reader.begin(MODEL.decoder, method, 3, 45, 3)
    return np.asarray(reader.read(MODEL, method, begun, parts).hidden)


def adding(method, seen):
    """The method, whose layers hand up how many are below them, and add it."""

    def prefill_after(state, q, k, v, lengths, below):
        seen.append(below)
        state, out = method.prefill(state, q, k, v, lengths)
        below = jnp.zeros((), jnp.int32) if below is None else below
        return state, out + below.astype(out.dtype), below + 1

    return method._replace(hooks=Hooks(prefill_after=prefill_after))


def test_each_layer_gets_what_the_one_below_it_hands_up():
    """Read layer by layer and all at once: from the first layer again in each chunk."""
    seen = []
    method = adding(kvjax.full(), seen)
    found = hidden_of(method)
    # Traced twice: with none below, and with one.
    assert [below is None for below in seen] == [True, False]
    specs = reader.layer_specs(MODEL.decoder, 3, 45, 3)
    states, read = (
        tuple(map(method.init, specs)),
        jax.jit(MODEL.decoder.prefill, static_argnums=4),
    )
    for tokens, lengths in reader.cut(PROMPTS, 16):
        states, hidden = read(MODEL.params, states, tokens, lengths, method)
    np.testing.assert_allclose(found[1], hidden[1, 45 - 32 - 1], atol=1e-5)
    assert [below is None for below in seen[2:]] == [True, *[False] * (LAYERS - 1)]
    assert np.abs(hidden_of(kvjax.parse("full")) - found).max() > 1e-3


def test_nothing_is_lost_where_every_block_is_read(traces):
    """Sparse layers share a program; a dense one has another state."""
    found = hidden_of(critical(budget=48, fusion=0.5))
    assert traces["run_layer"] == 2
    np.testing.assert_allclose(found, hidden_of(kvjax.parse("full")), atol=2e-5)


def test_the_first_sparse_layers_keys_are_those_of_full_attention():
    """Whatever the budget; what is above comes from other hidden states."""
    full = kvjax.parse("full")
    exact, sparse = (
        reader.prefill(MODEL, x, PROMPTS, **ROOM) for x in (full, critical())
    )
    for layer, (a, b) in enumerate(zip(exact.states, sparse.states, strict=True)):
        gap = np.abs(a.k - b.inner.k)[1, :, :45].max()
        assert (gap < 1e-5) == (layer <= 1), (layer, gap)
    assert np.abs(exact.hidden[1] - sparse.hidden[1]).max() > 1e-3
    # No segment of this row is sparse.
    np.testing.assert_allclose(exact.hidden[2], sparse.hidden[2], atol=1e-5)


def test_the_last_segment_is_dense_also_where_it_is_complete(monkeypatch):
    """Of 24 tokens as of 23 and one: the reader holds one back."""
    method, shorter = critical(), [PROMPTS[0][:-1], *PROMPTS[1:]]
    begun, chunks = [], reader.chunks

    def noted(*arguments, **named):
        begun.append(named.get("begun"))
        return chunks(*arguments, **named)

    monkeypatch.setattr(reader, "chunks", noted)
    prefix = saved_prompt.read(MODEL, method, shorter, room=3, chunk_size=16)
    more = [PROMPTS[0][-1:], [], []]
    longer = saved_prompt.extend(MODEL, method, prefix, more, chunk_size=16)
    assert begun == [[], [23, 45, 3]], begun
    np.testing.assert_allclose(hidden_of(method), longer.hidden, atol=1e-5)
    # In one call its last segment would be sparse.
    found = read_in(reader.cut(PROMPTS, 16), method)
    assert np.abs(found[0] - hidden_of(method)[0]).max() > 1e-4
    np.testing.assert_allclose(found[1:], hidden_of(method)[1:], atol=1e-5)


def test_a_prompt_that_goes_on_is_cut_where_a_longer_one_is():
    """What was read before ended in a segment that is dense: nothing else changes."""
    first, rest = (
        [row[part] for row in PROMPTS] for part in (slice(5), slice(5, None))
    )
    begun = [min(5, len(row)) for row in PROMPTS]
    parts = [*reader.cut(first, 16, SEGMENT), *reader.cut(rest, 16, SEGMENT, begun)]
    found = read_in(parts, critical())
    np.testing.assert_allclose(found, hidden_of(critical()), atol=1e-5)
    # Cut from where it goes on, hardly a segment would come whole.
    parts = [*reader.cut(first, 16), *reader.cut(rest, 8)]
    padded = [(np.pad(x, ((0, 0), (0, 16 - x.shape[1]))), n) for x, n in parts]
    found = read_in(padded, critical())
    assert np.abs(found[1] - hidden_of(critical())[1]).max() > 1e-4


def test_who_leads_others_hands_up_for_itself():
    """And they see exact attention's keys where nothing was lost yet."""
    method, full = critical(), kvjax.parse("full")
    both = together.read(MODEL, [method, full], PROMPTS, **ROOM)
    led, other = both.take(0), both.take(1)
    np.testing.assert_allclose(led.hidden, hidden_of(method), atol=1e-5)
    for own, its in zip(led.states, other.states, strict=True):
        np.testing.assert_array_equal(own.inner.k, its.k)


def test_the_pairs_of_a_prompt_are_counted_over_layers():
    length = 45
    every = length * (length + 1) // 2
    sparse = every - SEGMENT * (8 + 16 + 24)  # segments at 16, 24 and 32
    method, decoder = critical(), MODEL.decoder
    pairs = every + (LAYERS - 1) * sparse
    assert accounting.prompt_pairs(method, decoder, length) == pairs
    share = accounting.prompt_share(method, decoder, length)
    assert share == pairs / (LAYERS * every)
    assert accounting.prompt_share(kvjax.full(), decoder, length) == 1


def test_a_second_reading_hands_nothing_up(monkeypatch):
    """It is the method's own, in which layers know nothing of each other."""
    method = kvjax.critiprefill(kvjax.kvzip(budget=8), **SIZES)
    given = []

    def read(model, second, reading, parts):
        given.append(second)
        return reading

    monkeypatch.setattr(reader, "read", read)
    reading = reader.Reading((), jnp.zeros((3, 32)))
    reader.reread(MODEL, method, reading, PROMPTS)
    (second,) = given
    assert second.hooks == Hooks()
    assert second.prefill is method.reread.prefill
