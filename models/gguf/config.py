"""The metadata of a GGUF file as the `config.json` of the same model.

One way in: what is asked for here is checked by :func:`models.llama.from_hf`. As there,
a key that is neither handled nor known to be harmless is an error naming it.
"""

import math
from typing import Any

import numpy as np

from models.gguf.header import Header

_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_HANDLED = {
    *_SIZES,
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    *(f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length")),
    *(f"rope.scaling.{key}" for key in ("attn_factor", "yarn_log_multiplier")),
    *(f"rope.scaling.yarn_{key}" for key in ("beta_fast", "beta_slow")),
}
_HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout"}
# Keys that are harmless at one value only. llama.cpp no longer reads `yarn_attn_factor`
# where it should scale something.
_FIXED = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "pooling_type": 0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "use_parallel_residual": False,
}
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that is no weight


def to_hf(header: Header) -> dict[str, Any]:
    """The decoded `config.json` that the metadata amount to.

    `max_position_embeddings` is such that the context is the file's own, rope scaling
    included.

    Raises:
        ValueError: if a key is missing, unknown or of the wrong type, or asks for what
            `config.json` cannot express.
    """
    name = header.architecture
    _reject_unknown(header)
    config: dict[str, Any] = {"model_type": name}
    for key, ours in _SIZES.items():
        config[ours] = header.integer(f"{name}.{key}", 0)
    config["rms_norm_eps"] = header.number(
        f"{name}.attention.layer_norm_rms_epsilon", 0.0
    )
    config["vocab_size"] = _vocab_size(header)
    if config["num_hidden_layers"] > len(header.tensors):
        raise ValueError(
            f"{header.path}: {len(header.tensors)} tensors are too few for "
            f"{name}.block_count={config['num_hidden_layers']}; one of them is wrong."
        )
    missing = [ours for ours, value in config.items() if not value]
    if missing:
        raise ValueError(
            f"{header.path}: the metadata lack what config.json calls "
            f"{', '.join(missing)}; convert the model again."
        )
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = header.integer(
        f"{name}.attention.head_count_kv", heads
    )
    config["head_dim"] = _head_dim(header, config["hidden_size"], heads)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = name == "qwen2" or "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    window = header.integer(f"{name}.attention.sliding_window", 0)
    if window:
        config["sliding_window"] = window
        if name == "llama":  # what llama.cpp calls a Mistral
            config["model_type"] = "mistral"
        else:
            config |= {"use_sliding_window": True, "max_window_layers": 0}
    config["rope_theta"] = header.number(f"{name}.rope.freq_base", 10_000.0)
    config |= _rope(header, config["max_position_embeddings"], config["head_dim"])
    config["torch_dtype"] = _dtype(header)
    return config


def _reject_unknown(header: Header) -> None:
    prefix = f"{header.architecture}."
    for key in header.fields:
        name = key.removeprefix(prefix)
        if name == key or name in _HANDLED or name in _HARMLESS:
            continue
        value = header.value(key)
        if name not in _FIXED:
            raise ValueError(
                f"{header.path}: {key}={value!r:.80} is not known to this model."
            )
        if value != _FIXED[name]:
            raise ValueError(
                f"{header.path}: {key}={value!r:.80} is not supported; only "
                f"{_FIXED[name]!r} is."
            )


def _vocab_size(header: Header) -> int:
    size = header.integer(f"{header.architecture}.vocab_size", 0)
    tokens = header.length("tokenizer.ggml.tokens")
    if 0 < size < tokens:
        raise ValueError(
            f"{header.path}: {header.architecture}.vocab_size={size} is less than the "
            f"{tokens} tokens of its tokenizer."
        )
    return size or tokens


def _head_dim(header: Header, width: int, heads: int) -> int:
    name = header.architecture
    size = header.integer(f"{name}.attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = header.integer(f"{name}.{key}", size)
        if other != size:
            raise ValueError(
                f"{header.path}: {name}.{key}={other} is not supported; it must be the "
                f"head_dim, {size}."
            )
    return size


def _rope(header: Header, context: int, head_dim: int) -> dict[str, Any]:
    """The keys of `config.json` that say how positions are scaled; none if not."""
    name = header.architecture
    factor = header.number(f"{name}.rope.scale_linear", 1.0)  # its older key
    factor = header.number(f"{name}.rope.scaling.factor", factor)
    # As llama.cpp has it: a factor without a type is linear.
    kind = header.text(f"{name}.rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{header.path}: {name}.rope.scaling.type={kind!r} is not supported; "
            "supported: none, linear, yarn."
        )
    scaled = kind != "none" and factor not in (0.0, 1.0)
    attention = header.number(f"{name}.rope.scaling.attn_factor", 1.0)
    if attention != 1 and not (scaled and kind == "yarn"):
        raise ValueError(
            f"{header.path}: {name}.rope.scaling.attn_factor={attention} is supported "
            "with yarn only."
        )
    factors = _factors(header, head_dim)
    if factors and scaled:
        raise ValueError(
            f"{header.path}: {ROPE_FACTORS} and {name}.rope.scaling.type={kind!r} both "
            "scale the positions; one of the two is wrong."
        )
    if factors and any(factor != 1 for factor in factors):
        return {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            }
        }
    if not scaled:
        return {}
    if kind == "linear":
        return _linear(header, context, factor)
    return {"rope_scaling": _yarn(header, context, factor, attention)}


def _factors(header: Header, head_dim: int) -> list[float]:
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return []
    shape = tuple(int(size) for size in tensor.shape)
    if tensor.tensor_type.name != "F32" or shape != (head_dim // 2,):
        raise ValueError(
            f"{header.path}: {ROPE_FACTORS} is {tensor.tensor_type.name} of shape "
            f"{shape}; it must be F32 of shape ({head_dim // 2},)."
        )
    return np.asarray(tensor.data).tolist()


def _linear(header: Header, context: int, factor: float) -> dict[str, Any]:
    positions = round(context / factor)
    if int(factor * positions) != context:
        raise ValueError(
            f"{header.path}: {header.architecture}.context_length={context} must be "
            f"{header.architecture}.rope.scaling.factor={factor} times a whole number; "
            "set it with `gguf-set-metadata`."
        )
    return {
        "max_position_embeddings": positions,
        "max_sequence_length": context,
        "rope_scaling": {"rope_type": "linear", "factor": factor},
    }


def _yarn(
    header: Header, context: int, factor: float, attention: float
) -> dict[str, Any]:
    name = f"{header.architecture}.rope.scaling"
    # Files count the stretched context, or the original one and leave its key out.
    original = header.integer(f"{name}.original_context_length", context)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": header.number(f"{name}.yarn_beta_fast", 32.0),
        "beta_slow": header.number(f"{name}.yarn_beta_slow", 1.0),
    }
    # llama.cpp multiplies where config.json replaces, and divides by a second scale.
    divisor = header.number(f"{name}.yarn_log_multiplier", 0.0)
    if attention != 1 or divisor:
        growth = 0.1 * math.log(max(factor, 1.0))
        scaling["attention_factor"] = attention * (growth + 1) / (growth * divisor + 1)
    return scaling


def _dtype(header: Header) -> str:
    """The dtype that holds the matrices without loss and without waste."""
    kinds = {
        tensor.tensor_type.name
        for tensor in header.tensors.values()
        if len(tensor.shape) > 1
    }
    if kinds == {"F16"}:
        return "float16"
    return "bfloat16" if kinds == {"BF16"} else "float32"
