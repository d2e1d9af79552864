"""Softmax attention over disjoint sets of keys: partial results and how they merge."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.interface import CacheSpec, Method, State
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shared.quantized import Rows


class Partial(NamedTuple):
    """Attention over one set of keys; `(0, -inf)` is the empty set."""

    out: Float[Array, "*B D"]  # normalised within the set, float32
    lse: Float[Array, "*B"]  # log of the sum of exponentials of the set's logits


def merge(*partials: Partial) -> Partial:
    """Merges attention over disjoint sets. Associative and commutative."""
    return functools.reduce(_merge_two, partials)


def _merge_two(a: Partial, b: Partial) -> Partial:
    lse = jnp.logaddexp(a.lse, b.lse)
    # Both empty: lse is -inf and the differences would be NaN.
    safe = jnp.where(lse == -jnp.inf, 0.0, lse)
    weight_a, weight_b = jnp.exp(a.lse - safe), jnp.exp(b.lse - safe)
    return Partial(weight_a[..., None] * a.out + weight_b[..., None] * b.out, lse)


Factory = Callable[..., Method]
Attention = Literal["softmax", "entmax"]


def softmax_only(factory: Factory) -> Factory:
    """Decorates the factory of a method that computes or estimates softmax weights.

    Entmax needs its threshold over all keys at once, and gives weights of exactly 0:
    parts of it do not merge, and scores made for softmax do not rank it.

    Returns:
        The factory, whose methods raise `ValueError` in `init` for another attention.
    """

    def check(spec: CacheSpec) -> None:
        if spec.alpha != 1:
            raise ValueError(
                f"method {factory.__name__} approximates softmax attention, but "
                f"the model's attention is entmax with alpha={spec.alpha}; "
                "use entmaxkv, or full."
            )

    return _checked(factory, check, "softmax")


def entmax_only(factory: Factory) -> Factory:
    """Decorates the factory of a method that needs the exact zeros of entmax.

    Returns:
        The factory, whose methods raise `ValueError` in `init` for softmax attention.
    """

    def check(spec: CacheSpec) -> None:
        if spec.alpha == 1:
            raise ValueError(
                f"method {factory.__name__} approximates entmax attention, but the "
                f"model's attention is softmax (alpha={spec.alpha}); use quest, or "
                "an entmax model."
            )

    return _checked(factory, check, "entmax")


def _checked(
    factory: Factory, check: Callable[[CacheSpec], None], attention: Attention
) -> Factory:
    """Returns the factory with methods whose `init` checks the spec first."""

    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> Method:
        method = factory(*args, **options)

        def init(spec: CacheSpec, weights: Any = None) -> State:
            check(spec)
            return method.init(spec, weights)

        return method._replace(init=init)

    mark_attention(make, attention)
    return make


def mark_attention(factory: Factory, attention: Attention) -> None:
    """Notes which attention a factory's methods are made for; see :func:`suits`."""
    vars(factory)["attention"] = attention


def suits(factory: Factory, alpha: float) -> bool:
    """Says whether the factory's methods take a model of that alpha (1 is softmax)."""
    made_for = getattr(factory, "attention", None)
    return made_for in (None, "softmax" if alpha == 1 else "entmax")


def weighted_attention(
    q: Float[Array, "B Hq T D"],
    k: Float[Rows, "B Hkv N D"],
    v: Float[Rows, "B Hkv N D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B H N"],
    *,
    sm_scale: float,
) -> tuple[Partial, Float[Array, "B Hq T N"]]:
    """Computes attention and the softmax weights behind it in one read of the keys.

    For methods that score tokens by the attention they receive. Every row must see a
    key; arguments as in :func:`pallas_kernels.decode_attention.decode_attention`.
    """
    out, lse, logits = decode_attention(
        q, k, v, query_positions, key_positions, sm_scale=sm_scale, with_logits=True
    )
    return Partial(out, lse), jnp.exp(logits - lse[..., None])
