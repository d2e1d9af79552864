"""The forward pass equals that of transformers, on every kind of checkpoint."""

import dataclasses
import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import GOLDENS, reference

from kvjax.interface import layer_specs
from kvjax.methods.full import full
from kvjax.rope import Rope
from models import llama

# Largest absolute difference of logits of deviation 1.
TOLERANCE = 2e-5


# Also token by token: rope alone distinguishes the two, and the q and k norms.
STEPPED = (
    "gqa",
    "biases",
    "dynamic",
    "llama3",
    "yarn_mscale",
    "qwen3",
    "mistral_window",
)


def load(directory, dtype=None):
    config = json.loads((directory / "config.json").read_text())
    return llama.load(directory, config, dtype)


def run(decoder, params, tokens, prompt=None):
    """Logits `(T, V)`: `prompt` tokens in one prefill, the others one by one."""
    method = full()
    prompt = len(tokens) if prompt is None else prompt
    specs = layer_specs(decoder, 1, len(tokens), len(tokens) - prompt)
    states = tuple(method.init(spec) for spec in specs)
    prefill = jax.jit(decoder.prefill, static_argnums=4)
    step = jax.jit(decoder.decode_step, static_argnums=3)
    states, hidden = prefill(
        params,
        states,
        jnp.asarray(tokens[None, :prompt]),
        jnp.asarray([prompt]),
        method,
    )
    rows = [hidden]
    states = tuple(method.finish(state) for state in states)
    for token in tokens[prompt:]:
        states, hidden = step(
            params, states, jnp.full((1, 1), token, jnp.int32), method
        )
        rows.append(hidden)
    return np.asarray(decoder.logits(params, jnp.concatenate(rows, 1)))[0]


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_logits_equal_transformers(name, tmp_path, goldens):
    config = checkpoints.CONFIGS[name]
    tokens = checkpoints.tokens(config)
    decoder, params = load(checkpoints.write(tmp_path, config))

    expected = goldens[f"{name}/prefill"]
    assert expected.std() > 0.8  # else the tolerance would mean nothing
    logits = run(decoder, params, tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)

    if name not in STEPPED:
        return
    half = len(tokens) // 2
    stepped = run(decoder, params, tokens, prompt=half)[half:]
    expected = goldens.get(f"{name}/decode", expected[half:])
    np.testing.assert_allclose(stepped, expected, atol=TOLERANCE, rtol=0)


@dataclasses.dataclass(frozen=True)
class Interleaved(Rope):
    """The other pairing: element 2i turns with 2i + 1."""

    def __call__(self, x, positions, length=None):
        order = np.arange(self.head_dim).reshape(-1, 2).T.ravel()
        turned = super().__call__(x[..., order], positions, length)
        return turned[..., np.argsort(order)]


def _rope(**changes):
    return lambda config: dataclasses.replace(
        config, rope=dataclasses.replace(config.rope, **changes)
    )


MUTANTS = {
    "epsilon": ("gqa", lambda c: dataclasses.replace(c, norm_epsilon=1.5e-5)),
    "pairing": ("gqa", lambda c: dataclasses.replace(c, rope=Interleaved(8, 100.0))),
    "theta": ("gqa", _rope(theta=100.1)),
    "no_scaling": ("linear", _rope(kind="default")),
    "factor": ("dynamic", _rope(factor=4.01)),
    "original": ("dynamic", _rope(original_context=17)),
    "band": ("llama3", _rope(high_freq_factor=4.1)),
    "attention_factor": ("yarn", _rope(attention_factor=1.0)),
    "mscale": ("yarn_mscale", _rope(mscale=None)),
    "truncate": ("yarn_betas", _rope(truncate=True)),
    "beta": ("yarn_betas", _rope(beta_fast=32.0)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_tolerance_notices(mutant, tmp_path, goldens):
    name, change = MUTANTS[mutant]
    config = checkpoints.CONFIGS[name]
    decoder, params = load(checkpoints.write(tmp_path, config))
    wrong = llama.LlamaDecoder(change(decoder.config))
    logits = run(wrong, params, checkpoints.tokens(config))
    assert np.abs(logits - goldens[f"{name}/prefill"]).max() > 3 * TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_live_parity_on_random_configs(seed, tmp_path):
    pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2, 3]))
    head_dim = int(rng.choice([4, 8, 10]))
    heads = kv_heads * int(rng.choice([1, 2, 4]))
    family = str(rng.choice(["llama", "mistral", "qwen2", "qwen3"]))
    config = checkpoints.BASE | {
        "model_type": family,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "hidden_size": heads * (head_dim if family == "qwen2" else 6),
        "head_dim": head_dim,
        "rope_theta": float(rng.choice([50.0, 10_000.0])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "num_hidden_layers": int(rng.choice([1, 3])),
        "rope_scaling": [None, checkpoints.YARN, checkpoints.LLAMA3][rng.integers(3)],
    }
    tokens = checkpoints.tokens(config, seed)
    directory = checkpoints.write(tmp_path, config, seed)
    expected, _ = reference(directory, tokens)
    logits = run(*load(directory), tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "qwen2", "yarn"])
def test_bfloat16_stays_close(name, tmp_path, goldens):
    config = checkpoints.CONFIGS[name]
    tokens = checkpoints.tokens(config)
    decoder, params = load(checkpoints.write(tmp_path, config), "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert decoder.cache_spec(1, 8).dtype == "bfloat16"
    logits, exact = run(decoder, params, tokens), goldens[f"{name}/prefill"]
    cosines = (logits * exact).sum(-1) / (
        np.linalg.norm(logits, axis=-1) * np.linalg.norm(exact, axis=-1)
    )
    assert cosines.min() > 0.999


def test_bfloat16_is_as_good_as_transformers(tmp_path, goldens):
    pytest.importorskip("transformers")
    config = checkpoints.CONFIGS["gqa"]
    tokens, exact = checkpoints.tokens(config), goldens["gqa/prefill"]
    directory = checkpoints.write(tmp_path, config)
    theirs, _ = reference(directory, tokens, "bfloat16")
    ours = run(*load(directory, "bfloat16"), tokens)
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


def test_biases_and_output_are_parameters():
    config = llama.from_hf(checkpoints.CONFIGS["biases"])
    shapes = llama.LlamaDecoder(config).param_shapes()
    assert shapes["layers"][0]["mlp"]["down"]["bias"].shape == (32,)
    assert shapes["layers"][0]["attention"]["q"]["bias"].shape == (32,)
    assert "output" in shapes
    tied = llama.LlamaDecoder(dataclasses.replace(config, tied_embeddings=True))
    assert "output" not in tied.param_shapes()
    assert jax.tree.structure(tied.init()) == jax.tree.structure(tied.param_shapes())
