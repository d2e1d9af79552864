"""A text read in pieces is the text read at once, whatever its length."""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from text_families import FAMILIES, surround
from tiny import TEXT, tiny_model

from kvjax import accounting, registry
from kvjax.decoding import endless, generate, saved_prompt
from kvjax.decoding.scoring import score
from kvjax.text import encoding
from models import embedded
from models.llama import tokenizer as tokenizers

CASCADE = "cascade:budget=24,num_cascades=2,num_sinks=2,stride=16"
STREAMING = "streaming_llm:budget=24,num_sinks=2"


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=1, context=64)


def all_of(generator):
    """What a generator yields, and what it returns."""
    yielded = []
    try:
        while True:
            yielded.append(next(generator))
    except StopIteration as end:
        return yielded, end.value


# --- pieces


def test_pieces_are_cut_at_lines_and_add_up():
    text = "".join(f"def f{i}():\n    return {i}\n\n" for i in range(40)) + "é" * 9
    data = b"\xef\xbb\xbf" + text.encode()
    for size in (1, 7, 1000):
        blocks = [data[i : i + size] for i in range(0, len(data), size)]
        found = list(endless.pieces(blocks, most=60))
        assert "".join(found) == text
        assert max(map(len, found)) <= 60
        assert all(
            piece.lstrip("\n").startswith(("def", "    ret", "é")) for piece in found
        )
        assert len(found) >= 14


def test_a_line_without_end_is_cut_too():
    found = list(endless.pieces([b"word " * 30, b"x" * 100], most=20))
    assert "".join(found) == "word " * 30 + "x" * 100
    assert max(map(len, found)) <= 20
    assert found[1].startswith(" word")
    assert list(endless.pieces([b"ab\n", b"cd"])) == ["ab", "\ncd"]


def test_pieces_make_the_tokens_of_the_whole():
    tokenizer = tokenizers.load(embedded.path())
    text = embedded.heldout_text()[:60_000]
    cut = list(endless.pieces([text.encode()], most=700))
    assert len(cut) > 80
    tokens = tokenizer.encode(cut[0])
    for before, piece in itertools.pairwise(cut):
        tokens += encoding.following(tokenizer.encode, piece, after=before)
    assert tokens == tokenizer.encode(text)


@pytest.mark.parametrize("blocks", [[b"abc\xffdef"], [b"ab", b"c\xff"], [b"abc\xc3"]])
def test_what_is_not_utf8_is_named_with_its_offset(blocks):
    with pytest.raises(
        ValueError, match=r"my text is not UTF-8: byte 0x.. at offset 3"
    ):
        list(endless.pieces(blocks, name="my text"))


# --- reading


@pytest.mark.parametrize("method", [CASCADE, STREAMING])
def test_a_text_in_pieces_scores_as_the_whole(model, method):
    """Far beyond the model's context, under methods that need none of it."""
    method = registry.parse(method)
    text = TEXT[:330]
    tokens = model.tokenizer.encode(text)
    assert len(tokens) > 5 * model.decoder.context
    whole = score(model, method, [tokens], prefill=len(tokens) - 1, chunk_size=60)
    expected = -whole.log_probs[0].astype(np.float64)
    cut = [text[:45], "", text[45:46], text[46:200], text[200:]]
    progress, read = all_of(endless.read(model, method, cut, chunk_size=60))
    assert [p.tokens for p in progress] == [45, 46, 200, 330]
    for p in progress:
        np.testing.assert_allclose(p.nats, expected[: p.tokens - 1].sum(), rtol=1e-5)
        assert (p.predicted, p.num_bytes) == (p.tokens - 1, p.tokens - 1)
    last = progress[-1].since(progress[-2])
    assert (last.tokens, last.predicted) == (130, 130)
    bits = expected[199:].sum() / math.log(2) / 130
    np.testing.assert_allclose(last.bits_per_byte, bits, rtol=1e-4)
    np.testing.assert_allclose(
        progress[-1].perplexity, np.exp(expected.mean()), rtol=1e-5
    )
    assert read.seen[0].nonzero()[0].tolist() == sorted(set(tokens))


def test_it_goes_on_as_after_a_prompt(model):
    """The same tokens as `generate` from the whole, penalty included."""
    method, text = registry.parse(CASCADE), TEXT[:150]
    sampling = generate.Sampling(repetition_penalty=1.3)
    options = {"max_new_tokens": 40, "sampling": sampling, "eos_ids": ()}
    (expected,) = generate.generate(model, method, [text], chunk_size=60, **options)
    _, read = all_of(endless.read(model, method, [text[:77], text[77:]], chunk_size=60))
    yielded, (found,) = all_of(endless.extend(model, method, read, **options))
    assert found == expected
    assert len(found.tokens) == 40
    assert "".join(text for _, text in yielded) == found.text


