"""Llama and its near relatives (Mistral, Qwen2, Qwen3)."""

from pathlib import Path
from typing import Any

import jax

from kvjax.interface import Params
from models.llama import tensors, tokenizer, weights
from models.llama.config import MODEL_TYPES, LlamaConfig, from_hf, to_hf
from models.llama.model import LlamaDecoder

__all__ = [
    "MODEL_TYPES",
    "LlamaConfig",
    "LlamaDecoder",
    "from_hf",
    "load",
    "tensors",
    "to_hf",
    "tokenizer",
    "weights",
]


def load(
    directory: Path,
    config: dict[str, Any],
    dtype: jax.typing.DTypeLike | None = None,
    device: Any = None,
) -> tuple[LlamaDecoder, Params]:
    """Decoder and weights of a checkpoint directory; see :func:`models.load`."""
    decoder = LlamaDecoder(from_hf(config, dtype=dtype))
    opened = tensors.from_safetensors(directory)
    return decoder, weights.load(opened, decoder.config, device)
