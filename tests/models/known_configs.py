"""`config.json` of known checkpoints, with what it comes to: sizes are cut, keys not.

Each is (what the file says, family, context). Sizes that mean nothing here are small.
"""

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}
_SAVED = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
}


def _file(model_type, positions, **keys):
    about = {"model_type": model_type, "max_position_embeddings": positions}
    return _SIZES | _SAVED | about | keys


_NO_BIAS = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
_LINEAR = {"type": "linear"}
_LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_QWEN = {"use_sliding_window": False, "attention_dropout": 0.0}
_ALL_FULL = {"layer_types": ["full_attention"] * 4}
_VISION = {"vision_config": {"hidden_size": 16, "depth": 2}}
_IMAGE_TOKENS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_OLD_DUMP = {  # every default of PretrainedConfig, as older releases wrote them
    "_name_or_path": "../checkpoint",
    "add_cross_attention": False,
    "architectures": ["LlamaForCausalLM"],
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": 0,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}

LOADED = {
    "llama-7b": (_file("llama", 2048, max_sequence_length=2048), "llama", 2048),
    "Llama-2-7b": (_file("llama", 4096, **_NO_BIAS), "llama", 4096),
    "old dump": (_file("llama", 4096, **_OLD_DUMP), "llama", 4096),
    "Llama-3.2-1B": (
        _file("llama", 131072, head_dim=16, rope_scaling=_LLAMA3, **_NO_BIAS),
        "llama",
        131072,
    ),
    "Llama-3.2-1B unsloth": (
        _file(
            "llama",
            131072,
            rope_scaling=_LLAMA3,
            unsloth_fixed=True,
            unsloth_version="2024.9",
            model_name="unsloth/Llama-3.2-1B",
        ),
        "llama",
        131072,
    ),
    "SmolLM2-135M": (
        _file(
            "llama",
            8192,
            is_llama_config=True,
            rope_interleaved=False,
            rope_theta=100000,
            **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        ),
        "llama",
        8192,
    ),
    "Falcon3-1B": (
        _file("llama", 8192, activation="swiglu", head_dim=256, **_NO_BIAS),
        "llama",
        8192,
    ),
    "deepseek-coder-6.7b": (
        _file("llama", 16384, rope_scaling=_LINEAR | {"factor": 4.0}),
        "llama",
        16384,
    ),
    "vicuna-7b-v1.5-16k": (
        _file(
            "llama",
            4096,
            max_sequence_length=16384,
            rope_scaling=_LINEAR | {"factor": 4.0},
        ),
        "llama",
        16384,
    ),
    "CodeLlama-7b": (_file("llama", 16384, rope_theta=1000000), "llama", 16384),
    "Yi-6B": (_file("llama", 4096, rope_theta=5000000.0), "llama", 4096),
    "Mistral-7B-v0.1": (_file("mistral", 32768, sliding_window=4096), "mistral", 4096),
    "Mistral-7B-v0.3": (_file("mistral", 32768, sliding_window=None), "mistral", 32768),
    "Ministral-8B": (
        _file("mistral", 32768, sliding_window=32768, head_dim=128),
        "mistral",
        32768,
    ),
    "Qwen2.5-7B": (
        _file("qwen2", 32768, sliding_window=32768, max_window_layers=28, **_QWEN),
        "qwen2",
        32768,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        _file(
            "qwen2",
            131072,
            use_mrope=False,
            sliding_window=4096,
            max_window_layers=28,
            **_QWEN,
        ),
        "qwen2",
        131072,
    ),
    "Qwen2.5 with YaRN": (
        _file(
            "qwen2",
            32768,
            rope_scaling={
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
            **_QWEN,
        ),
        "qwen2",
        131072,
    ),
    "Qwen3-0.6B": (
        _file(
            "qwen3",
            40960,
            attention_bias=False,
            head_dim=128,
            max_window_layers=28,
            sliding_window=None,
            **_QWEN,
            **_ALL_FULL,
        ),
        "qwen3",
        40960,
    ),
    "Phi-3-mini-4k": (
        _file(
            "phi3",
            4096,
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
            attention_bias=False,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            original_max_position_embeddings=4096,
            sliding_window=2047,
            _attn_implementation="flash_attention_2",
        ),
        "mistral",
        2047,
    ),
    "phi-4": (
        _file(
            "phi3",
            16384,
            original_max_position_embeddings=16384,
            sliding_window=None,
            rope_theta=250000,
        ),
        "llama",
        16384,
    ),
    "phi-4 unsloth": (
        _file("llama", 16384, original_max_position_embeddings=16384),
        "llama",
        16384,
    ),
    "granite-3.3-2b": (
        _file(
            "granite",
            131072,
            attention_multiplier=0.015625,
            embedding_multiplier=12.0,
            logits_scaling=8.0,
            residual_multiplier=0.22,
            tie_word_embeddings=True,
            attention_bias=False,
            mlp_bias=False,
        ),
        "llama",
        131072,
    ),
    "internlm3-8b": (
        _file(
            "internlm3",
            32768,
            auto_map={"AutoModel": "modeling_internlm3.InternLM3Model"},
            bias=False,
            qkv_bias=False,
            head_dim=128,
            rope_scaling={"factor": 6.0, "rope_type": "dynamic"},
        ),
        "llama",
        6 * 32768,
    ),
    "Seed-OSS-36B": (
        _file(
            "seed_oss",
            524288,
            attention_bias=True,
            attention_out_bias=False,
            mlp_bias=False,
            head_dim=128,
            pretraining_tp=1,
            residual_dropout=0.1,
            rope_scaling={"rope_type": "default"},
        ),
        "qwen2",
        524288,
    ),
    "SmolLM3-3B": (
        _file(
            "smollm3",
            65536,
            no_rope_layer_interval=4,
            no_rope_layers=[1, 1, 1, 0],
            max_window_layers=28,
            pretraining_tp=2,
            sliding_window=None,
            attention_bias=False,
            mlp_bias=False,
            **_QWEN,
            **_ALL_FULL,
        ),
        "smollm3",
        65536,
    ),
    "Mistral-Small-3.1-24B": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "image_token_index": 10,
            "model_type": "mistral3",
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "text_config": _SIZES
            | {
                "attention_dropout": 0.0,
                "head_dim": 128,
                "hidden_act": "silu",
                "max_position_embeddings": 131072,
                "model_type": "mistral",
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
                "use_cache": True,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {"model_type": "pixtral", "hidden_size": 16},
            "vision_feature_layer": -1,
        },
        "mistral",
        131072,
    ),
    "Qwen2-VL-2B": (
        _file(
            "qwen2_vl",
            32768,
            rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
            sliding_window=32768,
            max_window_layers=28,
            **_QWEN,
            **_VISION,
            **_IMAGE_TOKENS,
        ),
        "qwen2",
        32768,
    ),
}

_AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "zero_point": True}
_MLX = {"group_size": 64, "bits": 4}
REFUSED = {
    "AWQ": (_file("qwen2", 32768, quantization_config=_AWQ), r"quantized \(awq\), "),
    "MLX": (
        _file("llama", 8192, quantization=_MLX, quantization_config=_MLX),
        "config.json has quantization: the weights are quantized by MLX",
    ),
    "Phi-4-mini": (
        _file("phi3", 131072, full_attn_mod=1, partial_rotary_factor=0.75),
        "partial_rotary_factor=0.75 is not supported; only 1.0 is",
    ),
    "Phi-3-mini-128k": (
        _file("phi3", 131072, rope_scaling={"type": "longrope", "long_factor": [1.0]}),
        "rope type 'longrope' is supported only with",
    ),
    "Gemma-like": (
        _file("llama", 8192, attn_logit_softcapping=50.0),
        "attn_logit_softcapping=50.0 is not known",
    ),
    "OLMo-like": (_file("llama", 8192, clip_qkv=8.0), "clip_qkv=8.0 is not known"),
    "Mixtral-like": (
        _file("mistral", 8192, num_local_experts=8, sliding_window=None),
        "num_local_experts=8 is not known",
    ),
    "Qwen2.5-1M": (
        _file("qwen2", 1010000, dual_chunk_attention_config={"chunk_size": 262144}),
        "dual_chunk_attention_config=.* is not known",
    ),
    "interleaved": (_file("llama", 8192, rope_interleaved=True), "only False is"),
}
