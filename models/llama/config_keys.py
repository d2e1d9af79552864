"""Keys of a `config.json` that say nothing about the model's arithmetic, and the rest.

Lists as data, and the one function that reads them: a key that is neither handled nor
known to be harmless is an error naming it, never a model that is silently wrong.
"""

from collections.abc import Collection, Mapping
from typing import Any

# Of transformers' `GenerationConfig`, in all releases: how to sample, not what from.
_GENERATION = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
    *("early_stopping", "stop_strings", "do_sample", "num_beams", "num_beam_groups"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "use_mtp"),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty"),
    *("encoder_repetition_penalty", "diversity_penalty", "penalty_alpha"),
    *(
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "max_matching_ngram_size",
    ),
    *("bad_words_ids", "force_words_ids", "constraints", "renormalize_logits"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "token_healing", "guidance_scale"),
    *("low_memory", "watermarking_config", "num_return_sequences", "dola_layers"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "is_assistant", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "target_lookbehind", "speculation_type"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("prefill_chunk_size",),
}
# Names, versions, classification heads, training, and the choice of an implementation.
_BOOKKEEPING = {
    *("architectures", "auto_map", "transformers_version", "transformers.js_config"),
    *("name_or_path", "model_name", "tokenizer_class", "torchscript", "return_dict"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("task_specific_params", "prefix", "use_bfloat16", "initializer_range"),
    *("initializer_factor", "init_std", "neftune_noise_alpha"),
    *("gradient_checkpointing", "use_gradient_checkpointing", "attn_implementation"),
    *("use_flash_attn", "use_flash_attention", "use_flash_attention_2", "use_sdpa"),
    "pretraining_tp",  # how a product is cut into slices that are summed
    *("model_max_length", "tokenizer_model_max_length"),
    *("tokenizer_padding_side", "seq_length", "max_seq_length", "max_seq_len"),
}
# Keys that are harmless at these values only.
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "activation": ("swiglu", "silu"),  # Falcon3
    "partial_rotary_factor": (1.0,),
    "chunk_size_feed_forward": (0,),
    "causal": (True,),
    "is_causal": (True,),
    "use_rope": (True,),
    # Granite's, which is another `model_type`.
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (1.0,)),
    **dict.fromkeys(("attention_multiplier", "logits_scaling"), (1.0,)),
    **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),  # Phi-4
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), (False,)),
    **dict.fromkeys(("is_decoder", "use_mrope", "rope_interleaved"), (False,)),
}
_QUANTIZED = {
    "quantization_config": "quantized",
    "compression_config": "quantized",
    "quantization": "quantized by MLX",
}


_TYPES = {
    "model_type": (str, "text"),
    "rope_scaling": (dict, "an object"),
    "rope_parameters": (dict, "an object"),
    "text_config": (dict, "an object"),
    "layer_types": (list, "a list"),
    "no_rope_layers": (list, "a list"),
    "max_window_layers": (int, "a whole number"),
}


# Sizes, with the most that any machine could hold.
_SIZES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 2**31 - 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2**31 - 1),
    **dict.fromkeys(("head_dim", "sliding_window", "max_sequence_length"), 2**31 - 1),
    "max_position_embeddings": 2**31 - 1,
    "num_hidden_layers": 10_000,
}
_LARGEST = 1e30  # of other numbers: products of two are not infinite yet


def check_types(config: Mapping[str, Any]) -> None:
    """Checks keys that are looked into: a file written by hand may hold anything.

    Raises:
        ValueError: if a value is of another JSON type than its key's, or a size is out
            of its range.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json holds {config!r:.80}; it must be an object.")
    for key, (kind, description) in _TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"config.json key {key}={value!r} must be {description}.")
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise ValueError(
                f"config.json key {key}={value!r} must be an integer >= 1."
            )
        if value > most:
            raise ValueError(f"config.json key {key}={value} must be at most {most}.")


def is_number(value: Any) -> bool:
    """Returns whether a value of a JSON file is a number that can be computed with."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and -_LARGEST <= value <= _LARGEST


def reject_unknown(config: Mapping[str, Any], handled: Collection[str]) -> None:
    """Checks every key of `config` that is not `handled`.

    Raises:
        ValueError: for the first key that asks for something this model does not do, or
            that is not known.
    """
    for key, value in config.items():
        if key in handled or _is_harmless(key):
            continue
        if key in _FIXED and value is not None:
            if value not in _FIXED[key]:
                raise ValueError(
                    f"config.json key {key}={value!r} is not supported; only "
                    f"{' or '.join(map(repr, _FIXED[key]))} is."
                )
        elif not _is_absent(value):
            if key in _QUANTIZED:
                method = value.get("quant_method") if isinstance(value, dict) else None
                by = "" if method is None else f" ({method})"
                raise ValueError(
                    f"config.json has {key}: the weights are {_QUANTIZED[key]}{by}, "
                    "which is not supported; use the unquantized checkpoint."
                )
            raise ValueError(
                f"config.json key {key}={value!r} is not known to this model; remove "
                "it if it changes nothing."
            )


def _is_harmless(key: str) -> bool:
    return (
        key in _GENERATION
        or key in _BOOKKEEPING
        or key.startswith(("_", "unsloth_"))
        or key.endswith(("_token_id", "_pdrop"))
        or "dropout" in key
        or (key.startswith("is_") and key.endswith("_config"))  # is_llama_config
    )


def _is_absent(value: Any) -> bool:
    """Returns whether a key asks for nothing: the flag of something not done."""
    return value is None or value is False or value in ("", [], {})
