"""The embedded models: their tokenizer, their start, and what ships."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import models
from kvjax.evaluation.tasks.words import WORDS
from models import embedded
from models.embedded import start, tokenizer
from models.llama.model import LlamaDecoder

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def made():
    return tokenizer.train([embedded.heldout_text()[:60_000]], 2400)


@pytest.mark.parametrize("name", embedded.names())
def test_shipped_checkpoint_is_small_and_names_its_tokens(name):
    folder = embedded.path(name)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    assert sum(file.stat().st_size for file in files) <= 8 * MEGABYTE
    config = json.loads((folder / "config.json").read_text())
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert config["vocab_size"] == backend.get_vocab_size()
    ids = [backend.token_to_id(token) for token in tokenizer.SPECIAL_TOKENS]
    assert ids == [tokenizer.BOS, tokenizer.EOS, tokenizer.PAD]
    assert config["bos_token_id"] == tokenizer.BOS
    assert config["eos_token_id"] == tokenizer.EOS
    assert backend.encode("x").ids[0] == tokenizer.BOS


@pytest.mark.parametrize("name", embedded.names())
def test_shipped_checkpoint_has_the_shape_that_was_asked_for(name):
    config = models.load(name).decoder.config
    assert config.context >= 4096
    assert config.num_layers >= 4
    assert config.num_q_heads // config.num_kv_heads >= 2
    assert (config.attention_alpha > 1) == (name == "embedded-entmax")


@pytest.mark.parametrize("find", [embedded.path, models.load])
def test_unknown_embedded_model_is_an_error_that_lists_what_there_is(find):
    with pytest.raises(ValueError, match=r"'embedded-x'; shipped: .*embedded-softmax"):
        find("embedded-x")


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_tokenizer_gives_any_text_back(made, text):
    ids = made.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in tokenizer.SPECIAL_TOKENS):
        assert made.decode(ids) == text


def test_a_vocabulary_has_room_for_what_every_one_has():
    with pytest.raises(ValueError, match="vocab_size=400 must be at least 2196: "):
        tokenizer.train(["a text"], 400)
    made = tokenizer.train(["a text"], 2196)
    assert made.get_vocab_size() == 2196
    assert made.decode(made.encode("é 017 text").ids) == "é 017 text"


def test_numbers_are_cut_in_threes_from_the_left(made):
    prompt = made.encode("The pass key is ").tokens
    whole = made.encode("The pass key is 48213").tokens
    assert whole == [*prompt, "482", "13"]
    assert made.encode("1234567", add_special_tokens=False).tokens == [
        "123",
        "456",
        "7",
    ]


def test_a_word_is_one_token_wherever_it_stands(made):
    def pieces(text):
        return made.encode(text, add_special_tokens=False).tokens

    for word in WORDS:
        assert pieces(word) == [word]
    for text in ("stone", "a stone", "(stone)", "stone-stone\nstone, stone: 12"):
        assert pieces(text).count("stone") == text.count("stone")
    # Inside other words and names it is not a word.
    for text in ("stones", "Limestone", "cobblestone"):
        assert "stone" not in pieces(text)


@pytest.fixture(scope="module")
def planted():
    config = dataclasses.replace(start.CONFIG, vocab_size=2000)
    return LlamaDecoder(config), start.params(config, seed=0)


def attention_weights(decoder, params, tokens):
    """The weights (H, T, T) of every layer: plain softmax over rotated products."""
    seen = []

    def attention(layer, q, k, v):
        del layer
        positions = jnp.arange(q.shape[2])[None]
        q, k = (decoder.config.rope(x, positions) for x in (q, k))
        group = q.shape[1] // k.shape[1]
        k, v = (jnp.repeat(x, group, 1) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        scores = jnp.where(np.tri(q.shape[2], dtype=bool), scores, -jnp.inf)
        weights = jax.nn.softmax(scores, -1)
        seen.append(np.asarray(weights[0]))
        return weights @ v

    decoder.hidden(params, tokens, attention)
    return seen


def test_heads_begin_by_looking_back_and_by_matching(planted):
    decoder, params = planted
    rng = np.random.default_rng(0)
    block = rng.permutation(np.arange(3, 2000))[:60]
    tokens = jnp.asarray(np.concatenate([[0], block, block]))[None]
    first, second = attention_weights(decoder, params, tokens)[:2]
    at = np.arange(10, 121)
    for head in range(4):
        assert first[head, at, at - head - 1].mean() > 0.9
    copies = np.arange(64, 120)
    for head in range(4):
        # The token after the earlier copy of this one, out of about ninety.
        on_target = second[head, copies, copies - 59]
        assert on_target.mean() > 4 / 90


def test_a_shape_the_start_does_not_fit_is_refused():
    config = dataclasses.replace(start.CONFIG, width=96)
    with pytest.raises(ValueError, match=r"config.width=96.*make up the width"):
        start.params(config)
