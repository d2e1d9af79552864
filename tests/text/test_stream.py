"""Text in pieces is what decoding all tokens adds to decoding those before."""

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_families import FAMILIES

from kvjax.decoding.detokenize import TextRow
from kvjax.text.stream import CONTEXT, PARTIAL, TextStream, continuation, taking_back

WORDS = ["hello", "world", "or", "l", ".", ",", "!", "'", "do", "not", "n't", "\n", " "]
WORDS += ["é", "€", "😀", "12345", PARTIAL, "</s>", "  ", "a.b", "~"]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
texts |= st.lists(st.sampled_from(WORDS), max_size=12).map("".join)
texts |= st.text(max_size=12)


@functools.cache
def made(name):
    return FAMILIES[name]()


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return made(request.param)


def added_text(decode, before, tokens):
    """By decoding everything; None if the tokens take back what the prompt says."""
    prompt, whole = decode(before), decode([*before, *tokens])
    if not whole.startswith(prompt):
        prompt = prompt.rstrip(PARTIAL)  # its last character was only begun
    return whole[len(prompt) :] if whole.startswith(prompt) else None


def streamed(tokenizer, before, tokens, size):
    decode = tokenizer.decode
    stream = TextStream(decode, before, taking_back(tokenizer.encode, decode))
    cuts = range(0, len(tokens), size)
    pieces = [stream.push(tokens[i : i + size]) for i in cuts]
    if PARTIAL not in decode([*before, *tokens]):
        assert not any(PARTIAL in piece for piece in pieces)
    return "".join(pieces) + stream.finish()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_are_what_all_tokens_add(tokenizer, data):
    tokens = tokenizer.encode(data.draw(texts))
    cut, size = data.draw(st.integers(0, len(tokens))), data.draw(st.integers(1, 5))
    before, rest = tokens[:cut], tokens[cut:]
    rest = rest[: data.draw(st.integers(0, len(rest)))]  # which may end in a character
    expected = added_text(tokenizer.decode, before, rest)
    if expected is None:
        return
    assert streamed(tokenizer, before, rest, size) == expected
    assert continuation(tokenizer.decode, before, rest) == expected


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_add_what_decoding_says(tokenizer, data):
    """Special ones, and bytes that are no character, included."""
    token = st.integers(0, tokenizer.vocab_size - 1)
    before, tokens = (data.draw(st.lists(token, max_size=20)) for _ in range(2))
    expected = added_text(tokenizer.decode, before, tokens)
    if expected is None:
        return
    assert streamed(tokenizer, before, tokens, data.draw(st.integers(1, 5))) == expected


class Cleaned:
    """Words with blanks between, but for some: as transformers cleans up a text."""

    vocab = ("a", "b", "'", ".", "n't", "'s", "do", "\u20ac")
    rules = ((" .", "."), (" ' ", "'"), (" n't", "n't"), (" 's", "'s"))

    def encode(self, text):
        return [self.vocab.index(word) for word in text.split()]

    def decode(self, tokens):
        text = " ".join(self.vocab[token] for token in tokens)
        for old, new in self.rules:
            text = text.replace(old, new)
        return text


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_cleaned_up_later_waits(data):
    tokenizer, token = Cleaned(), st.integers(0, len(Cleaned.vocab) - 1)
    before, tokens = (data.draw(st.lists(token, max_size=9)) for _ in range(2))
    expected = added_text(tokenizer.decode, before, tokens)
    if expected is None or (2, 2) in itertools.pairwise([*before, *tokens]):
        return  # a blank of the prompt goes; every other one of a row of apostrophes
    assert streamed(tokenizer, before, tokens, data.draw(st.integers(1, 3))) == expected


def test_a_long_wait_ends_and_the_window_stays_short(tokenizer):
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return tokenizer.decode(tokens)

    text = "😀é" * 300 + " or " + "é" * 300
    tokens = tokenizer.encode(text)
    stream = TextStream(decode, (), taking_back(tokenizer.encode, tokenizer.decode))
    shown = "".join(stream.push([token]) for token in tokens) + stream.finish()
    assert longest <= 3 * CONTEXT
    assert shown == tokenizer.decode(tokens)


# --- stop strings


def row_of(tokenizer, before, tokens, stop, size=3):
    row = TextRow(tokenizer, tuple(stop), frozenset(), len(tokens), before)
    text = ""
    for start in range(0, len(tokens), size):
        text += row.push(tokens[start : start + size])
        if row.finish_reason is not None:
            break
    assert text == row.text
    return row


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stop_strings_are_found_in_the_text_that_is_added(tokenizer, data):
    tokens = tokenizer.encode(data.draw(texts.filter(len)))
    cut = data.draw(st.integers(0, len(tokens) - 1)) if tokens else 0
    before, rest = tokens[:cut], tokens[cut:]
    expected = added_text(tokenizer.decode, before, rest)
    if not rest or expected is None:
        return
    ends = st.integers(0, len(expected))
    first, last = sorted((data.draw(ends), data.draw(ends)))
    stop = [expected[first:last] or "nowhere"]
    at = expected.find(stop[0])
    row = row_of(tokenizer, before, rest, stop)
    if at < 0:
        assert (row.text, row.tokens) == (expected, rest)
        return
    assert row.text == expected[:at]
    assert row.finish_reason == "stop"
    # The row ends with the token that completes it.
    size = len(row.tokens)
    assert stop[0] in added_text(tokenizer.decode, before, row.tokens)
    less = added_text(tokenizer.decode, before, rest[: size - 1]) or ""
    assert stop[0] not in less.rstrip(PARTIAL)


def test_a_blank_that_a_decoder_strips_stops():
    tokenizer = made("sentencepiece")
    before, tokens = tokenizer.encode("hello"), tokenizer.encode(" world")[2:]
    row = row_of(tokenizer, before, tokens, [" "])
    assert (row.text, row.finish_reason, len(row.tokens)) == ("", "stop", 1)


def test_special_tokens_stop_by_their_text():
    tokenizer = made("bytes")
    end = tokenizer.backend.token_to_id("<|im_end|>")
    tokens = [*tokenizer.encode("hi", False), end, *tokenizer.encode("\nx", False)]
    for stop in ("<|im_end|>", "<|im_end|>\n", "i<|im_end|>"):
        row = row_of(tokenizer, [], tokens, [stop])
        assert row.text == "hi"[: -1 if stop[0] == "i" else None]
        assert row.finish_reason == "stop"
        assert len(row.tokens) == 3 + stop.endswith("\n")
    row = row_of(tokenizer, [], tokens, ["<|im_end|>y"])
    assert (row.text, row.finish_reason) == ("hi\nx", "length")
    spelled = [*map(tokenizer.backend.token_to_id, "hi<|im_end|>")]
    row = row_of(tokenizer, [], [*spelled, 9], ["<|im_end|>"])
    assert (row.text, row.finish_reason) == ("hi", "stop")
