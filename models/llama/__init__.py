"""Llama and the families that are run as one: see `MODEL_TYPES`."""

from pathlib import Path
from typing import Any

import jax

from kvjax.interface import Params
from models.llama import families, tensors, tokenizer, weights
from models.llama.config import MODEL_TYPES, LlamaConfig, from_hf, notes, to_hf
from models.llama.model import LlamaDecoder

__all__ = [
    "MODEL_TYPES",
    "LlamaConfig",
    "LlamaDecoder",
    "from_hf",
    "load",
    "notes",
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
    opened = families.fold(tensors.from_safetensors(directory), config)
    return decoder, weights.load(opened, decoder.config, device)
