"""A model of attention and a sum a layer: what an oracle can have whole, in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kvjax.interface import CacheSpec
from kvjax.rope import Rope


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Read layer by layer; four query heads of six numbers, two of keys."""

    num_layers: int = 3
    width: int = 10
    vocab_size: int = 40
    context: int = 4096
    alpha: float = 1.0

    @property
    def rope(self):
        return Rope(6)

    def cache_spec(self, batch, capacity, max_new_tokens=0, layer=0):
        sizes = (batch, 4, 2, 6, capacity, "float32", self.rope)
        return CacheSpec(*sizes, max_new_tokens=max_new_tokens, layer=layer)

    def embed(self, params, tokens):
        return params["embedding"][tokens]

    def layer_params(self, params):
        return params["layers"]

    def run_layer(self, layer, x, attend):
        q, k, v = (jnp.einsum("bte,ehd->bhtd", x, layer[name]) for name in "qkv")
        return x + jnp.einsum("bhtd,hde->bte", attend(q, k, v), layer["o"])

    def normalise(self, params, x):
        del params
        return x

    def logits(self, params, hidden):
        return hidden @ params["embedding"].T

    def decode_step(self, params, states, tokens, method):
        states, x = list(states), self.embed(params, tokens)
        for index, layer in enumerate(params["layers"]):

            def attend(q, k, v, index=index):
                appended = method.append(states[index], k, v)
                states[index], out = method.decode_step(appended, q)
                return out

            x = self.run_layer(layer, x, attend)
        return tuple(states), x

    def prefill(self, params, states, tokens, lengths, method):
        raise NotImplementedError("read layer by layer.")


class NoText:
    def encode(self, text):
        return [len(text)]

    def decode(self, tokens):
        return "x" * len(tokens)


def draw_weights(decoder, seed=0):
    rng = np.random.default_rng(seed)

    def one(*shape, scale):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def layer():
        heads = {"q": 4, "k": 2, "v": 2}
        drawn = {
            name: one(decoder.width, count, 6, scale=0.6 if name == "q" else 0.4)
            for name, count in heads.items()
        }
        return drawn | {"o": one(4, 6, decoder.width, scale=0.15)}

    layers = tuple(layer() for _ in range(decoder.num_layers))
    embedding = one(decoder.vocab_size, decoder.width, scale=1.0)
    return {"embedding": embedding, "layers": layers}
