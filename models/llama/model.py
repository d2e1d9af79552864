"""The Llama family as a pure function of its parameters, over any KV method.

    b t   row, token             h k   query head, KV head
    e     model width            d     head dim
    f     MLP width              v     vocabulary

Flax NNX modules define the parameters; they are split once, and everything below runs
on plain nested dicts of arrays under `jax.jit`. Prefill, decode and training are one
pass over the layers that differ only in the attention they are given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax import copies, parallel
from kvjax.interface import CacheSpec, Copies, Method, Params, State
from kvjax.rope import Rope
from models.llama import low_rank, packed, split
from models.llama.config import LlamaConfig, described
from models.llama.low_rank import Beside
from models.llama.packed import Packed

# attention(layer, q, k, v) -> out, all head-major, q and k not yet rotated
Attention = Callable[[int, Array, Array, Array], Array]


class RMSNorm(nnx.Module):
    """Divides by the root mean square, in float32."""

    def __init__(self, size: int, config: LlamaConfig):
        self.weight = nnx.Param(jnp.ones((size,), config.dtype))
        self.epsilon = config.norm_epsilon

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.epsilon)
        return self.weight[...] * (wide * scale).astype(x.dtype)


class Linear(nnx.Module):
    """A matrix product over the last axis of x, and a bias if there is one.

    Kernels are plain matrices (in, out), heads folded in, products accumulate in
    float32. With the heads apart, XLA copies a kernel into matrix form at every decode
    step, on CPU and on TPU alike. Rows are folded too: the gradient of the kernel is
    then one matrix product, which XLA's CPU backend runs twice as fast as one with two
    axes to sum over.

    Random kernels keep the variance of their input, times `gain` in deviation.
    """

    def __init__(self, inputs, outputs, bias, config, rngs, gain=1.0):
        shape, deviation = (inputs, outputs), gain * inputs**-0.5
        normal = jax.random.normal(rngs.params(), shape, jnp.float32) * deviation
        self.kernel = nnx.Param(normal.astype(config.dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), config.dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        out = _times(x, self.kernel.get_value())
        return out if self.bias is None else out + self.bias[...]


def _times(
    x: Float[Array, "*B I"], matrix: Float[Array, "I O"] | Packed | Beside
) -> Array:
    # Two-dimensional, accumulated in float32, returned in x's dtype.
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(matrix, Packed):
        out = packed.times(rows, matrix)
    elif isinstance(matrix, Beside):
        out = low_rank.times(rows, matrix)
    else:
        out = jnp.matmul(rows, matrix, preferred_element_type=jnp.float32)
    return out.astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[1])


def _residual_gain(config: LlamaConfig) -> float:
    # Every layer adds two branches to the residual: their variances sum to about one.
    return (2 * config.num_layers) ** -0.5


class SelfAttention(nnx.Module):
    """Projections around an attention that is given from outside."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, head_dim = config.width, config.head_dim

        def project(heads):
            return Linear(width, heads * head_dim, config.qkv_bias, config, rngs)

        self.q = project(config.num_q_heads)
        self.k = project(config.num_kv_heads)
        self.v = project(config.num_kv_heads)
        inputs = config.num_q_heads * head_dim
        gain = _residual_gain(config)
        self.o = Linear(inputs, width, config.output_bias, config, rngs, gain)
        self.q_norm = RMSNorm(head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config) if config.qk_norm else None
        self.head_dim = head_dim

    def __call__(self, x, attend):
        batch, rows, _ = x.shape

        def heads(flat):  # bt(hd) -> bhtd: no work in decode, where t = 1
            return flat.reshape(batch, rows, -1, self.head_dim).swapaxes(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(q, k, v)
        return self.o(out.swapaxes(1, 2).reshape(batch, rows, -1))


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        def linear(inputs, outputs, gain=1.0):
            return Linear(inputs, outputs, config.mlp_bias, config, rngs, gain)

        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width, _residual_gain(config))

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, attend):
        x = x + self.attention(self.attention_norm(x), attend)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """The parameters of the whole model."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.width)
        normal = jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02
        self.embedding = nnx.Param(normal.astype(config.dtype))
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config)
        self.output = (
            None
            if config.tied_embeddings
            else Linear(config.width, config.vocab_size, False, config, rngs)
        )

    def hidden(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        attention: Attention,
        remat: bool = False,
        mesh: Any = None,
    ) -> Float[Array, "B T E"]:
        # Layers are unrolled: a cache carried through a scan over layers is copied.
        x = split.rows(mesh, self.embedding[...][tokens])
        for index, layer in enumerate(self.layers):
            run = functools.partial(layer, attend=functools.partial(attention, index))
            with jax.named_scope(f"layer{index}"):
                x = jax.checkpoint(run)(x) if remat else run(x)
                x = split.rows(mesh, x)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        if self.output is not None:
            return self.output(hidden).astype(jnp.float32)
        return _times(hidden, self.embedding[...].T).astype(jnp.float32)


@functools.cache
def _graph(config: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))


@functools.cache
def _layer_graph(config: LlamaConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))))[0]


@functools.cache
def _norm_graph(config: LlamaConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: RMSNorm(config.width, config)))[0]


@dataclasses.dataclass(frozen=True)
class LlamaDecoder:
    """A :class:`kvjax.interface.DecoderLM`: pure functions of `params`, hashable."""

    config: LlamaConfig
    mesh: Any = None  # `kvjax.parallel.AnyMesh` of the parameters; None: one device

    def __repr__(self) -> str:
        """Saved prompts know it by this text; they are of one device."""
        over = "" if self.mesh is None else f", mesh={self.mesh!r}"
        return f"LlamaDecoder(config={described(self.config)}{over})"

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def context(self) -> int:
        return self.config.context

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def rope(self) -> Rope:
        rotated = set(range(self.num_layers)) - set(self.config.unrotated_layers)
        return self._rope_of(min(rotated, default=0))

    @property
    def alpha(self) -> float:
        return self.config.attention_alpha

    @property
    def copies(self) -> Copies | None:
        """The copies that it feeds beside every token; None if it feeds none."""
        return self.config.repeated

    def init(self, seed: int = 0) -> Params:
        """Makes random parameters, ready to train, as a nested dict of arrays.

        Normal with deviation 0.02 for the embedding and inputs**-0.5 for the matrices;
        those that write to the residual, (2 * num_layers)**-0.5 times that.
        """
        return nnx.to_pure_dict(nnx.split(Llama(self.config, nnx.Rngs(seed)))[1])

    def param_shapes(self) -> Params:
        """`jax.ShapeDtypeStruct` of every parameter, in the structure of `init`."""
        return nnx.to_pure_dict(_graph(self.config)[1])

    def cache_spec(
        self, batch: int, capacity: int, max_new_tokens: int = 0, layer: int = 0
    ) -> CacheSpec:
        """Returns all that a method may know of one layer of this model."""
        return CacheSpec(
            batch=batch,
            num_q_heads=self.config.num_q_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            capacity=capacity,
            dtype=self.config.dtype,
            rope=self._rope_of(layer),
            max_new_tokens=max_new_tokens,
            layer=layer,
            alpha=self.alpha,
            copies=self.copies,
        )

    def _rope_of(self, layer: int) -> Rope:
        rope = self.config.rope
        if layer in self.config.unrotated_layers:
            return Rope(rope.head_dim, kind="none")
        return rope

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention: Attention,
        *,
        remat: bool = False,
    ) -> Float[Array, "B T E"]:
        """Returns final hidden states under any `attention(layer, q, k, v) -> out`.

        With `remat` a gradient keeps one hidden state a layer and computes the rest of
        the layer again: less memory, about a third more work. Of a model that feeds
        copies the attention is of all their rows, and hidden states are the last one's.
        """
        rows = copies.tiled(self.copies, tokens)
        hidden = self._module(params).hidden(rows, attention, remat, self.mesh)
        return copies.last(self.copies, hidden)

    def prefill(
        self,
        params: Params,
        states: tuple[State, ...],
        tokens: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        method: Method,
    ) -> tuple[tuple[State, ...], Float[Array, "B T E"]]:
        """Runs a right-padded chunk of the prompt; rows have `lengths` tokens in it.

        Of a model that feeds copies, a row's newest token has the last one's state.
        """
        after, handed = list(states), None

        def attention(layer, q, k, v):
            nonlocal handed
            after[layer], out, handed = method.prefill_layer(
                after[layer], q, k, v, lengths, handed
            )
            return out

        rows = copies.called(self.copies, tokens, lengths)
        hidden = self._module(params).hidden(rows, attention, False, self.mesh)
        return tuple(after), copies.of_tokens(self.copies, hidden, lengths)

    def decode_step(
        self,
        params: Params,
        states: tuple[State, ...],
        tokens: Int[Array, "B T"],
        method: Method,
    ) -> tuple[tuple[State, ...], Float[Array, "B T E"]]:
        """Appends `tokens` and attends: one step of the decode loop.

        Raises:
            ValueError: if the model feeds copies of a token, and there are several.
        """
        after = list(states)

        def attention(layer, q, k, v):
            appended = method.append(after[layer], k, v)
            after[layer], out = method.decode_step(appended, q)
            return out

        if self.copies is not None and tokens.shape[1] > 1:
            raise ValueError(
                f"tokens of shape {tokens.shape} must be (B, 1): the model feeds "
                f"{self.copies.count} copies of a token, one token a step."
            )
        # Attention first: `after` is of its making.
        hidden = self.hidden(params, tokens, attention)
        return tuple(after), hidden

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Returns what goes into the first layer."""
        return split.rows(self.mesh, params["embedding"][tokens])

    def layer_params(self, params: Params) -> tuple[Params, ...]:
        """Returns the parameters of each layer, in their order."""
        return tuple(params["layers"][layer] for layer in range(self.num_layers))

    def run_layer(
        self,
        layer_params: Params,
        x: Float[Array, "B T E"],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B T E"]:
        """Runs one layer under any `attend(q, k, v) -> out`."""
        x = nnx.merge(_layer_graph(self.config), layer_params)(x, attend)
        return split.rows(self.mesh, x)

    def normalise(
        self, params: Params, x: Float[Array, "*B E"]
    ) -> Float[Array, "*B E"]:
        """Returns the final hidden states of what the last layer gives."""
        x = nnx.merge(_norm_graph(self.config), params["norm"])(x)
        return split.rows(self.mesh, x)

    def logits(
        self, params: Params, hidden: Float[Array, "*B E"]
    ) -> Float[Array, "*B V"]:
        """Returns next-token logits in float32."""
        return split.logits(self.mesh, self._module(params).logits(hidden))

    def exchanges(self, batch: int) -> tuple[parallel.Exchange, ...]:
        """Returns what devices tell each other in a step, attention not counted."""
        return (
            () if self.mesh is None else split.exchanges(self.mesh, self.config, batch)
        )

    def _module(self, params: Params) -> Llama:
        return nnx.merge(_graph(self.config)[0], params)
