"""Tiny checkpoints in the Hugging Face layout whose weights are a function of a seed.

Only the raw stream of PCG64 is used, which NumPy promises never to change, so goldens
made elsewhere hold here. The scales keep logits of order 1 and attention far from
uniform.
"""

import json
from pathlib import Path

import numpy as np

TOKENS = 40  # of every golden
BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _scaled(**rope):
    return BASE | {"rope_scaling": rope}


def _unified(**rope):
    """The spelling of transformers 5."""
    config = {key: value for key, value in BASE.items() if key != "rope_theta"}
    return config | {
        "rope_parameters": {"rope_theta": 100.0, **rope},
        "dtype": "float32",
    }


CONFIGS = {
    "mha": BASE | {"num_key_value_heads": 4},
    "gqa": BASE,
    "mqa": BASE | {"num_key_value_heads": 1},
    "tied": BASE | {"tie_word_embeddings": True},
    "biases": BASE | {"attention_bias": True, "mlp_bias": True},
    "head_dim": BASE | {"head_dim": 12},
    "norm_eps": BASE | {"rms_norm_eps": 1e-3},
    "linear": _scaled(type="linear", factor=4.0),
    "dynamic": _scaled(type="dynamic", factor=4.0) | {"max_position_embeddings": 16},
    "llama3": _scaled(**LLAMA3),
    "yarn": _scaled(**YARN),
    "yarn_attention_factor": _scaled(**YARN, attention_factor=1.3),
    "yarn_mscale": _scaled(**YARN, mscale=0.8, mscale_all_dim=0.5),
    "yarn_betas": _scaled(**YARN, beta_fast=1.0, beta_slow=0.1, truncate=False),
    "unified_default": _unified(rope_type="default"),
    "unified_linear": _unified(rope_type="linear", factor=4.0),
    "unified_dynamic": _unified(rope_type="dynamic", factor=4.0)
    | {"max_position_embeddings": 16},
    "unified_llama3": _unified(**LLAMA3),
    "unified_yarn": _unified(**YARN),
    "mistral": BASE | {"model_type": "mistral", "sliding_window": None},
    "mistral_window": BASE | {"model_type": "mistral", "sliding_window": 48},
    "qwen2": BASE | {"model_type": "qwen2", "use_sliding_window": False},
    "qwen2_window": BASE
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 48,
        "max_window_layers": 1,
    },
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 16},
    "qwen3_biases": BASE
    | {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
}


def uniform(seed: int, size: int) -> np.ndarray:
    """Mean 0, variance 1, float32; the same numbers on every machine and release."""
    bits = np.random.PCG64(seed).random_raw(size) >> np.uint64(40)
    return ((bits.astype(np.float64) / 2**24 - 0.5) * 12**0.5).astype(np.float32)


def tokens(config: dict, seed: int = 7, count: int = TOKENS) -> np.ndarray:
    bits = np.random.PCG64(seed).random_raw(count) >> np.uint64(40)
    return (bits % config["vocab_size"]).astype(np.int32)


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint, written down independently of the loader."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    family = config["model_type"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = (config[f"num_{n}_heads"] * head for n in ("attention", "key_value"))
    biased = config.get("attention_bias", False)
    found = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found[f"{layer}.input_layernorm.weight"] = (width,)
        found[f"{layer}.post_attention_layernorm.weight"] = (width,)
        outputs = {"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q)}
        for name, shape in outputs.items():
            found[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if biased or (family == "qwen2" and name != "o"):
                found[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
        if family == "qwen3":
            found[f"{layer}.self_attn.q_norm.weight"] = (head,)
            found[f"{layer}.self_attn.k_norm.weight"] = (head,)
        outputs = {"gate": (mlp, width), "up": (mlp, width), "down": (width, mlp)}
        for name, shape in outputs.items():
            found[f"{layer}.mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias", False):
                found[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
    found["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    made = {}
    for index, (name, shape) in enumerate(shapes(config).items()):
        noise = uniform(1000 * seed + index, int(np.prod(shape))).reshape(shape)
        if "norm" in name:
            made[name] = 1 + 0.3 * noise
        elif name.endswith("bias") or "embed_tokens" in name:
            made[name] = 0.5 * noise
        else:
            sharp = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            made[name] = sharp * noise / np.float32(shape[1] ** 0.5)
    return {name: array.astype(np.float32) for name, array in made.items()}


def write(directory: Path, config: dict, seed: int = 0, dtype=np.float32, **extra):
    """A checkpoint directory without a tokenizer, in one file."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | extra))
    tensors = {k: v.astype(dtype) for k, v in weights(config, seed).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory
