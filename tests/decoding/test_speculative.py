"""Drafts checked in one pass: the tokens of greedy decoding, whatever was drafted."""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

import kvjax
from kvjax.decoding import speculative
from kvjax.decoding.generate import generate, prefill
from kvjax.methods.full import full
from kvjax.methods.quest import quest
from kvjax.methods.retro.method import retro
from kvjax.rope import Rope

PROMPTS = (9, 4)
NEW = 12
DRAFT = 3


@functools.cache
def example():
    """A model, prompts, and what full attention says greedily after them."""
    model = tiny_model(seed=2)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, n).tolist() for n in PROMPTS]
    found = generate(model, full(), prompts, max_new_tokens=NEW, eos_ids=())
    return model, prompts, [generation.tokens for generation in found]


def test_greedy_verification_is_sequential_greedy_decoding():
    """Drafts by RetroAttention itself, taken back each time; and wrong ones."""
    model, prompts, expected = example()
    decoder, params = model.decoder, model.params
    method = kvjax.parse(
        "dense_layers:first=1+retro:window=3+quest:budget=4,page_size=4"
    )
    room = NEW + 2 * DRAFT
    states, hidden, recent, *_ = prefill(model, method, prompts, max_new_tokens=room)

    @jax.jit
    def turn(params, states, recent, newest, poor):
        def step(carry, _):
            states, recent = carry
            states, hidden = decoder.decode_step(params, states, recent, method)
            token = decoder.logits(params, hidden[:, -1]).argmax(-1).astype(jnp.int32)
            recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
            return (states, recent), token

        recent = jnp.concatenate([recent[:, 1:], newest[:, None]], axis=1)
        (drafting, _), draft = jax.lax.scan(step, (states, recent), None, DRAFT)
        count = jnp.full_like(newest, DRAFT)
        states = speculative.rewind(method, drafting, count, DRAFT)
        draft = jnp.where(poor, 0, draft.T)
        tokens = jnp.concatenate([newest[:, None], draft], axis=1)
        return tokens, speculative.verify(decoder, method, params, states, tokens)

    newest = decoder.logits(params, hidden).argmax(-1).astype(jnp.int32)
    said = [[int(token)] for token in newest]
    recent, counts = np.asarray(recent), []
    for index in range(NEW):
        poor = np.arange(DRAFT) == index % 5  # none where that is no place
        tokens, found = turn(params, states, recent, newest, poor)
        states, newest = found.states, found.next_token
        for row, accepted in enumerate(np.asarray(found.accepted)):
            taken = tokens[row, 1 : accepted + 1].tolist()
            said[row] += [*taken, int(newest[row])]
            length = PROMPTS[row] + len(said[row]) - 1  # without the newest
            assert states[0].state.store.length[row] == length
            assert states[1].state.store.length[row] == length
        counts.append(np.asarray(found.accepted))
        if min(map(len, said)) >= NEW:
            break
    assert [row[:NEW] for row in said] == expected
    assert 0 < np.mean(counts) < DRAFT, "some are accepted, some are not"
    logits = decoder.logits(params, found.hidden)
    np.testing.assert_array_equal(logits.argmax(-1), newest)


@pytest.mark.parametrize("count", [(1, 0), (5, 6)])
def test_tokens_taken_back_leave_no_trace(count):
    """Pages they began, extremes they set, and what only they had seen."""
    stream = drive.make_stream((10, 3), 7)
    method, spec = (
        retro(quest(budget=8, page_size=4), window=3),
        drive.make_spec(stream),
    )
    inputs = drive.step_inputs(stream, rows=3)

    @jax.jit
    def run(prompt, inputs, count):
        state, _ = method.prefill(method.init(spec), *prompt)

        def step(state, given):
            return drive.step(method, state, given)[0], state

        state, before = jax.lax.scan(step, state, inputs)
        return method.rewind(state, count, 6), before

    prompt = drive.chunk(stream, (0, 0), stream.prompts, size=10)
    state, before = run(prompt, inputs, jnp.asarray(count, jnp.int32))
    for b, taken in enumerate(count):
        past = 7 - taken
        for name in ("page_min", "page_max", "length"):
            stored = getattr(state.store, name)[b]
            if past < 7:
                expected = getattr(before.store, name)[past, b]
                np.testing.assert_array_equal(stored, expected)
        length = int(state.store.length[b])
        assert int(state.window.start[b]) == length == stream.prompts[b] + past
        # The next token has seen nothing; those before it, what was loaded in time.
        loaded = np.asarray(state.window.last_loaded[b])
        assert loaded.max() == length - 1
        if past < 7:
            own = np.asarray(before.window.last_loaded[past, b])
            np.testing.assert_array_equal(loaded[own >= 0] >= 0, True)


def test_a_draft_whose_logits_are_no_numbers_says_so(monkeypatch):
    """Of its row alone, wherever in the draft they are."""
    model = tiny_model(num_layers=1)
    compute = type(model.decoder).logits

    def broken(decoder, params, hidden):
        return compute(decoder, params, hidden).at[1, 1].set(jnp.nan)

    read = prefill(model, full(), [[1, 2], [3, 4]], max_new_tokens=4)
    monkeypatch.setattr(type(model.decoder), "logits", broken)
    tokens = jnp.array([[5, 6], [5, 7]], jnp.int32)
    verify = jax.jit(functools.partial(speculative.verify, model.decoder, full()))
    found = verify(model.params, read.states, tokens)
    assert np.asarray(found.finite).tolist() == [True, False]


def test_a_rope_that_goes_with_the_length_is_refused():
    """A draft's keys would be rotated as no single step rotates them."""
    rope = Rope(8, kind="dynamic", factor=4.0, original_context=16)
    model = tiny_model(rope=rope)
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"rope is 'dynamic'.* token by token"):
        speculative.verify(model.decoder, kvjax.full(), model.params, (), tokens)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_method_that_forgets_cannot_take_back():
    with pytest.raises(
        ValueError, match=r"cannot take tokens back: .* Use full, quest"
    ):
        speculative.rewind(kvjax.parse("tova"), (), jnp.zeros(1, jnp.int32), 1)
