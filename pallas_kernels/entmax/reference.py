"""The definition of entmax, and its path on every device (XLA).

Where the time goes is passes over the scores, so the threshold is found by Newton's
method on the norm of the excess, from the left, where every step is safe.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.decode_attention import decode_logits

# Newton needs 4 to 8 passes. A convex function lets the product of value and slope
# fall by four a step, so that 40 are enough for whatever fits into memory.
MAX_STEPS = 40
# Scores that `entmax_attention` holds at once: 64 MB.
SCORES_AT_ONCE = 2**24


class Threshold(NamedTuple):
    """The threshold is `tau` for z = (alpha - 1) * (scores - top), in [-1, 0).

    Apart, because many nearly equal scores have a tau next to 0, and their sum needs
    all of its digits.
    """

    top: Float[Array, "*B 1"]  # the largest score, 0 where all are masked
    tau: Float[Array, "*B 1"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 3))
def entmax(scores, alpha, where, axis):
    """See :func:`pallas_kernels.entmax.entmax`."""
    return _entmax(scores, alpha, where, axis)[0]


def _entmax(scores, alpha, where, axis):
    wide = jnp.moveaxis(_masked(scores, where), axis, -1)
    p, slope = weights(wide, solve(wide, alpha), alpha)
    # Newton ends above the root by at most its tolerance: p sums to 1 + that. Dividing
    # makes the sum 1 to rounding, so that attention to equal values returns them.
    p = p / _positive(p.sum(-1, keepdims=True))
    return jnp.moveaxis(p, -1, axis).astype(scores.dtype), slope


@entmax.defjvp
def _entmax_jvp(alpha, axis, primals, tangents):
    scores, where = primals
    p, slope = _entmax(scores, alpha, where, axis)
    change = jnp.moveaxis(tangents[0].astype(slope.dtype), axis, -1)
    change = slope * (change - _mean(slope, change))
    return p, jnp.moveaxis(change, -1, axis).astype(scores.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def entmax_threshold(scores, alpha, where):
    """See :func:`pallas_kernels.entmax.entmax_threshold`."""
    wide = _masked(scores, where)
    top, tau = solve(wide, alpha)
    is_empty = (wide == -jnp.inf).all(-1)
    absolute = ((alpha - 1) * top + tau)[..., 0].astype(scores.dtype)
    return jnp.where(is_empty, jnp.inf, absolute)


@entmax_threshold.defjvp
def _entmax_threshold_jvp(alpha, primals, tangents):
    scores, where = primals
    wide = _masked(scores, where)
    slope = weights(wide, solve(wide, alpha), alpha)[1]
    mean = _mean(slope, tangents[0].astype(slope.dtype))[..., 0]
    change = ((alpha - 1) * mean).astype(scores.dtype)
    return entmax_threshold(scores, alpha, where), change


def _mean(slope, change):
    weighted = (slope * change).sum(-1, keepdims=True)
    return weighted / _positive(slope.sum(-1, keepdims=True))


def _masked(scores, where):
    is_double = scores.dtype == jnp.float64
    wide = scores.astype(jnp.float64 if is_double else jnp.float32)
    return wide if where is None else jnp.where(where, wide, -jnp.inf)


def _positive(total):
    return jnp.where(total == 0, 1.0, total)


def _shifted(scores, top, alpha):
    # Differences first: huge scores neither overflow nor lose what tells them apart.
    return jnp.where(scores == top, 0.0, (alpha - 1) * (scores - top))


def _powers(excess, alpha):
    """`(x ** beta, x ** (beta - 1))`, beta = 1 / (alpha - 1), 0 where the excess is."""
    if alpha == 1.5:
        return excess * excess, excess
    if alpha == 2.0:
        return excess, (excess > 0).astype(excess.dtype)
    exponent = 1 / (alpha - 1) - 1
    nearest = round(exponent)
    if nearest >= 1 and abs(exponent - nearest) < 1e-9:
        slope = lax.integer_pow(excess, nearest)
    else:
        is_inside = excess > 0
        log = jnp.log(jnp.where(is_inside, excess, 1.0))
        slope = jnp.where(is_inside, jnp.exp(exponent * log), 0.0)
    return slope * excess, slope


def weights(scores, threshold, alpha):
    """See :func:`pallas_kernels.entmax.weights`."""
    z = _shifted(scores, threshold.top, alpha)
    return _powers(jnp.maximum(z - threshold.tau, 0.0), alpha)


def solve(scores, alpha):
    """See :func:`pallas_kernels.entmax.solve`."""
    top = scores.max(-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    z = _shifted(scores, top, alpha)
    find = _newton if alpha <= 2 else _bisection
    return Threshold(top, find(z, alpha))


def _newton(z, alpha):
    """The root from below, for alpha <= 2.

    With x = max(z - tau, 0) and S = sum x ** beta, the norm S ** (1 / beta) is convex
    and falling in tau, as beta >= 1: steps towards norm 1 from the left, where the top
    alone has mass 1 (tau = -1), never pass the root. The norm is nearly straight, so
    that they arrive sooner than with S. On the left every weight is too large, by S - 1
    in all, which is therefore the exact error that a row stops at.
    """
    tolerance = 16 * float(jnp.finfo(z.dtype).eps)

    def is_due(carry):
        step, _, is_active = carry
        return (step < MAX_STEPS) & is_active.any()

    def advance(carry):
        step, tau, is_active = carry
        p, slope = _powers(jnp.maximum(z - tau, 0.0), alpha)
        total, slope = p.sum(-1, keepdims=True), slope.sum(-1, keepdims=True)
        move = (total - total ** (2 - alpha)) / _positive(slope)
        # A row that has arrived stays: its result must not depend on other rows. Nor
        # does a row go back that rounding took past the root: steps are unsafe there.
        tau = jnp.where(is_active & (total > 1), tau + move, tau)
        return step + 1, tau, is_active & (total - 1 > tolerance)

    tau = jnp.full((*z.shape[:-1], 1), -1.0, z.dtype)
    is_active = jnp.ones_like(tau, bool)
    return lax.while_loop(is_due, advance, (jnp.int32(0), tau, is_active))[1]


def _bisection(z, alpha):
    """The root for alpha > 2, where the slope is infinite at every score."""
    steps = jnp.finfo(z.dtype).nmant + 7

    def halve(_, bracket):
        low, width = bracket
        width = width / 2
        p, _ = _powers(jnp.maximum(z - (low + width), 0.0), alpha)
        is_below = p.sum(-1, keepdims=True) >= 1
        return jnp.where(is_below, low + width, low), width

    # At -1 the top alone has mass 1; at the other end, that many equals would.
    low = jnp.full((*z.shape[:-1], 1), -1.0, z.dtype)
    width = jnp.full_like(low, 1 - z.shape[-1] ** (1 - alpha))
    return lax.fori_loop(0, steps, halve, (low, width))[0]


def entmax_attention(q, k, v, query_positions, key_positions, alpha, sm_scale):
    """See :func:`pallas_kernels.entmax.entmax_attention`.

    The threshold needs all scores of a query at once, so that blocks are of queries.
    """
    batch, num_q_heads, rows, head_dim = q.shape

    def attend(part):
        q, positions = part
        scores = decode_logits(q, k, positions, key_positions, sm_scale=sm_scale)
        threshold = solve(scores, alpha)
        p, _ = weights(scores, threshold, alpha)
        return _combine(p, v), _value(scores, p, threshold, alpha)

    fits = max(SCORES_AT_ONCE // (batch * num_q_heads * k.shape[2]), 1)
    if rows <= fits:
        return attend((q, query_positions))
    padding = -rows % fits
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    queries = queries.reshape(batch, num_q_heads, -1, fits, head_dim)
    positions = jnp.pad(query_positions, ((0, 0), (0, padding)), constant_values=-1)
    positions = positions.reshape(batch, -1, fits)
    parts = (jnp.moveaxis(queries, 2, 0), jnp.moveaxis(positions, 1, 0))
    out, value = (jnp.moveaxis(x, 0, 2) for x in lax.map(attend, parts))
    out = out.reshape(batch, num_q_heads, -1, head_dim)
    return out[:, :, :rows], value.reshape(batch, num_q_heads, -1)[:, :, :rows]


def _combine(p, v):
    batch, num_q_heads, rows, slots = p.shape
    out = jnp.einsum(
        "bkrs,bksd->bkrd",
        p.reshape(batch, v.shape[1], -1, slots).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    total = _positive(p.sum(-1, keepdims=True))
    return out.reshape(batch, num_q_heads, rows, -1) / total


def _value(scores, p, threshold, alpha):
    # p ** alpha = p * x, and p . z = p . x + tau where p sums to 1.
    top, tau = (part[..., 0] for part in threshold)
    excess = jnp.maximum(_shifted(scores, threshold.top, alpha) - threshold.tau, 0.0)
    moment = (p * excess).sum(-1)
    value = top + (tau + moment + (1 - moment) / alpha) / (alpha - 1)
    return jnp.where(p.sum(-1) == 0, -jnp.inf, value)
