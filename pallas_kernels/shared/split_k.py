"""Softmax attention over parts of the keys, merged: what split-K kernels end in."""

import jax
import jax.numpy as jnp


def joined(
    out: jax.Array, lse: jax.Array, other: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, jax.Array]:
    """With what `other` saw, if there is any: a part of other keys, of equal shape."""
    if other is None:
        return out, lse
    parts = (jnp.stack(pair) for pair in zip((out, lse), other, strict=True))
    return merge(*parts, axis=0)


def merge(out: jax.Array, lse: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """`(..., D)` and `(...)` of disjoint parts along `axis`, as of their union.

    A part that sees no key has lse -inf and counts nothing; its out must be finite.
    """
    top = lse.max(axis, keepdims=True)
    # No key in any part: -inf - -inf would be NaN.
    shares = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = shares.sum(axis)
    positive = jnp.where(total == 0, 1.0, total)
    merged = (shares[..., None] * out).sum(axis) / positive[..., None]
    log = jnp.squeeze(top, axis) + jnp.log(positive)
    return merged, jnp.where(total == 0, -jnp.inf, log)
