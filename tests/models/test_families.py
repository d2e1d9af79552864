"""Families that become a Llama as they are read: transformers gives the same logits."""

import dataclasses
import json
import math

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import FAMILIES, Twin
from make_goldens import FAMILIES as GOLDENS
from safetensors.numpy import load_file
from test_llama import load, run
from tokenizers_made import write_byte_level

import models
from kvjax import files, registry
from kvjax.decoding.scoring import score
from kvjax.interface import layer_specs
from kvjax.training import step
from kvjax.training.batch import Batch
from models import llama

TOLERANCE = 2e-5  # of logits of deviation 1, in deviations

# What each is afterwards, and with which options.
BECOMES = {
    "phi3": {"family": "llama", "context": 64},
    "phi3_window": {"family": "mistral", "context": 48, "sliding_window": 48},
    "granite": {"family": "llama", "tied_embeddings": False},
    "granite_biases": {"family": "llama", "qkv_bias": True, "mlp_bias": True},
    "internlm3": {"family": "llama", "output_bias": True, "context": 6 * 64},
    "seed_oss": {"family": "qwen2", "head_dim": 12, "output_bias": False},
    "ministral": {"family": "mistral", "context": 48},
    "smollm3": {"family": "smollm3", "unrotated_layers": (0,), "context": 64},
    "smollm3_biases": {"unrotated_layers": (1, 3), "tied_embeddings": False},
    "mistral3": {"family": "mistral", "context": 64, "tied_embeddings": False},
    "qwen2_vl": {"family": "qwen2", "context": 64, "norm_epsilon": 1e-6},
    "qwen2_5_vl": {"family": "qwen2", "tied_embeddings": True},
    "qwen3_vl": {"family": "qwen3", "head_dim": 8},
}


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


def check(logits, expected, tolerance=TOLERANCE):
    deviation = expected.std()
    assert deviation > 0.3  # else the tolerance would mean nothing
    np.testing.assert_allclose(logits, expected, atol=tolerance * deviation, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path, goldens):
    decoder, params = load(checkpoints.write_family(tmp_path, name))
    for field, value in BECOMES[name].items():
        assert getattr(decoder.config, field) == value, field
    tokens = checkpoints.tokens(FAMILIES[name].plain)
    check(run(decoder, params, tokens), goldens[name])
    if name.startswith("smollm3"):
        half = len(tokens) // 2
        check(run(decoder, params, tokens, prompt=half), goldens[name])


def reference(directory, tokens):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return theirs(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_a_model_of_that_family(name, tmp_path, goldens):
    write_byte_level(checkpoints.write_family(tmp_path / "given", name))
    model = models.load(tmp_path / "given")
    models.save_pretrained(model, tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    assert again.decoder == model.decoder
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == model.decoder.config.family
    tokens = checkpoints.tokens(FAMILIES[name].plain)
    check(reference(tmp_path / "saved", tokens), goldens[name])


def test_constants_are_folded_before_the_cast(tmp_path):
    """Folding in bfloat16 would round twice."""
    twin = FAMILIES["granite_biases"]
    stored = {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in checkpoints.weights(twin.plain).items()
    }
    (tmp_path / "config.json").write_text(json.dumps(twin.config))
    files.save_tensors(tmp_path / "model.safetensors", stored, {"format": "pt"})
    _, params = load(tmp_path, "bfloat16")
    layer = params["layers"][0]
    q, o = (
        np.float32(stored[f"model.layers.0.self_attn.{part}_proj.weight"])
        for part in "qo"
    )
    wanted = {
        "embedding": (params["embedding"], stored["model.embed_tokens.weight"], 3.0),
        "queries": (layer["attention"]["q"]["kernel"], q.T, 0.25 * 8**0.5),
        "residual": (layer["attention"]["o"]["kernel"], o.T, 0.7),
        "logits": (params["output"]["kernel"], stored["lm_head.weight"].T, 1 / 2.5),
    }
    for name, (folded, raw, factor) in wanted.items():
        exact = (np.float32(raw) * np.float32(factor)).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(folded, exact, err_msg=name)


def test_granite_without_constants_stays_tied():
    config = checkpoints.BASE | {"model_type": "granite", "tie_word_embeddings": True}
    assert llama.from_hf(config).tied_embeddings
    assert not llama.from_hf(config | {"logits_scaling": 8}).tied_embeddings
    inverse = {"logits_scaling": 8, "embedding_multiplier": 0.125}
    assert not llama.from_hf(config | inverse).tied_embeddings


def test_a_fused_matrix_of_other_sizes_is_an_error(tmp_path):
    directory = checkpoints.write_family(tmp_path, "phi3")
    file = directory / "model.safetensors"
    name = "model.layers.1.self_attn.qkv_proj.weight"
    changed = load_file(file) | {name: np.ones((80, 32), np.float32)}
    files.save_tensors(file, changed)
    with pytest.raises(ValueError, match=f"{name} has 80 rows, .* asks for 64"):
        load(directory)


def _of(name, **changes):
    return FAMILIES[name].config | changes


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            _of("phi3", rope_scaling=LONGROPE),
            "rope type 'longrope' is supported only with",
        ),
        (_of("phi3", partial_rotary_factor=0.75), "partial_rotary_factor=0.75"),
        (_of("phi3", num_hidden_layers=None), "lacks num_hidden_layers"),
        (_of("granite", logits_scaling=0), "logits_scaling=0 must be a finite number"),
        (_of("granite", residual_multiplier="x"), "residual_multiplier='x' must be"),
        (_of("internlm3", bias=False), "qkv_bias=True and bias=False differ"),
        (
            _of("seed_oss", attention_bias=False, attention_out_bias=True),
            "attention_bias=False and attention_out_bias=True are not supported",
        ),
        (_of("seed_oss", mlp_bias=True), "mlp_bias=True is not supported for qwen2"),
        (_of("smollm3", no_rope_layers=[1]), "must be a list of 2"),
        (_of("smollm3", no_rope_layer_interval=0), "no_rope_layer_interval=0 must be"),
        (checkpoints.BASE | {"no_rope_layers": [1, 0]}, "not supported for llama"),
        (
            _of("mistral3", text_config={"model_type": "ministral3"}),
            "text_config has model_type='ministral3'.* only 'mistral' is",
        ),
        (_of("mistral3", text_config={}), "lacks vocab_size, hidden_size"),
        (
            _of("qwen2_vl", quantization_config={"quant_method": "awq"}),
            r"weights are quantized \(awq\)",
        ),
    ],
)
def test_what_a_family_does_not_do_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        llama.from_hf(config)


