"""GGUF files of the tiny checkpoints, in the order of rows that llama.cpp has."""

import string
from pathlib import Path

import checkpoints
import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# 64 of them, as many as the tiny checkpoints have.
TOKENS = ["<s>", "</s>", *string.ascii_letters, *string.digits[:9], "he"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, *[1] * 62],
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def metadata(config: dict) -> dict:
    """The keys of a configuration without rope scaling."""
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if config.get("head_dim"):
        keys["attention.key_length"] = keys["attention.value_length"] = config[
            "head_dim"
        ]
        keys["rope.dimension_count"] = config["head_dim"]
    if config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]
    return {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in keys.items()}


def tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The weights of a checkpoint under llama.cpp's names and in its order of rows."""
    made = {}
    permuted = config["model_type"] in ("llama", "mistral")
    for name, array in checkpoints.weights(config, seed).items():
        module, _, kind = name.rpartition(".")
        if permuted and "q_proj" in module:
            array = interleave(array, config["num_attention_heads"])
        elif permuted and "k_proj" in module:
            array = interleave(array, config["num_key_value_heads"])
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            made[f"blk.{layer}.{NAMES[module]}.{kind}"] = array
        else:
            made[f"{NAMES[module]}.{kind}"] = array
    return made


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: what turns together stands together."""
    size = len(rows) // heads
    moved = np.empty_like(rows)
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                source = head * size + half * (size // 2) + pair
                moved[head * size + 2 * pair + half] = rows[source]
    return moved


def write(
    path: Path,
    config: dict,
    kind: str = "F32",
    *,
    change: dict | None = None,
    arrays: dict | None = None,
    tokenizer: dict | None = TOKENIZER,
) -> Path:
    """A file of a configuration; `change` and `arrays` replace, or remove with None."""
    fields = metadata(config) | (tokenizer or {}) | (change or {})
    return write_raw(path, fields, tensors(config) | (arrays or {}), kind)


def write_raw(path: Path, fields: dict, arrays: dict, kind: str = "F32") -> Path:
    fields = dict(fields)
    out = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for key, value in fields.items():
        add(out, key, value)
    wanted = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    for name, array in arrays.items():
        if isinstance(array, tuple):  # bytes, and the type they are of
            out.add_tensor(name, array[0], raw_dtype=array[1])
        elif array is None:
            continue
        elif array.ndim < 2 or array.shape[-1] % block or kind == "F32":
            out.add_tensor(name, array)
        else:
            out.add_tensor(name, gguf.quantize(array, wanted), raw_dtype=wanted)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def add(out: gguf.GGUFWriter, key: str, value) -> None:
    """A field of the type that llama.cpp writes: uint32 and float32, not 64."""
    if value is None:
        return
    for kind, store in (
        (bool, out.add_bool),
        (int, out.add_uint32),
        (float, out.add_float32),
        (str, out.add_string),
        (list, out.add_array),
    ):
        if isinstance(value, kind):
            store(key, value)
            return
    raise TypeError(f"{key}={value!r}")
