"""The definition of entmax, and its path on every device (XLA)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.reference import decode_logits, weighted_values
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.entmax import equations
from pallas_kernels.entmax.equations import Threshold, positive
from pallas_kernels.shared.quantized import turned

KERNELS: dict[Implementation, str] = {
    "mosaic_tpu": "pallas_kernels.entmax.mosaic_tpu",
    "mosaic_gpu": "pallas_kernels.entmax.mosaic_gpu",
    "triton": "pallas_kernels.entmax.triton",
}

# Scores that `entmax_attention` holds at once: 64 MB.
SCORES_AT_ONCE = 2**24


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 3))
def entmax(scores, alpha, where, axis):
    """See :func:`pallas_kernels.entmax.entmax`."""
    return _entmax(scores, alpha, where, axis)[0]


def _entmax(scores, alpha, where, axis):
    wide = jnp.moveaxis(_masked(scores, where), axis, -1)
    p, slope = weights(wide, _solve(wide, alpha), alpha)
    # Newton ends above the root by at most its tolerance: p sums to 1 + that. Dividing
    # makes the sum 1 to rounding, so that attention to equal values returns them.
    p = p / positive(p.sum(-1, keepdims=True))
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
    top, tau = _solve(wide, alpha)
    is_empty = (wide == -jnp.inf).all(-1)
    absolute = ((alpha - 1) * top + tau)[..., 0].astype(scores.dtype)
    return jnp.where(is_empty, jnp.inf, absolute)


@entmax_threshold.defjvp
def _entmax_threshold_jvp(alpha, primals, tangents):
    scores, where = primals
    wide = _masked(scores, where)
    slope = weights(wide, _solve(wide, alpha), alpha)[1]
    mean = _mean(slope, tangents[0].astype(slope.dtype))[..., 0]
    change = ((alpha - 1) * mean).astype(scores.dtype)
    return entmax_threshold(scores, alpha, where), change


def _mean(slope, change):
    weighted = (slope * change).sum(-1, keepdims=True)
    return weighted / positive(slope.sum(-1, keepdims=True))


def _masked(scores, where):
    is_double = scores.dtype == jnp.float64
    wide = scores.astype(jnp.float64 if is_double else jnp.float32)
    return wide if where is None else jnp.where(where, wide, -jnp.inf)


def weights(scores, threshold, alpha):
    """See :func:`pallas_kernels.entmax.weights`."""
    z = equations.shifted(scores, threshold.top, alpha)
    return equations.powers(jnp.maximum(z - threshold.tau, 0.0), alpha)


def solve(scores, *, alpha, axis_name=None):
    """See :func:`pallas_kernels.entmax.solve`."""
    top, number = scores.max(-1, keepdims=True), scores.shape[-1]
    if axis_name is not None:
        top, number = lax.pmax(top, axis_name), number * lax.axis_size(axis_name)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    z = equations.shifted(scores, top, alpha)

    def sums(tau):
        parts = equations.powers(jnp.maximum(z - tau, 0.0), alpha)
        totals = tuple(part.sum(-1, keepdims=True) for part in parts)
        return totals if axis_name is None else lax.psum(totals, axis_name)

    start = jnp.full_like(top, -1.0)
    return Threshold(top, equations.find_tau(sums, start, number, alpha))


def _solve(scores, alpha):
    return dispatch(solve, KERNELS, (scores,), {"alpha": alpha})


def entmax_attention(
    q, k, v, query_positions, key_positions, alpha, sm_scale, tau=None
):
    """See :func:`pallas_kernels.entmax.entmax_attention`.

    The threshold needs all scores of a query at once, so that blocks are of queries.
    Here `key_positions (B, H, T, S)` may also differ from row to row. With a threshold
    `tau (B, Hq, T)`, nothing is solved or divided, and the value is the mass.
    """
    batch, num_q_heads, rows, head_dim = q.shape
    by_row = key_positions is not None and key_positions.ndim == 4

    def attend(q, positions, held=key_positions, tau=tau):
        scores = decode_logits(q, k, positions, held, sm_scale=sm_scale)
        if tau is not None:
            excess = jnp.maximum((alpha - 1) * scores - tau[..., None], 0.0)
            p, _ = equations.powers(excess, alpha)
            return _combine(p, v), p.sum(-1)
        threshold = _solve(scores, alpha)
        p, _ = weights(scores, threshold, alpha)
        out = _combine(p, v) / positive(p.sum(-1, keepdims=True))
        return out, _value(scores, p, threshold, alpha)

    fits = max(SCORES_AT_ONCE // (batch * num_q_heads * k.shape[2]), 1)
    if rows <= fits:
        return attend(q, query_positions)

    def parts(x, axis):
        widths = [(0, -rows % fits if i == axis else 0) for i in range(x.ndim)]
        padded = jnp.pad(x, widths, constant_values=-1)
        padded = padded.reshape(*x.shape[:axis], -1, fits, *x.shape[axis + 1 :])
        return jnp.moveaxis(padded, axis, 0)

    blocks = {"q": parts(q, 2), "positions": parts(query_positions, 1)}
    if by_row:
        blocks["held"] = parts(key_positions, 2)
    if tau is not None:
        blocks["tau"] = parts(tau, 2)
    found = lax.map(lambda block: attend(**block), blocks)
    out, value = (jnp.moveaxis(x, 0, 2) for x in found)
    out = out.reshape(batch, num_q_heads, -1, head_dim)
    return out[:, :, :rows], value.reshape(batch, num_q_heads, -1)[:, :, :rows]


def _combine(p, v):
    batch, num_q_heads, rows, slots = p.shape
    out = weighted_values(p.reshape(batch, v.shape[1], -1, slots), v)
    return turned(v, out.reshape(batch, num_q_heads, rows, -1))


def _value(scores, p, threshold, alpha):
    top, tau = (part[..., 0] for part in threshold)
    excess = jnp.maximum(
        equations.shifted(scores, threshold.top, alpha) - threshold.tau, 0.0
    )
    moment = (p * excess).sum(-1)
    return equations.value(top, tau, p.sum(-1), moment, alpha)