def test_only_rotated_layers_have_a_rope():
    decoder = llama.LlamaDecoder(llama.from_hf(FAMILIES["smollm3_biases"].config))
    specs = layer_specs(decoder, 1, 8)
    assert [spec.layer for spec in specs] == [0, 1, 2, 3]
    assert [spec.rope.kind for spec in specs] == ["default", "none", "default", "none"]
    x = jnp.arange(16.0).reshape(1, 1, 2, 8)
    for spec in specs:
        turned = spec.rope(x, jnp.asarray([[3, 4]]))
        assert bool((turned == x).all()) == (spec.rope.kind == "none")


def test_dynamic_rope_is_seen_behind_an_unrotated_layer():
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    given = _of("smollm3", **scaled)
    decoder = llama.LlamaDecoder(llama.from_hf(given))
    assert decoder.config.unrotated_layers
    assert decoder.rope == decoder.config.rope
    assert decoder.rope.static_until == 64
    plain = dataclasses.replace(decoder.config, unrotated_layers=(0, 1))
    assert llama.LlamaDecoder(plain).rope.static_until == math.inf


COVERING = {"budget": 64, "page_size": 4, "kernel": 3, "features": 2, "tail": 1}
COVERING |= {"chunk": 4}


@pytest.fixture(scope="module")
def smollm3(tmp_path_factory):
    directory = checkpoints.write_family(tmp_path_factory.mktemp("smollm3"), "smollm3")
    return models.load(write_byte_level(directory))


@pytest.mark.parametrize("name", registry.names(1.0))
def test_every_method_is_full_attention_on_smollm3(smollm3, name, goldens):
    """With a budget that covers the context, in prefill and in decode."""
    method = registry.parse(name, **COVERING)
    tokens = checkpoints.tokens(FAMILIES["smollm3"].plain).tolist()
    scores = score(smollm3, method, [tokens], prefill=20)
    logits = goldens["smollm3"].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = log_probs[np.arange(39), tokens[1:]]
    np.testing.assert_allclose(scores.log_probs[0], expected, atol=1e-4)


def test_training_leaves_the_same_layers_unrotated(smollm3, goldens):
    tokens = checkpoints.tokens(FAMILIES["smollm3"].plain)
    batch = Batch(
        tokens=jnp.asarray(tokens[None, :-1]),
        targets=jnp.asarray(tokens[None, 1:]),
        weights=jnp.ones((1, 39)),
        sources=jnp.zeros((1, 39), jnp.int32),
        answers=jnp.zeros((1, 39), bool),
        segments=None,
        positions=None,
    )
    nats, _ = step.token_losses(smollm3.decoder, smollm3.params, batch)
    logits = goldens["smollm3"].astype(np.float64)[:-1]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        nats[0], -log_probs[np.arange(39), tokens[1:]], atol=1e-4
    )


def test_the_twins_are_written_down():
    assert set(BECOMES) == set(FAMILIES)
    assert all(isinstance(twin, Twin) for twin in FAMILIES.values())
    named = {twin.config["model_type"] for twin in FAMILIES.values()}
    assert named == set(llama.families.FAMILIES)
