"""The sampling that a checkpoint wants: its `generation_config.json`, as we read it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from kvjax.decoding.sampling import Sampling

# Keys that sample, or search, in ways that are not here; with what leaves them without
# effect.
_OTHERS = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "dola_layers": None,
    "min_length": 0,
    "min_new_tokens": None,
    "stop_strings": None,
}
# What the transformers library samples by where a file is silent; it leaves out of the
# files it writes what is not set. The other defaults change nothing.
_DEFAULTS = {"temperature": 1.0, "top_k": 50}
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")


class Wanted(NamedTuple):
    """The sampling that a `generation_config.json` asks for."""

    sampling: dict[str, float | int]  # fields of `Sampling`: named, and defaults
    others: tuple[str, ...]  # keys that change what is sampled, and are not supported


def read(generation: Mapping[str, Any]) -> Wanted:
    """Reads the sampling of a checkpoint.

    `do_sample: false` is greedy, whatever temperature stands beside it; without that
    key a temperature, top_k, top_p or min_p asks for sampling. Sampling is at
    temperature 1 and of the 50 most likely tokens unless it says otherwise; `top_k: 0`
    is of all.

    Raises:
        ValueError: if a value is no number.
    """
    named = {
        name: _number(name, generation[name])
        for name in Sampling._fields
        if generation.get(name) is not None
    }
    does_sample = generation.get("do_sample")
    if does_sample is None:
        does_sample = any(name in named for name in _SAMPLED)
    if does_sample:
        named = _DEFAULTS | named
    else:
        named = {key: x for key, x in named.items() if key not in _SAMPLED}
    others = tuple(
        key
        for key, neutral in _OTHERS.items()
        if generation.get(key) not in (None, neutral, [], {})
    )
    return Wanted(named, others)


def _number(name: str, value: Any) -> float | int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(
            f"generation_config.json has {name}={value!r}, which must be a number: "
            "mend the file, or leave --chat out."
        )
    return int(value) if name == "top_k" else float(value)
