"""Families that are a Llama under other names: what is renamed, split or folded.

An entry of `FAMILIES` has two functions. One rewrites a `config.json` into the keys of
a family that the model runs as it is, the other gives its tensors the names and values
of that family, one at a time as they are read. Beyond this module nothing knows them:
`save_pretrained` writes the family that they became.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.llama.config_keys import check_types, is_number
from models.llama.tensors import Tensors

Config = Mapping[str, Any]  # a decoded config.json


def _as_they_are(tensors: Tensors, config: Config) -> Tensors:
    del config
    return tensors


class Family(NamedTuple):
    """The way of a checkpoint of one `model_type` to another."""

    translate: Callable[[Config], dict[str, Any]]
    fold: Callable[[Tensors, Config], Tensors] = _as_they_are


def translate(config: Config) -> Config:
    """Rewrites `config` into the keys of a family that the model runs as it is.

    A `model_type` that is not in `FAMILIES` is returned as it is.

    Raises:
        ValueError: if a key asks for something that cannot be rewritten.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    return config if family is None else family.translate(config)


def fold(tensors: Tensors, config: Config) -> Tensors:
    """Returns tensors as a checkpoint of what `translate` makes of `config` has them.

    Values are folded in float32, before the cast to the model's dtype.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    return tensors if family is None else family.fold(tensors, config)


def is_folded(config: Config) -> bool:
    """Says if a checkpoint's tensors are not those of the model that reads them."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.fold is not _as_they_are


# --- tensors: each function gives one view of them, reading nothing


class _View(NamedTuple):
    """The tensor that another is made of, and how once it is read."""

    name: str
    change: Callable[[np.ndarray], np.ndarray] = lambda array: array


def _viewed(tensors: Tensors, views: Mapping[str, _View]) -> Tensors:
    def read(name: str) -> np.ndarray:
        view = views[name]
        return view.change(tensors.read(view.name))

    files: dict[str, Path] = {n: tensors.files[v.name] for n, v in views.items()}
    return Tensors(tensors.source, files, read)


def _scaled(name: str, factor: float) -> _View:
    if factor == 1:
        return _View(name)
    return _View(name, lambda array: array.astype(np.float32) * np.float32(factor))


def _rows(name: str, start: int, end: int, total: int) -> _View:
    def cut(array: np.ndarray) -> np.ndarray:
        if array.shape[0] != total:
            raise ValueError(
                f"tensor {name} has {array.shape[0]} rows, config.json asks for "
                f"{total}; one of the two is wrong."
            )
        return array[start:end]

    return _View(name, cut)


# --- Phi-3 and Phi-4: q, k and v are one matrix, gate and up another


def _phi3(config: Config) -> dict[str, Any]:
    # The same layer; Mistral's config.json has a place for a sliding window.
    family = "llama" if config.get("sliding_window") is None else "mistral"
    kept = {key: value for key, value in config.items() if key != "layer_types"}
    return _with_kv_heads(kept) | {"model_type": family}


def _with_kv_heads(config: Config) -> dict[str, Any]:
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    return {**config, "num_key_value_heads": heads}


def _split_phi3(tensors: Tensors, config: Config) -> Tensors:
    head_dim = _head_dim(config)
    q = config["num_attention_heads"] * head_dim
    kv = _with_kv_heads(config)["num_key_value_heads"] * head_dim
    mlp = config["intermediate_size"]
    parts = {
        "qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": mlp, "up_proj": mlp},
    }
    views = {}
    for name in tensors.files:
        fused = next((part for part in parts if f".{part}." in name), None)
        if fused is None:
            views[name] = _View(name)
            continue
        start, total = 0, sum(parts[fused].values())
        for part, rows in parts[fused].items():
            split = name.replace(f".{fused}.", f".{part}.")
            views[split] = _rows(name, start, start + rows, total)
            start += rows
    return _viewed(tensors, views)


def _head_dim(config: Config) -> int:
    return (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )


# --- Granite: constants on the embedding, the residual branches, attention and logits

_MULTIPLIERS = (
    *("embedding_multiplier", "residual_multiplier"),
    *("attention_multiplier", "logits_scaling"),
)


def _granite(config: Config) -> dict[str, Any]:
    for key in _MULTIPLIERS:
        value = config.get(key, 1.0)
        if not (is_number(value) and value > 0):
            raise ValueError(
                f"config.json key {key}={value!r} must be a finite number above 0."
            )
    kept = {key: value for key, value in config.items() if key not in _MULTIPLIERS}
    if not _shares_embedding(config):
        kept["tie_word_embeddings"] = False
    return kept | {"model_type": "llama"}


def _shares_embedding(config: Config) -> bool:
    """Returns whether the output matrix still is the embedding after folding."""
    factors = (config.get(key, 1) for key in ("embedding_multiplier", "logits_scaling"))
    return bool(config.get("tie_word_embeddings")) and all(f == 1 for f in factors)


def _fold_granite(tensors: Tensors, config: Config) -> Tensors:
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    residual = config.get("residual_multiplier", 1.0)
    # Attention scales its logits by head_dim ** -0.5: the queries make up for the rest.
    query = config.get("attention_multiplier", 1.0) * _head_dim(config) ** 0.5
    factors = {".o_proj.": residual, ".down_proj.": residual, ".q_proj.": query}
    views = {
        name: _scaled(name, next((f for p, f in factors.items() if p in name), 1.0))
        for name in tensors.files
    }
    if embedding not in tensors.files:  # an error by its name, later
        return _viewed(tensors, views)
    views[embedding] = _scaled(embedding, config.get("embedding_multiplier", 1.0))
    if not _shares_embedding(config):
        tied = config.get("tie_word_embeddings") or output not in tensors.files
        source = embedding if tied else output
        views[output] = _scaled(source, 1 / config.get("logits_scaling", 1.0))
    return _viewed(tensors, views)


