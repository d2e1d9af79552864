"""The weights of a GGUF file, by their names in the Hugging Face layout.

Each becomes float32 when it is read, or stays codes and scales, one at a time.
"""

import re

import numpy as np

from models.gguf import blocks
from models.gguf.config import ROPE_FACTORS
from models.gguf.header import Header
from models.llama.config import LlamaConfig
from models.llama.packed import Blocks
from models.llama.tensors import Stored, Tensors, few
from models.llama.weights import layout

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def from_gguf(header: Header, config: LlamaConfig) -> Tensors:
    """The tensors of a file, each read when it is asked for, as floats or as stored.

    Raises:
        ValueError: if there are tensors that no model of these families has, or their
            shapes are not those of `config`.
    """
    names = {}
    unknown = []
    for name in header.tensors:
        if (hf_name := _hf_name(name)) is not None:
            names[hf_name] = name
        elif name != ROPE_FACTORS:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{header.path}: tensors of another architecture than "
            f"{header.architecture}: {few(unknown)}."
        )
    kinds = {}
    for entry in layout(config):
        if entry.name not in names:
            continue
        tensor = header.tensors[names[entry.name]]
        shape = tuple(int(size) for size in reversed(tensor.shape))  # columns first
        if shape != entry.shape:
            raise ValueError(
                f"{header.path}: tensor {names[entry.name]} has shape {shape}, the "
                f"metadata ask for {entry.shape}; one of the two is wrong."
            )
        if entry.is_kernel:
            kinds[entry.name] = blocks.format_of(tensor.tensor_type.name)

    def data_of(name: str) -> np.ndarray:
        data = np.asarray(header.tensors[names[name]].data)
        if header.architecture == "llama":
            data = _halves(data, _rotated_heads(name, config))
        return data

    def read(name: str) -> np.ndarray:
        import gguf

        kind = header.tensors[names[name]].tensor_type
        with np.errstate(all="ignore"):  # what is not finite is refused by name, later
            return gguf.dequantize(data_of(name), kind)

    def read_blocks(name: str) -> Blocks:
        kind = header.tensors[names[name]].tensor_type.name
        with np.errstate(all="ignore"):
            return blocks.read(data_of(name), kind)

    files = dict.fromkeys(names, header.path)
    return Tensors(header.path, files, read, Stored(kinds, read_blocks))


def _hf_name(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    match = _IN_LAYER.fullmatch(name)
    if match is None or match[2] not in _MODULES:
        return None
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"


def _rotated_heads(name: str, config: LlamaConfig) -> int:
    """The number of heads of a projection whose output is rotated; else 0."""
    if ".q_proj." in name:
        return config.num_q_heads
    return config.num_kv_heads if ".k_proj." in name else 0


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows, which turns neighbours together.

    Rows (0, D/2, 1, D/2 + 1, ...) become (0, 1, ..., D - 1). They are moved whole, so
    they may be quantized.
    """
    if not heads:
        return rows
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
