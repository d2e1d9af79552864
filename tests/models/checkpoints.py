"""Tiny checkpoints in the Hugging Face layout whose weights are a function of a seed.

Only the raw stream of PCG64 is used, which NumPy promises never to change, so goldens
made elsewhere hold here. The scales keep logits of order 1 and attention far from
uniform.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvjax import files

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


class Twin(NamedTuple):
    """A checkpoint of a family that becomes another, and what it is made of."""

    config: dict  # its config.json
    plain: dict  # of a plain model with the same numbers of weights
    pack: Callable[[dict], dict] = dict  # tensors of `plain` -> as the family stores it


def _fused(tensors: dict) -> dict:
    """Phi-3's way to store: the rows of q, k and v, and of gate and up, in one."""
    stored = {}
    for name, array in tensors.items():
        if "q_proj" in name:
            parts = (tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
            stored[name.replace("q_proj", "qkv_proj")] = np.concatenate([*parts])
        elif "gate_proj" in name:
            parts = (array, tensors[name.replace("gate_proj", "up_proj")])
            stored[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(parts)
        elif not any(part in name for part in ("k_proj", "v_proj", "up_proj")):
            stored[name] = array
    return stored


def _outer(prefix: str, head: str, image: str) -> Callable[[dict], dict]:
    """The way of models that also see: below `prefix`, beside an image tower."""

    def pack(tensors: dict) -> dict:
        stored = {f"{image}.another.weight": np.ones((3, 2), np.float32)}
        for name, array in tensors.items():
            inside = name.removeprefix("model.")
            stored[head + name if name == inside else prefix + inside] = array
        return stored

    return pack


_TEXT = {key: value for key, value in BASE.items() if key != "model_type"}
_FLAT = _TEXT | {"rms_norm_eps": 1e-6}
_MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}
_PIXTRAL = {
    "model_type": "pixtral",
    **dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 16),
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
}
_GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.25,
    "logits_scaling": 2.5,
}
# The defaults of transformers are beyond this vocabulary.
_TOKENS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
_FOUR = BASE | {"num_hidden_layers": 4, "intermediate_size": 16}
FAMILIES = {
    "phi3": Twin(
        BASE
        | _TOKENS
        | {"model_type": "phi3", "sliding_window": None, "resid_pdrop": 0.0}
        | {"original_max_position_embeddings": 64, "embd_pdrop": 0.0},
        BASE,
        _fused,
    ),
    "phi3_window": Twin(
        BASE | _TOKENS | {"model_type": "phi3", "sliding_window": 48}, BASE, _fused
    ),
    "granite": Twin(
        BASE | _GRANITE | {"tie_word_embeddings": True},
        BASE | {"tie_word_embeddings": True},
    ),
    "granite_biases": Twin(
        BASE | _GRANITE | {"attention_bias": True, "mlp_bias": True},
        BASE | {"attention_bias": True, "mlp_bias": True},
    ),
    "internlm3": Twin(
        BASE
        | {"model_type": "internlm3", "qkv_bias": True, "bias": True, "head_dim": 8}
        | {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
        BASE | {"attention_bias": True, "mlp_bias": True},
    ),
    "seed_oss": Twin(
        BASE
        | {"model_type": "seed_oss", "attention_bias": True, "head_dim": 12}
        | {"attention_out_bias": False, "residual_dropout": 0.1},
        BASE | {"model_type": "qwen2", "head_dim": 12},
    ),
    "ministral": Twin(
        BASE
        | {"model_type": "ministral", "sliding_window": 48, "head_dim": 8}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        BASE,
    ),
    "smollm3": Twin(
        BASE
        | _TOKENS
        | {"model_type": "smollm3", "no_rope_layers": [0, 1]}
        | {"tie_word_embeddings": True, "pretraining_tp": 2},
        BASE | {"tie_word_embeddings": True},
    ),
    "smollm3_biases": Twin(
        _FOUR
        | _TOKENS
        | {"model_type": "smollm3", "no_rope_layer_interval": 2}
        | {"attention_bias": True, "mlp_bias": True},
        _FOUR | {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral3": Twin(
        {
            "model_type": "mistral3",
            "text_config": _TEXT | {"model_type": "mistral", "sliding_window": None},
            "vision_config": _PIXTRAL,
            "image_token_index": 10,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
            "vision_feature_layer": -1,
            "projector_hidden_act": "gelu",
        },
        BASE,
        _outer("language_model.model.", "language_model.", "vision_tower"),
    ),
    "qwen2_vl": Twin(
        _FLAT
        | {"model_type": "qwen2_vl", "rope_scaling": _MROPE, "image_token_id": 60}
        | {"vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2}}
        | {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        _FLAT | {"model_type": "qwen2"},
        _outer("model.", "", "visual"),
    ),
    "qwen2_5_vl": Twin(
        {
            "model_type": "qwen2_5_vl",
            "text_config": _TEXT
            | {"model_type": "qwen2_5_vl_text", "rope_scaling": _MROPE}
            | {"tie_word_embeddings": True},
            "vision_config": _QWEN_VISION,
        },
        BASE | {"model_type": "qwen2", "tie_word_embeddings": True},
        _outer("model.language_model.", "", "model.visual"),
    ),
    "qwen3_vl": Twin(
        {
            "model_type": "qwen3_vl",
            "text_config": _TEXT
            | {"model_type": "qwen3_vl_text", "head_dim": 8}
            | {"rope_scaling": _MROPE | {"type": "default"}},
            "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
        },
        BASE | {"model_type": "qwen3"},
        _outer("model.language_model.", "", "model.visual"),
    ),
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
    tensors = {k: v.astype(dtype) for k, v in weights(config, seed).items()}
    return _write(directory, config | extra, tensors)


def write_family(directory: Path, name: str) -> Path:
    """A checkpoint directory of one of `FAMILIES`, without a tokenizer."""
    twin = FAMILIES[name]
    return _write(directory, twin.config, twin.pack(weights(twin.plain)))


def _write(directory: Path, config: dict, tensors: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "model.safetensors"
    files.save_tensors(path, tensors, {"format": "pt"})
    return directory
