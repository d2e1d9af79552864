"""Log-probabilities against a whole forward pass; prefill and decode agree."""

import jax
import numpy as np
import pytest
from tiny import SMALL, tiny_model, whole

import kvjax
from kvjax import registry
from kvjax.decoding import scoring
from kvjax.decoding.generate import generate
from kvjax.decoding.scoring import score

MODEL = tiny_model(deviation=0.1)
RNG = np.random.default_rng(1)
TOKENS = [RNG.integers(0, 260, size).tolist() for size in (150, 90)]


@pytest.fixture(scope="module")
def expected():
    """Logits `(n, V)`, log-probabilities `(n - 1)` of each row, softmax in float64."""
    rows = []
    for tokens in TOKENS:
        hidden = jax.device_put(whole(MODEL, tokens))
        logits = MODEL.decoder.logits(MODEL.params, hidden)
        logits = np.asarray(logits, np.float64)[: len(tokens)]
        top = logits.max(-1, keepdims=True)
        norm = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
        chosen = np.take_along_axis(
            (logits - norm)[:-1], np.array(tokens[1:])[:, None], 1
        )
        rows.append((logits, chosen[:, 0]))
    return rows


@pytest.mark.parametrize("prefill", [1, 16, 37, 89])
def test_full_attention_scores_as_one_forward_pass(expected, prefill):
    done = score(
        MODEL, kvjax.full(), TOKENS, prefill=prefill, chunk_size=16, return_logits=True
    )
    longest = len(TOKENS[0])
    assert done.log_probs.shape == (2, longest - 1)
    assert done.logits.shape == (2, longest - prefill, 260)
    for row, (logits, log_probs) in enumerate(expected):
        size = len(log_probs)
        np.testing.assert_allclose(done.log_probs[row, :size], log_probs, atol=1e-4)
        assert np.isnan(done.log_probs[row, size:]).all()
        steps = logits[prefill - 1 : -1]
        np.testing.assert_allclose(done.logits[row, : len(steps)], steps, atol=1e-4)


def test_where_the_prompt_ends_changes_nothing_under_full():
    method = kvjax.full()
    first = score(MODEL, method, TOKENS, prefill=1).log_probs
    for prefill in (2, 64, 89):
        other = score(MODEL, method, TOKENS, prefill=prefill, chunk_size=32).log_probs
        np.testing.assert_allclose(other, first, atol=1e-5)


def test_without_the_prompts_scores_the_rest_is_the_same():
    method = kvjax.full()
    whole = score(MODEL, method, TOKENS, prefill=60, return_logits=True)
    rest = score(
        MODEL, method, TOKENS, prefill=60, prompt_scores=False, return_logits=True
    )
    assert np.isnan(rest.log_probs[:, :60]).all()
    np.testing.assert_allclose(
        rest.log_probs[:, 60:], whole.log_probs[:, 60:], atol=1e-5
    )
    np.testing.assert_allclose(rest.logits, whole.logits, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "snapkv", "streaming_llm"])
def test_scores_belong_to_the_tokens_the_method_generates(name):
    """Generate greedily, then score: the logits of every step choose that token."""
    method = registry.parse(name, **SMALL)
    prompts = [row[:60] for row in TOKENS]
    done = generate(MODEL, method, prompts, max_new_tokens=12, eos_ids=())
    whole = [prompt + row.tokens for prompt, row in zip(prompts, done, strict=True)]
    scores = score(MODEL, method, whole, prefill=60, return_logits=True)
    assert scores.logits.argmax(-1).tolist() == [row.tokens for row in done]
    top = jax.nn.log_softmax(scores.logits, axis=-1).max(-1)
    np.testing.assert_allclose(scores.log_probs[:, 59:], top, atol=1e-5)


def test_a_method_that_forgets_scores_differently_in_decode_only():
    method = kvjax.streaming_llm(budget=8, num_sinks=2)
    exact = score(MODEL, kvjax.full(), TOKENS[:1], prefill=60).log_probs[0]
    lossy = score(MODEL, method, TOKENS[:1], prefill=60).log_probs[0]
    assert np.abs(lossy[60:] - exact[60:]).mean() > 1e-3


def test_rows_do_not_see_each_other():
    method = kvjax.full()
    together = score(MODEL, method, TOKENS, prefill=20).log_probs
    alone = score(MODEL, method, TOKENS[1:], prefill=20).log_probs
    np.testing.assert_allclose(together[1, :89], alone[0], atol=1e-5)


def test_steps_compile_once_for_lengths_of_a_bucket(traces):
    method = kvjax.full()
    scoring.drop_programs()
    score(MODEL, method, TOKENS, prefill=20)
    first = dict(traces)
    assert first["decode_step"] > 0
    score(MODEL, method, [row[:-1] for row in TOKENS], prefill=20)
    assert traces == first


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {"prefill": 1}, "the shortest has 0 tokens"),
        ([[1, 2, 3], [1, 2]], {"prefill": 2}, "prefill=2 .* shortest has 2 tokens"),
        ([[1, 2, 3]], {"prefill": 0}, "prefill=0 must be at least 1"),
        ([[1, 2, 260]], {"prefill": 1}, "row 0 holds token id 260"),
        ([[1] * 5000], {"prefill": 1}, "5000 tokens, more than .* context of 4096"),
        ([[1, 2]], {"prefill": 1, "chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes_are_named(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        score(MODEL, kvjax.full(), tokens, **options)
