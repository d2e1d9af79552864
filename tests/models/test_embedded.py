"""The embedded models: what they were trained on, what they ship as, how they train."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvjax.rope import Rope
from models import embedded
from models.embedded import data, tokenizer, train
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder

MEGABYTE = 1 << 20
VOCAB = 320
TINY = LlamaConfig(
    vocab_size=VOCAB,
    width=32,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    context=64,
    rope=Rope(head_dim=8),
    tied_embeddings=True,
)
RECIPE = (
    train.Stage(
        10**9,
        VOCAB,
        {32: 1.0},
        {"text": 0.3, "repeat": 0.3, "recall": 0.2, "keys": 0.2},
    ),
)


@pytest.fixture(scope="module")
def corpus():
    text = embedded.heldout_text()[:60_000]
    return data.make_corpus([text], tokenizer.train([text], VOCAB))


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_file(str(embedded.path("softmax") / "tokenizer.json"))


@pytest.mark.parametrize("name", embedded.names())
def test_shipped_checkpoint_is_small_and_names_its_tokens(name):
    folder = embedded.path(name)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    assert sum(file.stat().st_size for file in files) <= 8 * MEGABYTE
    config = json.loads((folder / "config.json").read_text())
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert config["vocab_size"] == backend.get_vocab_size() == 1024
    ids = [backend.token_to_id(token) for token in data.SPECIAL_TOKENS]
    assert ids == [data.BOS, data.EOS, data.PAD]
    assert config["bos_token_id"] == data.BOS
    assert config["eos_token_id"] == data.EOS
    assert backend.encode("x").ids[0] == data.BOS


def test_unknown_model_is_refused():
    assert "softmax" in embedded.names()
    with pytest.raises(
        ValueError, match=r"no embedded model 'hard'; shipped: .*softmax"
    ):
        embedded.path("hard")


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_tokenizer_gives_any_text_back(text):
    backend = Tokenizer.from_file(str(embedded.path("softmax") / "tokenizer.json"))
    ids = backend.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in data.SPECIAL_TOKENS):
        assert backend.decode(ids) == text


def test_every_digit_is_one_token(shipped):
    prompt = shipped.encode("The pass key is ").ids
    whole = shipped.encode("The pass key is 48213").ids
    assert whole[: len(prompt)] == prompt
    assert len(whole) == len(prompt) + 5


def test_held_out_modules_are_not_trained_on():
    names = {path.name for path in data.training_files() if len(path.parts) > 1}
    everything = {path.name for path in data.stdlib_files()}
    assert set(data.HELD_OUT) <= everything
    assert names.isdisjoint(data.HELD_OUT)
    assert len(names) > 100


def test_held_out_text_is_not_in_the_training_text():
    text = embedded.heldout_text()
    assert len(text.encode()) >= 200_000
    training = "\n".join(data.read(data.training_files()))
    pieces = [text[start : start + 400] for start in range(0, len(text) - 400, 4000)]
    assert not [piece for piece in pieces if piece in training]
    assert training[10_000:10_400] in training  # and the search does find


def test_batches_depend_on_seed_and_step_only(corpus):
    def batch(seed, step):
        return train.make_batch(corpus, seed, step, 512, RECIPE)

    first, again = batch(0, 3), batch(0, 3)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for other in (batch(0, 4), batch(1, 3)):
        assert (first.tokens != other.tokens).any()
    assert first.tokens.shape == (16, 33)
    np.testing.assert_allclose(first.weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("passkey", [True, False])
def test_a_question_is_answered_once_before_it(corpus, passkey):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        text, facts = data.fact_text(
            rng, corpus, 800, num_mentions=2, num_keys=1, passkey=passkey, variants=0
        )
        assert len(facts) == 2
        value = text[-5:]
        question = text[:-5].rsplit("\n", 1)[1]
        assert len(value) == 5
        assert value.isdigit()
        assert text[: facts[-1].start].count(value) == 1
        assert text.count(question) == 2
        if passkey:
            assert f"{question}{value}. Remember it.\n" in text
            assert question == "The pass key is "
        else:
            assert f"{question}{value}.\n" in text
            assert question.startswith("key ")
            assert question.endswith(" has value ")


def test_fact_rows_ask_only_for_what_was_said(corpus):
    seen = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        row = data.fact_row(rng, corpus, 128, passkey=False, dense=True)
        targets = row.tokens[1:]
        values = "".join(corpus.decode([i]) for i in targets[row.answers])
        assert values.isdigit() or not values
        assert len(values) % 5 == 0
        for start in range(0, len(values), 5):
            value = values[start : start + 5]
            last = np.flatnonzero(row.answers)[start]
            assert value in corpus.decode(targets[:last].tolist())
            seen += 1
    assert seen > 30


def test_token_rows_can_be_answered_from_their_past():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        repeat = data.repeat_row(rng, VOCAB, 64)
        tokens = repeat.tokens[1:]
        for i in np.flatnonzero(repeat.answers):
            before = tokens[: i - 1]
            assert tokens[i] in tokens[1:i][before == tokens[i - 1]]
        recall = data.recall_row(rng, VOCAB, 64)
        tokens = recall.tokens[1:]
        assert recall.answers.any()
        for i in np.flatnonzero(recall.answers):
            (places,) = np.nonzero(tokens[: i - 1] == tokens[i - 1])
            assert {tokens[p + 1] for p in places} == {tokens[i]}


def test_folded_rows_equal_rows_one_by_one():
    """Losses of rows laid end to end, in blocks, against plain attention per row."""
    decoder = LlamaDecoder(TINY)
    params = train.init_params(decoder, 0)
    tokens = jax.random.randint(jax.random.key(0), (3, 23), 0, VOCAB)

    def plain(layer, q, k, v):
        positions = jnp.tile(jnp.arange(q.shape[2]), (3, 1))
        q, k = TINY.rope(q, positions), TINY.rope(k, positions)
        k, v = jnp.repeat(k, 2, 1), jnp.repeat(v, 2, 1)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(TINY.head_dim)
        scores = jnp.where(np.tri(q.shape[2], dtype=bool), scores, -jnp.inf)
        return jax.nn.softmax(scores, -1) @ v

    def folded(layer, q, k, v):
        return train.causal_attention(TINY.rope, 3, block=8)(layer, q, k, v)

    inputs = tokens[:, :-1]
    want = decoder.hidden(params, inputs, plain)
    got = decoder.hidden(params, inputs.reshape(1, -1), folded).reshape(want.shape)
    np.testing.assert_allclose(got, want, atol=2e-5)
    losses, _ = train.token_losses(decoder, params, tokens)
    logp = jax.nn.log_softmax(decoder.logits(params, want))
    expected = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, atol=5e-5)


@pytest.fixture
def promoting():
    """optax mixes dtypes on purpose, which the strict tests refuse."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_training_lowers_the_loss_and_resumes_exactly(corpus, tmp_path, promoting):
    decoder = LlamaDecoder(TINY)
    tx = train.optimizer(1e-2, warmup=5)
    train_step = train.make_train_step(decoder, tx)

    def advance(state, start, stop):
        losses = []
        for step in range(start, stop):
            batch = train.make_batch(corpus, 0, step, 256, RECIPE)
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"].sum() / metrics["rows"].sum()))
        return state, losses

    state, losses = advance(train.new_state(decoder, tx, 0), 0, 20)
    train.save_checkpoint(tmp_path, state)
    _, straight = advance(state, 20, 26)
    assert np.mean(straight) < losses[0] - 0.5

    resumed = train.load_checkpoint(tmp_path, train.new_state(decoder, tx, 1))
    assert int(resumed.step) == 20
    average = train.load_average(tmp_path, decoder)
    jax.tree.map(np.testing.assert_array_equal, average, resumed.average)
    assert advance(resumed, 20, 26)[1] == straight

    other = LlamaDecoder(train.CONFIG)
    with pytest.raises(ValueError, match="other shapes"):
        train.load_checkpoint(tmp_path, train.new_state(other, tx, 0))
    with pytest.raises(ValueError, match="another configuration"):
        train.load_average(tmp_path, other)
