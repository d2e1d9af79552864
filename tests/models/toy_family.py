"""A second model family in one file: attention over an embedding, and nothing else.

Every other layer is without positions; weights and tokenizer are files of its own.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from tiny import ByteTokenizer

from kvjax import files
from kvjax.interface import CacheSpec
from kvjax.rope import Rope
from models.family import Family, Footprint


@dataclasses.dataclass(frozen=True)
class ToyDecoder:
    vocab_size: int = 256
    width: int = 24
    num_layers: int = 2
    head_dim: int = 4
    context: int = 256
    alpha: float = 1.0

    @property
    def rope(self):
        return Rope(self.head_dim, theta=50.0)

    def cache_spec(self, batch, capacity, max_new_tokens=0, layer=0):
        return CacheSpec(
            batch=batch,
            num_q_heads=self.width // self.head_dim,
            num_kv_heads=self.width // self.head_dim,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype="float32",
            rope=Rope(self.head_dim, kind="none") if layer % 2 else self.rope,
            max_new_tokens=max_new_tokens,
            layer=layer,
        )

    def init(self, seed=0):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape) * 0.4, jnp.float32)

        names = [f"{layer}.{part}" for layer in range(self.num_layers) for part in PART]
        matrices = {name: normal(self.width, self.width) for name in names}
        return {"embedding": normal(self.vocab_size, self.width), **matrices}

    def run(self, params, tokens, attend):
        """Hidden states under any `attend(layer, q, k, v)`, head-major."""
        heads = (*tokens.shape, -1, self.head_dim)
        x = params["embedding"][tokens]
        for layer in range(self.num_layers):
            q, k, v = (
                (x @ params[f"{layer}.{part}"]).reshape(heads).swapaxes(1, 2)
                for part in "qkv"
            )
            out = attend(layer, q, k, v).swapaxes(1, 2).reshape(x.shape)
            x = x + out @ params[f"{layer}.o"]
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def prefill(self, params, states, tokens, lengths, method):
        states = list(states)

        def attend(layer, q, k, v):
            states[layer], out = method.prefill(states[layer], q, k, v, lengths)
            return out

        hidden = self.run(params, tokens, attend)
        return tuple(states), hidden

    def decode_step(self, params, states, tokens, method):
        states = list(states)

        def attend(layer, q, k, v):
            appended = method.append(states[layer], k, v)
            states[layer], out = method.decode_step(appended, q)
            return out

        hidden = self.run(params, tokens, attend)
        return tuple(states), hidden

    def logits(self, params, hidden):
        return hidden @ params["embedding"].T


PART = "qkvo"
SIZES = ("vocab_size", "width", "num_layers", "head_dim", "context")


def load_decoder(config, dtype=None):
    if dtype not in (None, "float32"):
        raise ValueError(f"{dtype=} must be float32.")
    return ToyDecoder(**{name: config[name] for name in SIZES})


def load(directory, config, dtype=None, device=None, weights=None):
    if weights is not None:
        raise ValueError(f"{weights=}: a toy has floats.")
    with np.load(directory / "weights.npz") as arrays:
        params = {name: jnp.asarray(arrays[name]) for name in arrays.files}
    return load_decoder(config, dtype), jax.device_put(params, device)


def save(params, decoder, directory, max_shard_bytes):
    del max_shard_bytes  # these are small
    files.save_npz(directory / "weights.npz", params)
    return {"model_type": "toy"} | {name: getattr(decoder, name) for name in SIZES}


class Shifted(ByteTokenizer):
    """Bytes, each so many further on."""

    def __init__(self, shift):
        self.shift = shift

    def encode(self, text):
        return [(byte + self.shift) % 256 for byte in text.encode()]

    def decode(self, tokens):
        data = bytes((token - self.shift) % 256 for token in tokens)
        return data.decode(errors="replace")


def load_tokenizer(directory):
    return Shifted(json.loads(files.read_text(directory / "toy.json"))["shift"])


def save_tokenizer(tokenizer, directory):
    files.write_text(directory / "toy.json", json.dumps({"shift": tokenizer.shift}))


@functools.cache
def footprint(decoder, weights=None):
    del weights
    shapes = jax.eval_shape(decoder.init)
    held = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    return Footprint(held, held, decoder.width)


FAMILY = Family(
    model_types=("toy",),
    decoder=ToyDecoder,
    load_decoder=load_decoder,
    load=load,
    save=save,
    load_tokenizer=load_tokenizer,
    save_tokenizer=save_tokenizer,
    footprint=footprint,
    notes=lambda decoder, params: (f"a toy of {decoder.num_layers} layers.",),
)
