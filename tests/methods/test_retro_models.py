"""RetroAttention in whole models: revised tokens change the keys of deeper layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import dense as dense_attention
from tiny import tiny_model

import kvjax
from kvjax.decoding.generate import generate
from kvjax.interface import layer_specs
from kvjax.methods.quest import quest
from kvjax.methods.retro.method import retro

PAGE = 4
MODEL_STARTS = (5, 17)
MODEL_STEPS = 15
WINDOW = 4


@functools.cache
def model():
    return tiny_model(num_layers=3, seed=3)


@functools.cache
def texts():
    rng = np.random.default_rng(4)
    return [
        rng.integers(0, 256, start + MODEL_STEPS).tolist() for start in MODEL_STARTS
    ]


def in_turn():
    """Quest's pages, those listed at step t that are t modulo WINDOW, and its own."""

    def select(state, q):
        del q
        batch, heads, num_pages = state.pages.shape[:3]
        page = jnp.arange(num_pages, dtype=jnp.int32)
        t = (state.length - 1)[:, None]
        due = (page % WINDOW == t % WINDOW) & (page * PAGE <= t)
        listed = jnp.where(due | (page == t // PAGE), page, -1)
        return jnp.broadcast_to(listed[:, None], (batch, heads, num_pages))

    return quest(budget=PAGE, page_size=PAGE)._replace(select=select)


@functools.cache
def decode_texts(spec):
    """Logits `(steps, B, V)`, and the states of the layers, prompt's end in front.

    Of the texts under a method by its name, or revising `in_turn` in such a window.
    """
    decoder, params = model().decoder, model().params
    if isinstance(spec, int):
        method = retro(in_turn(), window=spec)
    else:
        method = kvjax.parse(spec)
    longest = max(MODEL_STARTS)
    layers = layer_specs(decoder, len(texts()), longest + MODEL_STEPS, MODEL_STEPS)

    @jax.jit
    def run(params, prompts, lengths, recent, tokens):
        states = tuple(method.init(layer) for layer in layers)
        states, _ = decoder.prefill(params, states, prompts, lengths, method)
        states = tuple(map(method.finish, states))

        def step(carry, token):
            states, recent = carry
            recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
            states, hidden = decoder.decode_step(params, states, recent, method)
            return (states, recent), (decoder.logits(params, hidden[:, -1]), states)

        return states, jax.lax.scan(step, (states, recent), tokens.T)[1]

    both = list(zip(texts(), MODEL_STARTS, strict=True))
    prompts = np.array([np.resize(row[:n], longest) for row, n in both], np.int32)
    recent = np.stack([np.resize(row[:n][::-1], method.rows)[::-1] for row, n in both])
    tokens = np.array([row[n:] for row, n in both], np.int32)
    lengths = np.array(MODEL_STARTS, np.int32)
    first, (logits, rest) = run(
        params, prompts, lengths, recent.astype(np.int32), tokens
    )
    states = jax.tree.map(
        lambda one, more: np.concatenate([np.asarray(one)[None], more]), first, rest
    )
    return np.asarray(logits), states


def keys_and_values(pages):
    """`(..., B, Hkv, S, 2 D)` with every token in its place."""
    return pages.reshape(*pages.shape[:-3], -1, pages.shape[-1])


def errors(window):
    """Relative errors of what is stored for tokens that left the window, by layer."""
    found = []
    pairs = zip(decode_texts(window)[1], decode_texts("full")[1], strict=True)
    for state, dense_state in pairs:
        stored = keys_and_values(state.store.pages[-1])
        truth = np.concatenate([dense_state.k[-1], dense_state.v[-1]], axis=-1)
        parts = []
        for b, start in enumerate(MODEL_STARTS):
            finished = slice(start, start + MODEL_STEPS - WINDOW + 1)
            gap = stored[b, :, finished] - truth[b, :, finished]
            scale = np.linalg.norm(truth[b, :, finished], axis=-1)
            parts.append((np.linalg.norm(gap, axis=-1) / scale).ravel())
        found.append(np.concatenate(parts))
    return found


def test_complete_unions_give_the_next_layer_the_keys_of_the_dense_model():
    first, second, third = errors(WINDOW)
    assert first.max() < 1e-6
    assert second.max() < 1e-5
    assert third.mean() > 1e-3, "deeper layers merge what older queries found"


def test_what_left_the_window_is_never_written_again():
    for layer, state in enumerate(decode_texts(WINDOW)[1]):
        stored = keys_and_values(state.store.pages)
        changed = 0
        for i in range(MODEL_STEPS):
            for b, start in enumerate(MODEL_STARTS):
                now = start + i
                left = max(start, now - WINDOW + 1)
                before, after = stored[i, b, :, :now], stored[i + 1, b, :, :now]
                np.testing.assert_array_equal(before[:, :left], after[:, :left])
                changed += not np.allclose(before[:, left:], after[:, left:], atol=1e-4)
        assert (changed > MODEL_STEPS) == (layer > 0)


def test_extremes_of_pages_are_exact_after_keys_are_overwritten():
    for state in decode_texts(WINDOW)[1]:
        store = state.store
        keys = store.pages[..., : store.pages.shape[-1] // 2]
        for i, b in np.ndindex(keys.shape[:2]):
            length = store.length[i, b]
            for page in range(keys.shape[3]):
                held = keys[i, b, :, page, : max(length - page * PAGE, 0)]
                low = held.min(1, initial=np.inf)
                high = held.max(1, initial=-np.inf)
                np.testing.assert_array_equal(store.page_min[i, b, :, page], low)
                np.testing.assert_array_equal(store.page_max[i, b, :, page], high)


@pytest.mark.parametrize(
    "spec",
    [
        "retro:window=8+quest:budget=48,page_size=4",
        "dense_layers:first=1+retro:window=2+quest:budget=48,page_size=4",
    ],
)
def test_a_budget_for_everything_gives_the_logits_of_full_attention(spec):
    found, expected = decode_texts(spec)[0], decode_texts("full")[0]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert expected.std() > 0.1


def test_generates_what_full_attention_does_when_it_reads_everything():
    """Every token generated is the likeliest after those before it."""
    small = tiny_model(num_layers=1)
    prompts = [row[:n] for row, n in zip(texts(), MODEL_STARTS, strict=True)]
    method = kvjax.parse("retro:window=4+quest:budget=48,page_size=4")
    found = generate(small, method, prompts, max_new_tokens=10, eos_ids=())
    decoder, params = small.decoder, small.params
    whole = np.zeros((2, max(MODEL_STARTS) + 10), np.int32)
    for row, prompt, generation in zip(whole, prompts, found, strict=True):
        tokens = prompt + generation.tokens
        row[: len(tokens)] = tokens
        # Of one length, so that what compiles does so once.
        hidden = decoder.hidden(params, jnp.asarray(row[None]), dense_attention)
        likeliest = decoder.logits(params, hidden).argmax(-1)[0]
        said = likeliest[len(prompt) - 1 : len(prompt) + 9]
        assert said.tolist() == generation.tokens
