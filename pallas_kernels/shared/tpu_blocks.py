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


def scaled_logits(q, k, sm_scale, soft_cap=None):
    """`(R, block)` of keys `(block, D)`."""
    logits = sm_scale * dot(q, k, 1)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def add_block(state, logits, v, visible):
    """The state with a block's keys too; `visible (R, block)` None means all."""
    m, l, acc = state
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    m_new = jnp.maximum(m, logits.max(1, keepdims=True))
    weights = jnp.exp(logits - m_new)
    if visible is not None:  # a row that has seen no key yet has m_new = MASKED
        weights = jnp.where(visible, weights, 0.0)
    decay = jnp.exp(m - m_new)
    l = l * decay + weights.sum(1, keepdims=True)
    return m_new, l, acc * decay + dot(weights.astype(v.dtype), v, 0)


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
