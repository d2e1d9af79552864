"""Feeding the right tokens tells what greedy decoding would have said."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ByteTokenizer, tiny_model, whole

import kvjax
from kvjax.decoding.generate import generate
from kvjax.decoding.scoring import score
from kvjax.evaluation import compare_runs, teacher_forced
from kvjax.evaluation.tasks import chain, needles

MODEL = tiny_model(num_layers=1)
TEXT = "".join(f"line {i * 7919 % 1000} of the text.\n" for i in range(60))
FULL = kvjax.full()


def attention(layer, q, k, v):
    """Causal softmax attention, the way a user may write it."""
    del layer
    positions = jnp.arange(q.shape[2], dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, (len(q), len(positions)))
    rope = MODEL.decoder.cache_spec(1, 1).rope
    q, k = rope(q, positions), rope(k, positions)
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k) / np.float32(math.sqrt(q.shape[3]))
    causal = jnp.tril(jnp.ones(logits.shape[2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v)


def rows_of(*lengths):
    tokens = ByteTokenizer().encode(TEXT)
    return [tokens[7 * i : 7 * i + n] for i, n in enumerate(lengths)]


def test_log_probs_are_the_scorings_whatever_the_padding_and_the_batch():
    rows = rows_of(90, 40, 2, 77, 64)
    found = teacher_forced.run(MODEL, attention, rows, batch=2)
    scores = score(MODEL, FULL, rows, prefill=1).log_probs
    for row, one, expected in zip(rows, found, scores, strict=True):
        assert one.log_probs.shape == one.likeliest.shape == (len(row) - 1,)
        np.testing.assert_allclose(
            one.log_probs, expected[: len(row) - 1], rtol=2e-4, atol=2e-4
        )


def test_it_shares_no_code_with_an_attention_in_float64():
    (row,) = rows_of(50)
    hidden = jax.device_put(whole(MODEL, row))
    logits = np.asarray(MODEL.decoder.logits(MODEL.params, hidden))[:49]
    (found,) = teacher_forced.run(MODEL, attention, [row], batch=1)
    chosen = logits[np.arange(49), row[1:]]
    expected = chosen - np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(found.log_probs, expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(found.likeliest, logits.argmax(-1) == row[1:])


class Characters:
    """A token is a character, whatever its number."""

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


class Reply:
    """An example whose right answer is a given text."""

    def __init__(self, text, answer):
        self.text, self.answer = text, answer
        self.prompt = Characters().encode(text)
        self.asked_at = len(text)  # there is no question
        self.answer_tokens = len(answer)

    def score(self, generated):
        return float(generated == self.answer)


def test_the_answer_is_greedy_decodings_up_to_its_first_mistake():
    model = MODEL._replace(tokenizer=Characters())
    prompts = [TEXT[:70], TEXT[33:81], TEXT[100:190]]
    said = [
        Characters().decode(row.tokens)
        for row in generate(model, FULL, prompts, max_new_tokens=12, eos_ids=())
    ]

    def other(character):
        return chr((ord(character) + 1) % 260)

    answers = [
        said[0],
        said[1][:5] + other(said[1][5]) + said[1][6:],
        other(said[2][0]) + said[2][1:],
    ]
    pairs = zip(prompts, answers, strict=True)
    examples = [Reply(prompt, answer) for prompt, answer in pairs]
    found = teacher_forced.answers(model, attention, examples, batch=2)
    assert found == [said[0], said[1][:5], ""]
    assert [e.score(x) for e, x in zip(examples, found, strict=True)] == [1, 0, 0]


class Reader:
    """A decoder that says what a function of the row wants, wherever it is asked."""

    num_layers, context, vocab_size = 0, 2048, 260

    def __init__(self, wanted):
        self.wanted = wanted

    def hidden(self, params, tokens, attention):
        del params, attention
        shape = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
        following = jax.pure_callback(self.wanted, shape, tokens)
        return jax.nn.one_hot(following, self.vocab_size)

    def logits(self, params, hidden):
        del params
        return hidden


def reading(tokens, stop=None):
    """Of each row: the next token at every place, by a reader of the list."""
    out = np.zeros(tokens.shape, np.int32)
    for row, out_row in zip(np.asarray(tokens), out, strict=True):
        text = bytes(row.astype(np.uint8)).rstrip(b"\x00").decode()
        body, _, question = text.rpartition("\nchain: ")
        follows = dict(line.split("-") for line in body.split())
        keys = [question.partition(",")[0]]
        while len(keys) < 8:
            word = keys[-1].split("-")[1]
            keys.append(f"{word}-{follows[word]}")
        if stop is not None:
            keys[1 + stop] = keys[1]  # says an earlier key again
        whole = f"{body}\nchain: {', '.join(keys)}"
        n = min(len(row), len(whole) - 1)
        out_row[:n] = list(whole.encode())[1 : n + 1]
    return out


@pytest.mark.parametrize(("stop", "expected"), [(None, 1.0), (3, 0.6), (1, 0.2)])
def test_an_oracle_that_reads_the_list_scores_one_and_one_that_errs_less(
    stop, expected
):
    examples = chain.chain_of_key(ByteTokenizer(), "", context=300, n=4)
    decoder = Reader(functools.partial(reading, stop=stop))
    model = MODEL._replace(decoder=decoder, params={})
    found = teacher_forced.answers(model, attention, examples, batch=2)
    scores = [e.score(answer) for e, answer in zip(examples, found, strict=True)]
    assert scores == [expected] * 4


def test_scores_are_those_of_greedy_generation():
    examples = [
        *needles.passkey(MODEL.tokenizer, TEXT, context=150, n=2),
        *chain.chain_of_key(MODEL.tokenizer, "", context=150, n=2, links=2),
    ]
    (answered,) = compare_runs.retrieve(MODEL, [FULL], examples, new_tokens=32, batch=4)
    greedy = answered.answers
    found = teacher_forced.answers(MODEL, attention, examples, batch=4)
    for example, answer, known in zip(examples, greedy, found, strict=True):
        assert answer.startswith(known)
        assert example.score(answer) == example.score(known)


def test_bits_per_byte_are_of_what_the_tokens_say():
    windows = rows_of(60, 60, 60)
    found = teacher_forced.run(MODEL, attention, windows, batch=2)
    nats = np.concatenate([one.log_probs for one in found]).astype(np.float64)
    bits = teacher_forced.bits_per_byte(MODEL, attention, windows, batch=2)
    assert bits.mean == pytest.approx(-nats.sum() / math.log(2) / (3 * 59))
    assert bits.low < bits.mean < bits.high
    assert bits.n == 3


class Wide(ByteTokenizer):
    """A token is four bytes' worth of text, and 3 is half of a character."""

    def decode(self, tokens):
        data = b"".join(b"abcd" if token != 3 else b"\xc3" for token in tokens)
        return data.decode(errors="replace")


def test_bytes_are_counted_after_the_prompt_and_halves_of_characters_are_not():
    log_probs = [np.full(2, -math.log(2), np.float32)] * 2
    bits = teacher_forced.bits_interval(
        Wide(), [[1, 1, 1], [1, 1, 1]], [1, 1], log_probs
    )
    assert bits.mean == pytest.approx(2 / 8)
    bits = teacher_forced.bits_interval(
        Wide(), [[1, 1, 3], [1, 1, 3]], [1, 1], log_probs
    )
    assert bits.mean == pytest.approx(2 / 4)


@pytest.mark.parametrize("rows", [[], [[1]], [[1, 2], [1] * 4097]])
def test_rows_that_do_not_fit_are_named(rows):
    with pytest.raises(ValueError, match="every row needs 2 to 4096"):
        teacher_forced.run(MODEL, attention, rows)


def test_progress_reaches_one():
    seen = []
    teacher_forced.run(
        MODEL, attention, rows_of(9, 9, 9), batch=2, progress=seen.append
    )
    assert seen == [pytest.approx(2 / 3), 1]
