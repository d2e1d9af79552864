"""A family of models that the library has never seen: one file, and one line."""

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
from toy_family import ToyDecoder

import models
from kvjax import cli, registry
from kvjax.decoding.generate import generate
from kvjax.decoding.scoring import score
from kvjax.interface import DecoderLM, LanguageModel

TEXT = "one line of text, and some more of it; "
MODEL = LanguageModel(
    ToyDecoder(), ToyDecoder().init(3), toy_family.Shifted(7), (), "toy"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The line, and a checkpoint."""
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, toy_family.FAMILY))
    models.save_pretrained(MODEL, tmp_path / "toy")
    return tmp_path / "toy"


def test_what_is_saved_is_loaded(folder):
    loaded = models.load(folder, dtype="float32")
    assert isinstance(loaded.decoder, DecoderLM)
    assert loaded.decoder == models.load_decoder(folder) == MODEL.decoder
    assert loaded.tokenizer.encode(TEXT) == MODEL.tokenizer.encode(TEXT)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(TEXT)) == TEXT
    same = jax.tree.map(lambda a, b: (a == b).all(), loaded.params, MODEL.params)
    assert all(jax.tree.leaves(same))
    assert loaded.eos_ids == ()


def attention(layer, q, k, v):
    """Causal attention in float64, whose odd layers do not rotate."""
    positions = jnp.arange(q.shape[2], dtype=jnp.int32)[None]
    if layer % 2 == 0:
        q, k = (MODEL.decoder.rope(x, positions) for x in (q, k))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(q.shape[3])
    logits = np.where(np.tril(np.ones(logits.shape[2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return jnp.asarray(np.einsum("bhts,bhsd->bhtd", weights, v), jnp.float32)


@pytest.mark.parametrize("spec", ["full", "quest:page_size=4", "tova"])
def test_every_method_runs_it(folder, spec):
    model = models.load(folder)
    method = registry.parse(spec, budget=80)  # all that there is
    tokens = model.tokenizer.encode(TEXT)
    row = jnp.asarray([tokens])
    hidden = model.decoder.run(model.params, row, attention)[0]
    logits = jax.nn.log_softmax(model.decoder.logits(model.params, hidden))
    expected = np.take_along_axis(logits[:-1], row[0][1:, None], axis=1)[:, 0]
    found = score(model, method, [tokens], prefill=20, chunk_size=8)
    np.testing.assert_allclose(found.log_probs[0], expected, atol=1e-4)
    (done,) = generate(model, method, [tokens[:20]], max_new_tokens=1)
    assert done.tokens == [int(logits[19].argmax())]


def test_the_command_line_takes_it(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with compiling.cache():
        options = ["--model", str(folder), "--method", "snapkv:budget=16,window=4"]
        asked = [*options, "--max-new-tokens", "3"]
        assert cli.run(["generate", "--prompt", TEXT, *asked]) == 0
        captured = capsys.readouterr()
        (done,) = generate(
            MODEL, registry.parse("snapkv:budget=16,window=4"), [TEXT], max_new_tokens=3
        )
        assert done.text.strip() in captured.out
        assert "kvjax: note: a toy of 2 layers." in captured.err
        assert cli.run(["plan", *options, "--context", "128"]) == 2  # of 128 new tokens
        assert cli.run(["plan", *options, "--context", "256"]) == 0


def test_no_other_family_takes_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", models.FAMILIES[:1])
    message = "model_type='toy' is not supported; supported: llama, "
    for read in (models.load, models.load_decoder):
        with pytest.raises(ValueError, match=message):
            read(folder)
    with pytest.raises(ValueError, match="no family of models has decoders ToyDecoder"):
        models.save_pretrained(MODEL, tmp_path / "other")
    assert not (tmp_path / "other").exists()
