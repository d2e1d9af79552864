"""The static sizes of a Llama-family model, to and from `config.json`.

`from_hf` reads the keys of the families in `ARCHITECTURES`, which the model runs as
they are; :mod:`models.llama.families` rewrites those of others first.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax import copies
from kvjax.interface import Copies
from kvjax.rope import Rope
from models.llama import families
from models.llama.config_keys import check_types, is_number, reject_unknown
from models.llama.config_rope import rope_from_hf, rope_to_hf


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes and options of a Llama or a near relative (see `ARCHITECTURES`).

    Attributes:
        vocab_size, width, num_layers, num_q_heads, num_kv_heads, head_dim, mlp_width:
            sizes; the axes V, E, L, Hq, Hkv, D, F.
        context: longest sequence the weights were made for, tokens, rope scaling
            included and never beyond `sliding_window`.
        rope: positions, with their scaling, of every layer that rotates.
        unrotated_layers: layers without positions, ascending (SmolLM3).
        norm_epsilon: of every RMSNorm.
        qkv_bias, output_bias, mlp_bias: biases of the projections (Qwen2: the first).
        qk_norm: RMSNorm on each query and key head before rotation (Qwen3).
        tied_embeddings: the output matrix is the input embedding.
        family: the `model_type` this configuration is written back as.
        dtype: of weights, activations and cache.
        sliding_window: window of the checkpoint, tokens, None if it has none. Attention
            here is always over everything: up to `context` tokens that is the same.
        attention_alpha: 1 is softmax, above 1 alpha-entmax attention.
        copies: of every token, the original among them; 1 is a model without.
        copy_window, copy_chunk: what a copy sees of the others; see
            :class:`kvjax.copies.Copies`.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    rope: Rope
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    family: Literal["llama", "mistral", "qwen2", "qwen3", "smollm3"] = "llama"
    dtype: jax.typing.DTypeLike = "float32"
    sliding_window: int | None = None
    attention_alpha: float = 1.0
    unrotated_layers: tuple[int, ...] = ()
    copies: int = 1
    copy_window: int = 0
    copy_chunk: int = 0

    def __post_init__(self):
        alpha = self.attention_alpha
        if not (is_number(alpha) and alpha >= 1):
            raise ValueError(
                f"attention_alpha={alpha!r} must be a finite number >= 1; 1 is softmax."
            )
        copies.check(self.copies, self.copy_window, self.copy_chunk)
        if self.copies > 1 and alpha != 1:
            raise ValueError(
                f"copies={self.copies} needs softmax attention, parts of which merge, "
                f"not attention_alpha={alpha}: leave one of them out."
            )

    @property
    def repeated(self) -> Copies | None:
        """The copies of every token; None of a model that has tokens alone."""
        if self.copies == 1:
            return None
        return Copies(self.copies, self.copy_window, self.copy_chunk)


def described(config: LlamaConfig) -> str:
    """Returns the text by which saved prompts know a model's sizes.

    Fields that came later are in it where they say something, so that prompts of
    before go on.
    """
    shown = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in _COPIES or getattr(config, field.name) != field.default
    ]
    return f"LlamaConfig({', '.join(shown)})"


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# What is written for entmax attention, after the family's name: libraries that know
# the family only must refuse the checkpoint, or they would run it with softmax.
_ENTMAX = "_entmax"
# Likewise of models that feed copies of a token, which predict from the last of them.
_PHD = "_phd"
_COPIES = {
    "copies": "phd_copies",
    "copy_window": "phd_window",
    "copy_chunk": "phd_chunk",
}
MODEL_TYPES = (
    *ARCHITECTURES,
    *(family for family in families.FAMILIES if family not in ARCHITECTURES),
    *(family + _ENTMAX for family in ARCHITECTURES),
    *(family + _PHD for family in ARCHITECTURES),
)
_DTYPES = ("float32", "bfloat16", "float16")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_REQUIRED = (*_SIZES, "rms_norm_eps")
_HANDLED = {
    *_REQUIRED,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "dtype",
    "torch_dtype",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "max_sequence_length",
    "original_max_position_embeddings",
    "no_rope_layers",
    "attention_alpha",  # ours: absent is softmax
    *_COPIES.values(),  # ours: absent is one row a token
}


def from_hf(
    config: Mapping[str, Any], *, dtype: jax.typing.DTypeLike | None = None
) -> LlamaConfig:
    """The configuration that a Hugging Face `config.json` describes.

    Both spellings are read: `rope_theta`/`rope_scaling`/`torch_dtype`, and the
    `rope_parameters`/`dtype` of transformers 5.

    `context` is `max_position_embeddings`, which for `llama3` and `longrope` counts the
    stretched context already; for `dynamic` it is `factor` times that, and for `yarn`
    at least `factor * original_max_position_embeddings`. Files of `linear` models count
    either way and do not say which: only a `max_sequence_length` promises more. A
    sliding window of any layer cuts it to the window, where windowed and full attention
    are still the same. See :func:`notes`.

    Args:
        config: the decoded JSON object.
        dtype: overrides the checkpoint's; a checkpoint that names none is float32.

    Raises:
        ValueError: if the family or rope scaling is unknown, a required key is missing,
            or a key asks for something this model does not do.
    """
    check_types(config)
    config = families.translate(config)
    check_types(config)  # the text's own part too
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; supported: "
            f"{', '.join(MODEL_TYPES)}."
        )
    family = model_type.removesuffix(_ENTMAX).removesuffix(_PHD)
    alpha = config.get("attention_alpha")
    if model_type.endswith(_ENTMAX) and alpha in (None, 1):
        raise ValueError(
            f"{model_type=} needs attention_alpha > 1 in config.json, got {alpha}; "
            f"model_type {family!r} is softmax."
        )
    repeated = {name: config.get(key) for name, key in _COPIES.items()}
    repeated = {name: value for name, value in repeated.items() if value is not None}
    if model_type.endswith(_PHD) and repeated.get("copies", 1) == 1:
        raise ValueError(
            f"{model_type=} needs {_COPIES['copies']} > 1 in config.json, got "
            f"{repeated.get('copies')}; model_type {family!r} has no copies."
        )
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if family != "llama" and config.get("num_key_value_heads") is None:
        missing.append("num_key_value_heads")
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}; add the missing keys."
        )
    reject_unknown(config, _HANDLED)
    epsilon = config["rms_norm_eps"]
    if not (is_number(epsilon) and epsilon >= 0):
        raise ValueError(
            f"config.json key rms_norm_eps={epsilon!r} must be a finite number >= 0."
        )

    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}."
        )
    attention_bias = config.get("attention_bias")
    attention_bias = bool(
        family == "qwen2" if attention_bias is None else attention_bias
    )
    mlp_bias = bool(config.get("mlp_bias", False))
    if family in ("mistral", "qwen2") and attention_bias != (family == "qwen2"):
        raise _unsupported("attention_bias", config["attention_bias"], family)
    if family not in ("llama", "smollm3") and mlp_bias:
        raise _unsupported("mlp_bias", mlp_bias, family)

    head_dim = config.get("head_dim")
    if head_dim is None:  # Qwen3 is the one family whose default is not width / heads
        head_dim = 128 if family == "qwen3" else config["hidden_size"] // heads
    positions = config["max_position_embeddings"]
    rope = rope_from_hf(config, head_dim, positions)
    context = positions
    if rope.kind == "linear":
        longest = int(rope.factor * positions)
        context = min(config.get("max_sequence_length") or positions, longest)
    elif rope.kind == "dynamic":
        context = int(rope.factor * positions)
    elif rope.kind == "yarn":
        context = max(positions, int(rope.factor * rope.original_context))
    if context >= 2**31:
        raise ValueError(
            f"config.json stretches {positions} positions to a context of {context}, "
            "which must be below 2**31: lower the factor."
        )
    unrotated = _unrotated_layers(config, family)
    window = _window_in_force(config, family, unrotated)

    return LlamaConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=config["intermediate_size"],
        context=context if window is None else min(context, window),
        rope=rope,
        norm_epsilon=float(epsilon),
        qkv_bias=attention_bias,
        output_bias=attention_bias and family != "qwen2",
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings") or False),
        family=family,
        dtype=_dtype_from_hf(config, dtype),
        sliding_window=window,
        attention_alpha=1.0 if alpha is None else alpha,
        unrotated_layers=unrotated,
        **repeated,
    )


def notes(config: LlamaConfig) -> tuple[str, ...]:
    """Returns what a user must know of a loaded model, one line each; mostly none."""
    told = []
    window, rope = config.sliding_window, config.rope
    if window is not None and config.context == window:
        told.append(
            f"the context ends at {window} tokens, the sliding window of the "
            "checkpoint, which is not implemented."
        )
    elif rope.kind == "linear":
        longest = int(rope.factor * rope.original_context)
        if config.context < longest:
            told.append(
                f"the context is {config.context} tokens: config.json does not say "
                f"whether it counts the linear rope factor {rope.factor:g}; if not, "
                f"set max_sequence_length to {longest}."
            )
    return tuple(told)


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` of `config`, in the spelling every transformers release reads.

    Entmax attention is written as `attention_alpha` under a `model_type` of its own,
    `llama_entmax` for a Llama: transformers ignores keys that it does not know, and
    would run such a model with softmax; a model type that it does not know it refuses.
    So it is with copies of a token, of type `llama_phd`.

    Raises:
        ValueError: if `config.family` cannot express it.
    """
    family, rope = config.family, config.rope
    written = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "torch_dtype": jnp.dtype(config.dtype).name,
        "use_cache": True,
    }
    if config.attention_alpha != 1:
        written["architectures"] = [
            ARCHITECTURES[family].replace("ForCausalLM", "EntmaxForCausalLM")
        ]
        written["model_type"] = family + _ENTMAX
        written["attention_alpha"] = config.attention_alpha
    if config.copies != 1:
        written["architectures"] = [
            ARCHITECTURES[family].replace("ForCausalLM", "PhdForCausalLM")
        ]
        written["model_type"] = family + _PHD
        written |= {key: getattr(config, name) for name, key in _COPIES.items()}
    if rope.kind in ("linear", "dynamic"):
        written["max_position_embeddings"] = rope.original_context
    if rope.kind == "linear":
        written["max_sequence_length"] = config.context
    if rope.kind != "default":
        written["rope_scaling"] = rope_to_hf(rope, config.context)
    if family in ("llama", "qwen3", "smollm3"):
        written["attention_bias"] = config.qkv_bias
    if family in ("llama", "smollm3"):
        written["mlp_bias"] = config.mlp_bias
    windowed = config.sliding_window is not None
    if family != "llama":
        written["sliding_window"] = config.sliding_window
    if family not in ("llama", "mistral"):
        written["use_sliding_window"] = windowed
    if family in ("qwen2", "qwen3"):
        written["max_window_layers"] = 0 if windowed else config.num_layers
    if family == "smollm3":
        rotated = [
            layer not in config.unrotated_layers for layer in range(config.num_layers)
        ]
        written["pad_token_id"] = None  # its default may be beyond the vocabulary
        written["no_rope_layers"] = [int(is_rotated) for is_rotated in rotated]
        kind = "sliding_attention" if windowed else "full_attention"
        written["layer_types"] = [kind] * len(rotated)
    read_back = from_hf(written)
    differing = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name != "dtype"
        and getattr(read_back, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise ValueError(
            f"a {family} config.json cannot express {', '.join(differing)}; "
            "choose another family or value."
        )
    return written


def _unsupported(key: str, value: Any, family: str) -> ValueError:
    return ValueError(f"config.json key {key}={value!r} is not supported for {family}.")


def _window_in_force(
    config: Mapping[str, Any], family: str, unrotated: tuple[int, ...]
) -> int | None:
    """The window of the layers that slide, by the rule of each family in transformers.

    None if there is no window, or no layer attends in one.
    """
    default = 4096 if family != "smollm3" else None
    window = config.get("sliding_window", default)
    if family == "llama":
        if config.get("sliding_window") is not None:
            raise _unsupported("sliding_window", window, family)
        window = None
    kinds = config.get("layer_types")
    flagged = family.startswith("qwen") or (family == "smollm3" and kinds is None)
    if flagged and not config.get("use_sliding_window"):
        window = None
    # Mistral's layers are all alike: its model does not look at their types.
    slides = window is not None or family == "mistral"
    allowed = ("full_attention", "sliding_attention")[: 2 if slides else 1]
    strange = {str(kind) for kind in kinds or () if kind not in allowed}
    if strange:
        raise ValueError(
            f"config.json key layer_types holds {', '.join(sorted(strange))} with "
            f"sliding_window={window}; only {', '.join(allowed)} is supported."
        )
    if family in ("llama", "mistral"):
        return window
    if kinds is not None:
        return window if "sliding_attention" in kinds else None
    if family == "smollm3":
        return window if unrotated else None
    first = config.get("max_window_layers")
    first = 28 if first is None else first
    return window if first < config["num_hidden_layers"] else None


def _unrotated_layers(config: Mapping[str, Any], family: str) -> tuple[int, ...]:
    layers = config.get("no_rope_layers")
    if layers is None:
        return ()
    if family != "smollm3":
        raise _unsupported("no_rope_layers", layers, family)
    count = config["num_hidden_layers"]
    if not isinstance(layers, list) or len(layers) < count:
        raise ValueError(
            f"config.json key no_rope_layers={layers!r} must be a list of {count}, 1 "
            "for a layer with RoPE and 0 for one without."
        )
    return tuple(layer for layer in range(count) if not layers[layer])


def _dtype_from_hf(config: Mapping[str, Any], dtype) -> str:
    if dtype is None:
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = dtype
    with contextlib.suppress(TypeError, ValueError):  # numpy's, of what is no dtype
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"dtype={name!r} is not supported; use {', '.join(_DTYPES)}.")
    return name