# --- InternLM3, Seed-OSS: other names for the biases


def _internlm3(config: Config) -> dict[str, Any]:
    kept = {key: v for key, v in config.items() if key not in ("bias", "qkv_bias")}
    attention = bool(config.get("qkv_bias", config.get("attention_bias", False)))
    others = bool(config.get("bias", config.get("mlp_bias", False)))
    if attention != others:
        raise ValueError(
            f"config.json keys qkv_bias={attention} and bias={others} differ, which is "
            "not supported for internlm3."
        )
    biases = {"attention_bias": attention, "mlp_bias": others}
    return kept | biases | {"model_type": "llama"}


def _seed_oss(config: Config) -> dict[str, Any]:
    kept = {key: v for key, v in config.items() if key != "attention_out_bias"}
    inner = bool(config.get("attention_bias", True))
    outer = bool(config.get("attention_out_bias", False))
    if outer and not inner:
        raise ValueError(
            "config.json keys attention_bias=False and attention_out_bias=True are not "
            "supported together for seed_oss."
        )
    # Qwen2 has biases on q, k and v alone.
    family = "qwen2" if inner and not outer else "llama"
    kept["head_dim"] = config.get("head_dim") or 128
    return _with_kv_heads(kept) | {"attention_bias": inner, "model_type": family}


# --- Ministral, SmolLM3: other defaults


def _ministral(config: Config) -> dict[str, Any]:
    kinds = config.get("layer_types")
    kept = {key: value for key, value in config.items() if key != "layer_types"}
    if kinds is not None and "sliding_attention" not in kinds:
        kept["sliding_window"] = None
    elif kinds is not None and kept.get("sliding_window", 4096) is None:
        raise ValueError(
            "config.json key layer_types holds sliding_attention with "
            "sliding_window=None; give the window, or make the layers full_attention."
        )
    return kept | {"model_type": "mistral"}


def _smollm3(config: Config) -> dict[str, Any]:
    interval = config.get("no_rope_layer_interval", 4)
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(
            f"config.json key no_rope_layer_interval={interval!r} must be an "
            "integer >= 1."
        )
    layers = config.get("no_rope_layers")
    kept = {k: v for k, v in config.items() if k != "no_rope_layer_interval"}
    if layers is None and isinstance(config.get("num_hidden_layers"), int):
        numbers = range(1, config["num_hidden_layers"] + 1)
        kept["no_rope_layers"] = [int(n % interval != 0) for n in numbers]
    defaults = {"tie_word_embeddings": True, "rope_theta": 2_000_000.0}
    return defaults | _with_kv_heads(kept)


# --- Text parts of models that also see images


def _text_part(family: str, **defaults: Any) -> Callable[[Config], dict[str, Any]]:
    def translate_text(config: Config) -> dict[str, Any]:
        text = dict(config.get("text_config") or {})
        check_types(text)
        if config.get("dtype") or config.get("torch_dtype"):
            text = {k: v for k, v in text.items() if not k.endswith("dtype")}
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        merged = defaults | _without_images(config) | text
        model_type = text.get("model_type", family)
        if model_type not in (family, config["model_type"], _text_name(config)):
            raise ValueError(
                f"config.json key text_config has model_type={model_type!r}, which is "
                f"not supported in {config['model_type']}; only {family!r} is."
            )
        for key in ("rope_scaling", "rope_parameters"):
            if merged.get(key):
                merged[key] = _of_text_alone(merged[key])
        named = {"tie_word_embeddings": bool(tied), "model_type": family}
        return _with_kv_heads(merged) | named

    return translate_text


_OF_IMAGES = {
    *("text_config", "vision_config", "image_token_index", "spatial_merge_size"),
    *("projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer"),
}


def _without_images(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _OF_IMAGES}


def _text_name(config: Config) -> str:
    return f"{config['model_type']}_text"


def _of_text_alone(rope: Mapping[str, Any]) -> dict[str, Any]:
    # A text's positions are the same in all sections of an image's: plain rotation.
    sections = ("mrope_section", "mrope_interleaved")
    kept = {key: value for key, value in rope.items() if key not in sections}
    return {k: "default" if v == "mrope" else v for k, v in kept.items()}


# Outer prefixes of the text's tensors, in the order in which they are taken off.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_IMAGE_TENSORS = (
    *("visual.", "vision_tower.", "multi_modal_projector."),
    *("model.visual.", "model.vision_tower.", "model.multi_modal_projector."),
)


def _take_text(tensors: Tensors, config: Config) -> Tensors:
    del config
    views = {}
    for name in tensors.files:
        if name.startswith(_IMAGE_TENSORS):
            continue
        pairs = ((o, n) for o, n in _PREFIXES if name.startswith(o))
        outer, inner = next(pairs, ("", ""))
        views[inner + name.removeprefix(outer)] = _View(name)
    return _viewed(tensors, views)


_QWEN2_VL = Family(
    _text_part("qwen2", rope_theta=1_000_000.0, max_window_layers=80), _take_text
)
FAMILIES = {
    "phi3": Family(_phi3, _split_phi3),
    "granite": Family(_granite, _fold_granite),
    "internlm3": Family(_internlm3),
    "seed_oss": Family(_seed_oss),
    "ministral": Family(_ministral),
    "smollm3": Family(_smollm3),
    "mistral3": Family(_text_part("mistral"), _take_text),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": Family(_text_part("qwen3", rope_theta=500_000.0), _take_text),
}
