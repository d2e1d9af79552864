"""Tiny random models with a byte tokenizer, for tests that need the whole decode loop.

Weights are scaled up so that a greedy choice is decisive and depends on the context.
"""

import jax

from kvjax.interface import LanguageModel
from kvjax.rope import Rope
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder

EOS = 256  # one past the bytes


class ByteTokenizer:
    """UTF-8 bytes as tokens; ids above 255 are special and have no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def tiny_config(**overrides) -> LlamaConfig:
    """Two layers, width 32, two KV heads of two query heads, bytes plus four."""
    head_dim = overrides.pop("head_dim", 8)
    sizes = {
        "vocab_size": 260,
        "width": 32,
        "num_layers": 2,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": head_dim,
        "mlp_width": 48,
        "context": 4096,
        "rope": Rope(head_dim),
    }
    return LlamaConfig(**(sizes | overrides))


def tiny_model(*, seed: int = 0, scale: float = 12.0, **overrides) -> LanguageModel:
    """A random Llama; `overrides` are fields of its configuration.

    `scale` multiplies every matrix (deviation 0.02 becomes 0.24): norms stay 1.
    """
    decoder = LlamaDecoder(tiny_config(**overrides))
    params = jax.tree.map(
        lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, decoder.init(seed)
    )
    return LanguageModel(decoder, params, ByteTokenizer(), (EOS,), "tiny")
