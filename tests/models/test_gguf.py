"""GGUF files give the model that they were written from, and transformers' logits."""

import dataclasses
import math

import checkpoints
import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import GOLDENS
from test_llama import TOLERANCE, run

import models
from kvjax.rope import Rope
from models import llama
from models.gguf import header

GROWTH = 0.1 * math.log(4.0) + 1  # yarn's scale of a context four times as long
LINEAR = {
    "llama.context_length": 256,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 4.0,
}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 16,
}
MSCALES = (0.1 * 0.8 * math.log(4.0) + 1, 0.1 * 0.5 * math.log(4.0) + 1)


def llama3_factors(factor=8.0, low=1.0, high=4.0, original=32, head_dim=8, theta=1e2):
    """What divides each frequency, as llama.cpp computes it of Llama 3's formula."""
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(divisors, np.float32)


FACTORS = llama3_factors()
# What the metadata of each checkpoint say beyond `gguf_files.metadata`.
CASES = {
    "mha": {},
    "gqa": {},
    "mqa": {},
    "tied": {},
    "biases": {},
    "head_dim": {},
    "norm_eps": {},
    "linear": LINEAR,
    "llama3": {},
    "yarn": YARN,
    "yarn_attention_factor": YARN | {"llama.rope.scaling.attn_factor": 1.3 / GROWTH},
    "yarn_mscale": YARN
    | {
        "llama.rope.scaling.attn_factor": MSCALES[0] / GROWTH,
        "llama.rope.scaling.yarn_log_multiplier": 0.5,
    },
    "mistral": {},
    "mistral_window": {},
    "qwen2": {},
    "qwen2_window": {},
    "qwen3": {},
    "qwen3_biases": {},
}


def write(path, name, kind="F32", **options):
    options["change"] = CASES[name] | options.get("change", {})
    if name == "llama3":
        options["arrays"] = {"rope_freqs.weight": FACTORS} | options.get("arrays", {})
    return gguf_files.write(path, checkpoints.CONFIGS[name], kind, **options)


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


def logits(model, name):
    return run(
        model.decoder, model.params, checkpoints.tokens(checkpoints.CONFIGS[name])
    )


def same_bits(ours, theirs):
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path, goldens):
    model = models.load(write(tmp_path / "tiny.gguf", name))
    actual, expected = logits(model, name), goldens[f"{name}/prefill"]
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_that_of_the_folder(name, tmp_path):
    """Bit for bit the weights, and every size but how positions are spelled."""
    config = checkpoints.CONFIGS[name]
    folder = checkpoints.write(tmp_path / "folder", config)
    decoder, params = llama.load(folder, config)
    model = models.load(write(tmp_path / "tiny.gguf", name))
    same_bits(model.params, params)
    ours, theirs = model.decoder.config, decoder.config
    if name.startswith("yarn") or name == "llama3":
        ours = dataclasses.replace(ours, rope=theirs.rope)
    if name == "linear":  # the folder's file does not promise its context
        ours = dataclasses.replace(ours, context=64)
    if name == "mistral":  # without its window it is a llama
        ours = dataclasses.replace(ours, family="mistral")
    assert ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_a_folder_written_of_it_is_the_same_model(name, tmp_path):
    model = models.load(write(tmp_path / "tiny.gguf", name))
    models.save_pretrained(model, tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    assert again.decoder == model.decoder
    assert again.eos_ids == model.eos_ids == (1,)
    same_bits(again.params, model.params)
    assert again.tokenizer.encode("hehe 7") == model.tokenizer.encode("hehe 7")


def test_factors_are_read_by_transformers_as_here(tmp_path):
    """No release reads them of a GGUF file; as `longrope` of a folder they do."""
    transformers = pytest.importorskip("transformers")
    import torch

    model = models.load(write(tmp_path / "tiny.gguf", "llama3"))
    models.save_pretrained(model, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = checkpoints.tokens(checkpoints.CONFIGS["llama3"])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[None].astype(np.int64))).logits[0]
    actual = logits(model, "llama3")
    np.testing.assert_allclose(actual, expected.numpy(), atol=TOLERANCE, rtol=0)


def test_each_rope_scaling_matters(goldens, tmp_path):
    """The goldens tell the scalings apart: none of them passes for another."""
    for name in ("linear", "llama3", "yarn", "yarn_attention_factor", "yarn_mscale"):
        plain = models.load(
            gguf_files.write(tmp_path / f"{name}.gguf", checkpoints.CONFIGS[name])
        )
        assert plain.decoder.config.rope == Rope(8, 100.0)
        far = np.abs(logits(plain, name) - goldens[f"{name}/prefill"]).max()
        assert far > 100 * TOLERANCE


def test_factors_of_one_are_no_scaling(tmp_path):
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write(tmp_path / "tiny.gguf", "gqa", arrays=ones)
    assert models.load_decoder(path).config.rope == Rope(8, 100.0)


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({}, 64),
        (LINEAR, 256),
        (LINEAR | {"llama.context_length": 100}, 100),
        (LINEAR | {"llama.attention.sliding_window": 48}, 48),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 64),
        (YARN, 64),
        (YARN | {"llama.context_length": 4096}, 4096),
        # Converted with the context that was there before it was stretched.
        (YARN | {"llama.rope.scaling.original_context_length": 64}, 256),
        ({"llama.attention.sliding_window": 48}, 48),
        ({"llama.attention.sliding_window": 0}, 64),
        (YARN | {"llama.attention.sliding_window": 48}, 48),
    ],
)
def test_the_context_is_the_files(change, context, tmp_path):
    config = models.load_decoder(
        write(tmp_path / "tiny.gguf", "gqa", change=change)
    ).config
    assert config.context == context
    assert llama.from_hf(llama.to_hf(config)) == config


