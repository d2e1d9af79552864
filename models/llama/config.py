"""What a Llama-family model is made of: static sizes, hashable."""

import dataclasses
from typing import Literal

import jax

from kvjax.rope import Rope


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a Llama or a near relative (Mistral, Qwen2, Qwen3).

    Attributes:
        vocab_size, width, num_layers, num_q_heads, num_kv_heads, head_dim, mlp_width:
            sizes; the axes V, E, L, Hq, Hkv, D, F.
        context: longest sequence the weights were made for, tokens.
        rope: positions, with their scaling.
        norm_epsilon: of every RMSNorm.
        qkv_bias, output_bias, mlp_bias: biases of the projections (Qwen2 has the first).
        qk_norm: RMSNorm on each query and key head before rotation (Qwen3).
        tied_embeddings: the output matrix is the input embedding.
        family: the `model_type` this configuration is written back as.
        dtype: of weights, activations and cache.
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
    family: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    dtype: jax.typing.DTypeLike = "float32"
