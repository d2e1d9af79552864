"""Attention over blocks of keys on TPU, as every kernel computes it in VMEM."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
MASKED = -1e30  # finite: its difference to itself is 0, not NaN


def empty(rows, lanes):
    """The running maximum, sum and weighted values of no key."""
    return (
        jnp.full((rows, 1), MASKED, jnp.float32),
        jnp.zeros((rows, 1), jnp.float32),
        jnp.zeros((rows, lanes), jnp.float32),
    )


def scaled_logits(q, k, sm_scale):
    """`(R, block)` of keys `(block, D)`."""
    return scaled(dot(q, k, 1), sm_scale)


def scaled(products, sm_scale, soft_cap=None):
    """Logits of the products of queries with keys."""
    logits = sm_scale * products
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def add_block(state, logits, v, visible):
    """The state with a block's keys too; `visible (R, block)` None means all."""
    return add_weighted(
        state, logits, visible, lambda weights: dot(weights.astype(v.dtype), v, 0)
    )


def add_weighted(state, logits, visible, weigh):
    """The same of values that `weigh` sums by weights `(R, block)` in float32."""
    m, l, acc = state
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    m_new = jnp.maximum(m, logits.max(1, keepdims=True))
    weights = jnp.exp(logits - m_new)
    if visible is not None:  # a row that has seen no key yet has m_new = MASKED
        weights = jnp.where(visible, weights, 0.0)
    decay = jnp.exp(m - m_new)
    l = l * decay + weights.sum(1, keepdims=True)
    return m_new, l, acc * decay + weigh(weights)


def finish(state):
    """`(out, lse)` of a state; 0 and -inf for a row that saw no key."""
    m, l, acc = state
    positive = jnp.where(l == 0, 1.0, l)
    return acc / positive, jnp.where(l == 0, -jnp.inf, m + jnp.log(positive))


def clear(values, valid):
    """Zeros from token `valid` on: what lies there may not be a number."""

    @pl.when(valid < values.shape[0])
    def _():
        token = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values[...] = jnp.where(token < valid, values[...], 0)


def dot(a, b, contracted):
    """A matmul over `contracted` of b, in float32; of float32, exactly."""
    return lax.dot_general(
        a,
        b,
        (((1,), (contracted,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def wide_dot(a, b, contracted):
    """`dot` of float32 with any dtype, exact in its products.

    With bfloat16 in one matmul: 8 bits of `a` at a time are three rows for one, where
    two float32 would be multiplied in six, and every one would load `b` again.
    """
    if b.dtype == jnp.float32:
        return dot(a, b, contracted)
    parts, rest = [], a
    for _ in range(2):
        # Cut, not rounded: a conversion there and back may be left out.
        bits = lax.bitcast_convert_type(rest, jnp.int32) & -(1 << 16)
        parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        rest = rest - parts[-1]
    rows = a.shape[0]
    stacked = jnp.concatenate([*parts, rest], axis=0).astype(b.dtype)
    products = dot(stacked, b, contracted)
    return products[:rows] + products[rows : 2 * rows] + products[2 * rows :]
