"""Rotary positions to and from a `config.json`, in the spellings of all releases."""

from collections.abc import Mapping
from typing import Any

from kvjax.rope import Rope
from models.llama.config_keys import is_number

# What each kind of rope scaling reads: our name -> key of the dict.
_STRETCH = {"factor": "factor"}
_ROPE_KEYS = {
    "default": {},
    "linear": _STRETCH,
    "dynamic": _STRETCH,
    "llama3": {
        **_STRETCH,
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
    "yarn": {
        **_STRETCH,
        "original_context": "original_max_position_embeddings",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}


def rope_from_hf(config: Mapping[str, Any], head_dim: int, positions: int) -> Rope:
    """Returns the rope of `config`, whose max_position_embeddings are `positions`.

    Raises:
        ValueError: if its type is unknown, a key is missing or asks for something else,
            or two spellings disagree.
    """
    theta = config.get("rope_theta")
    ropes = {
        key: _rope_from_dict(key, config[key], theta, head_dim, positions)
        for key in ("rope_parameters", "rope_scaling")
        if config.get(key)
    } or {"": _rope_from_dict("", {}, theta, head_dim, positions)}
    if len(set(ropes.values())) > 1:
        raise ValueError(
            f"config.json keys rope_parameters={config['rope_parameters']!r} and "
            f"rope_scaling={config['rope_scaling']!r} disagree; remove one."
        )
    rope = next(iter(ropes.values()))
    original = config.get("original_max_position_embeddings")
    used = positions if rope.kind == "factors" else rope.original_context
    reads = rope.kind in ("llama3", "yarn", "factors")
    if reads and original not in (None, used):
        raise ValueError(
            f"config.json key original_max_position_embeddings={original!r} disagrees "
            f"with the {used} of its rope; remove one."
        )
    return rope


def rope_to_hf(rope: Rope, context: int) -> dict[str, Any]:
    """Returns the `rope_scaling` of a rope that is not `default`."""
    if rope.kind == "factors":
        return {
            "rope_type": "longrope",
            "type": "longrope",
            "short_factor": list(rope.factors),
            "long_factor": list(rope.factors),
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    values = {key: getattr(rope, name) for name, key in _ROPE_KEYS[rope.kind].items()}
    return {"rope_type": rope.kind, "type": rope.kind} | {
        key: value for key, value in values.items() if value is not None
    }


def _rope_from_dict(name, given, theta, head_dim, positions) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in (*_ROPE_KEYS, "longrope"):
        raise ValueError(
            f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}."
        )
    given = {key: value for key, value in given.items() if value is not None}
    theta = given.pop("rope_theta", theta)
    _check_numbers(name or "config.json", {"rope_theta": theta or 10_000.0})
    for key in ("rope_type", "type", "finetuned"):
        given.pop(key, None)
    if kind == "longrope":
        factors = _longrope_factors(name, given, positions)
        return Rope(head_dim, float(theta or 10_000.0), "factors", factors=factors)
    # Harmless at these values: the whole head turns, and what HF falls back to anyway.
    harmless = {"partial_rotary_factor": 1.0}
    if kind in ("default", "linear"):  # neither reads it
        given.pop("original_max_position_embeddings", None)
    if kind == "dynamic":
        harmless["original_max_position_embeddings"] = positions
    growth = given.pop("attn_factor", None) if kind == "yarn" else None
    _check_numbers(name, {"attn_factor": growth or 1.0})
    keys = _ROPE_KEYS[kind]
    for key, value in given.items():
        if key not in keys.values() and (key not in harmless or value != harmless[key]):
            raise ValueError(
                f"{name} key {key}={value!r} is not supported for rope type {kind!r}."
            )
    read = {ours: given[key] for ours, key in keys.items() if key in given}
    _check_numbers(name, read)
    if kind in ("llama3", "yarn", "linear", "dynamic"):
        read.setdefault("original_context", positions)
    if kind == "yarn":
        read.setdefault("factor", positions / max(read["original_context"], 1))
        if growth is not None:
            # As llama.cpp and vLLM read it; transformers leaves it out.
            scale = Rope(head_dim, kind=kind, **read).attention_scale()
            read["attention_factor"] = growth * scale
    needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    stretched = () if kind == "default" else ("factor",)
    missing = [key for key in needed.get(kind, stretched) if key not in read]
    if missing:
        raise ValueError(f"{name} of rope type {kind!r} lacks {', '.join(missing)}.")
    return Rope(head_dim, theta=float(theta or 10_000.0), kind=kind, **read)


def _check_numbers(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not (is_number(value) or (key == "truncate" and isinstance(value, bool))):
            raise ValueError(
                f"{name} key {key}={value!r} must be a number of at most 1e30."
            )


def _longrope_factors(name, given, positions) -> tuple[float, ...]:
    """The factors of a `longrope` whose frequencies never change, without a scale."""
    keys = {"short_factor", "long_factor", "attention_factor"}
    keys.add("original_max_position_embeddings")
    factors = given.get("long_factor")
    original = given.get("original_max_position_embeddings", positions)
    scale = given.get("attention_factor", 1.0 if original == positions else None)
    if (
        not given.keys() <= keys
        or not isinstance(factors, list)
        or not all(type(factor) is float or is_number(factor) for factor in factors)
        or given.get("short_factor") != factors
        or scale != 1
    ):
        raise ValueError(
            f"{name} of rope type 'longrope' is supported only with short_factor equal "
            "to long_factor and attention_factor=1.0."
        )
    return tuple(map(float, factors))
