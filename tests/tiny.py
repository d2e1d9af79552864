"""Tiny random models with a byte tokenizer, for tests that need the whole decode loop.

Weights are scaled up so that a greedy choice is decisive and depends on the context.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from kvjax import files
from kvjax.interface import LanguageModel
from kvjax.rope import Rope
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder
from models.llama.tokenizer import HFTokenizer

EOS = 256  # one past the bytes
# Options of any method, of a budget below the prompts of these tests.
SMALL = dict(budget=16, page_size=4, num_sinks=2, window=4, recent=1, kernel=3)
SMALL |= dict(tail=2, calibration=8, chunk=32)

TEXT = "".join(
    f"line {i * 7919 % 1000} is about {'abcdefgh'[i % 8]}.\n" for i in range(90)
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


class ByteTokenizer:
    """UTF-8 bytes as tokens; ids above 255 are special and have no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class PairTokenizer(ByteTokenizer):
    """Two bytes a token, so that an answer may begin in the middle of one."""

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        pairs = [data[i : i + 2] for i in range(0, len(data), 2)]
        return [p[0] if len(p) == 1 else 256 + 256 * p[0] + p[1] for p in pairs]

    def decode(self, tokens: list[int]) -> str:
        pairs = [divmod(t - 256, 256) if t >= 256 else (t,) for t in tokens]
        return b"".join(map(bytes, pairs)).decode(errors="replace")


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


def keep_layers(folder: pathlib.Path, count: int) -> None:
    """Leaves a model's first layers on disk: so much less to compile."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] > count
    text = json.dumps(config | {"num_hidden_layers": count})
    (folder / "config.json").write_text(text, "utf-8")
    file = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    for name in list(weights):
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= count:
            del weights[name]
    files.save_tensors(file, weights, {"format": "pt"})


def tiny_model(*, seed: int = 0, deviation: float = 0.24, **overrides) -> LanguageModel:
    """A random Llama; `overrides` are fields of its configuration.

    Every matrix is scaled to `deviation`; norms stay 1.
    """
    decoder = LlamaDecoder(tiny_config(**overrides))
    params = jax.tree.map(
        lambda leaf: leaf * (deviation / leaf.std()) if leaf.ndim > 1 else leaf,
        decoder.init(seed),
    )
    return LanguageModel(decoder, params, ByteTokenizer(), (EOS,), "tiny")


@jax.jit
def rotated(x):
    """Heads `(B, H, T, D)` turned at their places in a text, by a rope as it comes."""
    positions = jnp.arange(x.shape[2], dtype=jnp.int32)[None]
    return Rope(x.shape[3])(x, positions)


def dense(layer, q, k, v):
    """Causal attention in float64, sharing no code with the library's but the rope."""
    del layer
    q, k = (np.asarray(rotated(x), np.float64) for x in (q, k))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, np.asarray(v)))
    logits = np.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(q.shape[3])
    logits = np.where(np.tril(np.ones(logits.shape[2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bhsd->bhtd", weights, v)
    return jax.device_put(out.astype(np.float32))


ROOM = 152  # tokens


def whole(model: LanguageModel, tokens, attention=dense) -> np.ndarray:
    """Hidden states `(ROOM, E)` of a text in one forward pass; its own come first.

    What stands behind it changes none of them, and each operation is compiled once
    whatever the length.
    """
    padded = np.zeros((1, ROOM), np.int32)
    padded[0, : len(tokens)] = tokens
    tokens = jax.device_put(padded)
    return np.asarray(model.decoder.hidden(model.params, tokens, attention))[0]


def byte_tokenizer() -> HFTokenizer:
    """Bytes as tokens in Hugging Face's format, for models that are saved."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    return HFTokenizer(backend, {}, {"default": TEMPLATE})
