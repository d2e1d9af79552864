"""Softmax attention over disjoint sets of keys: partial results and how they merge."""

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over one set of keys; `(0, -inf)` is the empty set."""

    out: Float[Array, "*B D"]  # normalised within the set, float32
    lse: Float[Array, "*B"]  # log of the sum of exponentials of the set's logits


def merge(*partials: Partial) -> Partial:
    """Attention over the union of disjoint sets. Associative and commutative."""
    return reduce(_merge_two, partials)


def _merge_two(a: Partial, b: Partial) -> Partial:
    lse = jnp.logaddexp(a.lse, b.lse)
    # Both empty: lse is -inf and the differences would be NaN.
    safe = jnp.where(lse == -jnp.inf, 0.0, lse)
    weight_a, weight_b = jnp.exp(a.lse - safe), jnp.exp(b.lse - safe)
    return Partial(weight_a[..., None] * a.out + weight_b[..., None] * b.out, lse)