def test_a_factor_without_a_type_is_linear(tmp_path):
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        change = {f"llama.{key}": 2.5, "llama.context_length": 50}
        path = write(tmp_path / "tiny.gguf", "gqa", change=change)
        rope = models.load_decoder(path).config.rope
        assert rope == Rope(8, 100.0, "linear", 2.5, original_context=20)


def test_yarn_ramps(tmp_path):
    betas = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0}
    change = {f"llama.rope.scaling.{key}": value for key, value in betas.items()}
    rope = models.load_decoder(write(tmp_path / "t.gguf", "yarn", change=change)).config
    assert (rope.rope.beta_fast, rope.rope.beta_slow) == (16.0, 2.0)
    assert rope.rope.attention_factor is None


def test_keys_that_may_be_absent(tmp_path):
    absent = ("rope.freq_base", "attention.head_count_kv")
    change = {f"llama.{key}": None for key in absent}
    config = models.load_decoder(
        write(tmp_path / "t.gguf", "mha", change=change)
    ).config
    assert config.num_kv_heads == config.num_q_heads == 4
    assert config.rope == Rope(8, 10_000.0)
    assert config.vocab_size == 64  # the tokens
    padded = {"llama.vocab_size": 70}
    path = write(tmp_path / "t.gguf", "gqa", change=padded)
    assert models.load_decoder(path).config.vocab_size == 70


def test_epsilon_is_what_was_meant(tmp_path):
    """As float32 it is 9.999999747378752e-06; a base of eight digits is exact."""
    change = {"llama.rope.freq_base": 12_345_678.0}
    path = write(tmp_path / "tiny.gguf", "gqa", change=change)
    config = models.load_decoder(path).config
    assert config.norm_epsilon == 1e-5
    assert config.rope.theta == 12_345_678.0


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("F32", "float32"),
        ("F16", "float16"),
        ("BF16", "bfloat16"),
        ("Q8_0", "float32"),
        ("Q4_0", "float32"),
        ("Q4_1", "float32"),
    ],
)
def test_types_of_weights(kind, dtype, tmp_path):
    path = write(tmp_path / "tiny.gguf", "gqa", kind)
    assert models.load_decoder(path).config.dtype == dtype
    model = models.load(path)
    exact = models.load(write(tmp_path / "exact.gguf", "gqa"))
    down = "ffn_down"  # of 48 columns, which the quantized types cannot cut into 32

    def dequantized(name, value):
        wanted = gguf.GGMLQuantizationType[kind]
        if name == down and dtype == "float32":
            return value
        return gguf.dequantize(gguf.quantize(value, wanted), wanted)

    for layer, ours in model.params["layers"].items():
        given = exact.params["layers"][layer]
        for part, name in (("up", "ffn_up"), ("down", down)):
            value = np.asarray(given["mlp"][part]["kernel"]).T
            expected = dequantized(name, value).astype(jnp.dtype(dtype))
            actual = np.asarray(ours["mlp"][part]["kernel"]).T
            assert actual.dtype == expected.dtype
            assert actual.tobytes() == expected.tobytes()
        # Rows of four-bit blocks are moved as they are: q was turned, v was not.
        for part in ("q", "v"):
            value = np.asarray(given["attention"][part]["kernel"]).T
            expected = dequantized("attn", value).astype(jnp.dtype(dtype))
            actual = np.asarray(ours["attention"][part]["kernel"]).T
            assert actual.tobytes() == expected.tobytes()
    cast = models.load(path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(cast.params)} == {
        jnp.dtype("bfloat16")
    }


def test_only_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    """The header is enough for a decoder; weights are asked for one by one."""
    path = write(tmp_path / "tiny.gguf", "gqa", "Q8_0")
    read = []
    dequantize = gguf.dequantize

    def noted(data, kind):
        read.append(data.nbytes)
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", noted)
    models.load_decoder(path)
    assert max(read) <= 64  # one block of each type: can it be done at all
    before = len(read)
    models.load(path)
    assert len(read) == before + 2 + 21


def test_a_device_may_be_chosen(tmp_path):
    other = jax.devices()[1]
    model = models.load(write(tmp_path / "tiny.gguf", "gqa"), device=other)
    assert {leaf.device for leaf in jax.tree.leaves(model.params)} == {other}


def test_names_of_models(tmp_path, monkeypatch):
    path = write(tmp_path / "Tiny.GGUF", "gqa")
    assert models.load(path).name == str(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.load("~/Tiny.GGUF").name == "~/Tiny.GGUF"


def test_a_header_holds_what_the_packages_own_reader_finds(smollm2):
    """Of a published file, whose vocabulary and merges are most of it."""
    found, expected = header.read(smollm2), gguf.GGUFReader(smollm2)
    fields = {k: v for k, v in expected.fields.items() if not k.startswith("GGUF.")}
    assert list(found.fields) == list(fields)
    for key, field in fields.items():
        assert found.value(key) == field.contents()
        assert (found.fields[key].types, found.length(key)) == (
            field.types,
            len(field.data),
        )
    assert list(found.tensors) == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        ours = found.tensors[tensor.name]
        np.testing.assert_array_equal(ours.shape, tensor.shape)
        np.testing.assert_array_equal(ours.data, tensor.data)
        assert (ours.data.dtype, ours.n_bytes) == (tensor.data.dtype, tensor.n_bytes)
        assert not ours.data.flags.writeable  # mapped, not read
