"""All that a method may know of a model: one layer's sizes."""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import Array

from kvjax.copies import Copies


@dataclasses.dataclass(frozen=True)
class Share:
    """The share of a layer that one device of a mesh has.

    Attributes:
        axis: the mesh's axis over which the heads lie; what a method does over all of
            them goes over it (:mod:`kvjax.attention.heads`).
        heads: parts that the heads are in.
        rows: parts that the rows are in.
    """

    axis: str
    heads: int = 1
    rows: int = 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """All a method may know of a model: static, hashable, one layer.

    A pytree without leaves: a state may carry its spec, and every leaf of the state is
    still an array.

    Attributes:
        batch: rows.
        num_q_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads.
        head_dim: elements per head.
        capacity: most tokens a row ever holds, prompt and generated.
        dtype: of the cached keys and values.
        rope: `rope(x, positions, length)` rotates un-rotated queries or keys; see
            :class:`kvjax.rope.Rope`.
        max_new_tokens: most tokens appended after the prompt. Methods that shrink
            the prompt's cache but keep every generated token size their buffers by it.
        sm_scale: factor on the logits; ``head_dim ** -0.5`` unless given, or if nan.
        layer: index of the layer, for transforms that treat layers differently.
        num_layers: of the model, for transforms that share budgets out; 0 if unsaid.
        alpha: of the model's attention: 1 is softmax, above 1 alpha-entmax.
        storage: a `pallas_kernels.shared.quantized.Storage` of keys and values, or None
            for numbers of `dtype`.
        copies: of every token, that the model feeds beside it; None feeds none.
        share: None for a whole layer. Of a device's, `batch` and heads are its own.
    """

    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    dtype: jax.typing.DTypeLike
    rope: Callable[..., Array]
    max_new_tokens: int = 0
    sm_scale: float = math.nan
    layer: int = 0
    num_layers: int = 0
    alpha: float = 1.0
    storage: Hashable | None = None
    copies: Copies | None = None
    share: Share | None = None

    def __post_init__(self):
        for name in ("batch", "num_q_heads", "num_kv_heads", "head_dim", "capacity"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"CacheSpec.{name}={value} must be at least 1.")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if not 0 <= self.max_new_tokens <= self.capacity:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} must be in "
                f"[0, capacity={self.capacity}]."
            )
        if not (self.alpha >= 1 and math.isfinite(self.alpha)):
            raise ValueError(
                f"alpha={self.alpha} must be at least 1 (softmax) and finite."
            )
        if self.sm_scale is None or math.isnan(self.sm_scale):
            object.__setattr__(self, "sm_scale", self.head_dim**-0.5)

    @property
    def group(self) -> int:
        """The number of query heads per KV head, G."""
        return self.num_q_heads // self.num_kv_heads


def with_layer(state: Any, layer: int) -> Any:
    """Returns the state with every spec in it of that layer.

    States of layers that differ in the number alone can then share a program.
    """
    return with_specs(state, lambda spec: dataclasses.replace(spec, layer=layer))


def with_specs(state: Any, change: Callable[[CacheSpec], CacheSpec]) -> Any:
    """Returns the state with every spec in it changed."""

    def changed(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, CacheSpec) else leaf

    return jax.tree.map(changed, state, is_leaf=lambda x: isinstance(x, CacheSpec))