@pytest.mark.parametrize("name", ["sentencepiece", "spaced_bytes", "bytes"])
def test_pieces_have_the_tokens_of_the_whole_text(name):
    """No blank before a piece, no BOS or EOS inside the text; and so it goes on."""
    tokenizer = FAMILIES[name]()
    surround(tokenizer.backend, "<s> $A </s>")
    text = TEXT[:200] + "the world é of words\n\n\n  and  more"
    tokens = encoding.begin(tokenizer.encode, text)
    model = tiny_model(num_layers=1, context=64, vocab_size=512)
    model = model._replace(tokenizer=tokenizer)
    cut = ["", text[:45], "", text[45:46], text[46:203], text[203:]]
    method = registry.parse(STREAMING)
    progress, read = all_of(endless.read(model, method, cut, chunk_size=60))
    assert progress[-1].tokens == len(tokens)
    assert read.newest == tokens[-64:]
    assert read.seen[0].nonzero()[0].tolist() == sorted(set(tokens))
    options = {"max_new_tokens": 30, "eos_ids": ()}
    (expected,) = generate.generate(model, method, [text], chunk_size=60, **options)
    yielded, (found,) = all_of(endless.extend(model, method, read, **options))
    assert found == expected
    assert "".join(text for _, text in yielded) == found.text
    whole = tokenizer.decode([*tokens, *found.tokens])
    assert tokenizer.decode(tokens) + found.text == whole


def test_only_methods_of_constant_memory(model):
    constant = [
        name
        for name in registry.names(1.0)
        if accounting.is_endless(registry.parse(name), model.decoder)
    ]
    assert constant == ["cascade", "streaming_llm"]
    dense = registry.parse("dense_layers:first=1+" + CASCADE)
    with pytest.raises(ValueError, match="what this method holds grows with the text"):
        endless.read(model, dense, [TEXT])


class Slots(NamedTuple):
    """A method's state, and a slot for every token that is to be generated."""

    state: Any
    slots: Array
    used: Array


def with_slots(method):
    """The method, which notes in a slot of its own each token that it generates."""

    def init(spec, weights=None):
        slots = jnp.zeros((spec.batch, spec.max_new_tokens), jnp.int32)
        return Slots(method.init(spec, weights), slots, jnp.int32(0))

    def inside(function):
        def run(state, *arguments):
            inner, *rest = function(state.state, *arguments)
            return state._replace(state=inner), *rest

        return run

    def append(state, k, v):
        slots = state.slots.at[:, state.used].set(1)
        return Slots(method.append(state.state, k, v), slots, state.used + 1)

    return method._replace(
        init=init,
        prefill=inside(method.prefill),
        finish=lambda state: state._replace(state=method.finish(state.state)),
        append=append,
        inspect_step=inside(method.inspect_step),
    )


def test_slots_for_new_tokens_bound_what_is_generated_and_not_what_is_read(model):
    """The state is constant but for a slot of each new token: the text is endless."""
    method, plain = with_slots(registry.parse(STREAMING)), registry.parse(STREAMING)
    decoder = model.decoder
    assert not accounting.grows_with_prompt(method, decoder)
    assert accounting.grows_with_generated(method, decoder)
    assert accounting.reads_any_length(method, decoder)
    assert not accounting.is_endless(method, decoder)
    text, options = TEXT[:150], {"eos_ids": ()}  # of a context of 64
    (expected,) = generate.generate(model, plain, [text], max_new_tokens=12, **options)
    _, read = all_of(endless.read(model, method, [text[:99], text[99:]], room=12))
    with pytest.raises(ValueError, match="max_new_tokens=13 exceeds the room=12"):
        endless.extend(model, method, read, max_new_tokens=13, **options)
    assert read.states[0].slots.shape == (1, 12)
    _, (found,) = all_of(
        endless.extend(model, method, read, max_new_tokens=12, **options)
    )
    assert found == expected
    # A prefix too takes more of the prompt than it had room for, and generates as much.
    prefix = saved_prompt.read(model, method, [text[:99]], room=12)
    longer = saved_prompt.extend(model, method, prefix, [text[99:]])
    assert saved_prompt.tokens_left(model, method, longer) == 12
    with pytest.raises(ValueError, match="has room for 12 tokens more"):
        saved_prompt.generate(model, method, longer, max_new_tokens=13, **options)
    (found,) = saved_prompt.generate(model, method, longer, **options)
    assert found.tokens == expected.tokens


def test_absolute_positions_end_with_the_models_context(model):
    """However little the method holds."""
    method = registry.parse(STREAMING)._replace(renumbers=False)
    decoder = model.decoder
    assert not accounting.grows_with_prompt(method, decoder)
    assert not accounting.grows_with_generated(method, decoder)
    assert not accounting.reads_any_length(method, decoder)
    with pytest.raises(ValueError, match=r"positions under this method grow .* the 64"):
        endless.read(model, method, [TEXT])
    tokens = model.tokenizer.encode(TEXT[:70])
    with pytest.raises(ValueError, match="exceeds the model's context of 64"):
        generate.generate(model, method, [tokens], max_new_tokens=2)
    with pytest.raises(ValueError, match="more than the model's context of 64"):
        score(model, method, [tokens], prefill=60)
    prefix = saved_prompt.read(model, method, [tokens[:40]], room=20)
    assert saved_prompt.tokens_left(model, method, prefix) == 20
    with pytest.raises(ValueError, match="has room for 20 tokens more"):
        saved_prompt.extend(model, method, prefix, [tokens[40:]])


def test_mistakes(model):
    method = registry.parse(STREAMING)
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        endless.read(model, method, [TEXT], chunk_size=0)
    with pytest.raises(ValueError, match="the text is empty"):
        next(endless.read(model, method, ["", ""], chunk_size=8))
    long = [1] * (model.decoder.context + 1)
    with pytest.raises(ValueError, match="exceeds the model's context of 64"):
        generate.generate(model, registry.parse("full"), [long])
