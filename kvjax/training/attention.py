"""Causal attention for training: softmax or entmax, over rows of packed sequences.

Queries go in blocks, and the backward pass computes the weights of a block again from
its log-sum-exp or threshold, so that memory is linear in the length.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import entmax

# Groups of query blocks; a group's keys end where its last query does. Eight skip 44 %
# of the scores, where skipping all that nobody sees would skip 50 %.
MAX_GROUPS = 8
# On CPU a step's scores stay near the caches: above, a step waits for memory.
CPU_SCORES = 2**20
CPU_MIN_BLOCK = 32

Attention = Callable[
    [
        int,
        Float[Array, "B Hq T D"],
        Float[Array, "B Hkv T D"],
        Float[Array, "B Hkv T D"],
    ],
    Float[Array, "B Hq T D"],
]


def causal_attention(
    rope: Callable[..., Array],
    *,
    alpha: float = 1.0,
    segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    sm_scale: float | None = None,
    block: int = 256,
) -> Attention:
    """The `attention(layer, q, k, v)` that a model's `hidden` takes, for training.

    The same function as prefill by :func:`kvjax.full`, with a gradient: exact, with no
    differentiation through the search for entmax's threshold.

    Args:
        rope: `rope(x, positions)` rotates queries and keys; see
            :class:`kvjax.rope.Rope`.
        alpha: 1 is softmax, above 1 alpha-entmax.
        segments: number of the sequence a token belongs to; a token sees those of its
            own up to itself. 0 is padding: it sees nothing and its output is 0. None
            is one sequence a row.
        positions: of a token in its sequence; None counts from the row's start.
        sm_scale: factor on the logits; None means ``head_dim ** -0.5``.
        block: most queries at a time. Temporary memory is that of
            B * Hq * block * T float32 scores, a few times over; on CPU fewer are taken
            where that is faster.

    Returns:
        `attention(layer, q, k, v) -> out`: q and k not yet rotated, out in q's dtype.

    Raises:
        ValueError: unless alpha >= 1 and block >= 1, and, when called, if the shapes
            of q, k, v, segments and positions disagree.
    """
    if block < 1:
        raise ValueError(f"{block=} must be at least 1 query.")
    if not (alpha >= 1 and math.isfinite(alpha)):
        raise ValueError(f"{alpha=} must be at least 1 (softmax) and finite.")

    def attention(layer: int, q: Array, k: Array, v: Array) -> Any:
        del layer
        _check(q, k, v, segments, positions)
        where = positions
        if where is None:
            where = jnp.arange(q.shape[2], dtype=jnp.int32)
            where = jnp.broadcast_to(where, (q.shape[0], q.shape[2]))
        scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        plan = _plan(q.shape, block, scale, float(alpha))
        return _attend(plan, rope(q, where), rope(k, where), v, segments)

    return attention


def by_layer(attentions: Iterable[Attention]) -> Attention:
    """Joins attentions of single layers, in their order, which may differ in rope."""
    attentions = tuple(attentions)

    def attention(layer, q, k, v):
        return attentions[layer](layer, q, k, v)

    return attention


def _check(q, k, v, segments, positions):
    batch, num_q_heads, length, head_dim = q.shape
    expected = (batch, k.shape[1], length, head_dim)
    if k.shape != expected or v.shape != expected or num_q_heads % k.shape[1]:
        raise ValueError(f"shapes disagree: q {q.shape}, k {k.shape}, v {v.shape}.")
    for name, array in (("segments", segments), ("positions", positions)):
        if array is not None and array.shape != (batch, length):
            raise ValueError(
                f"{name} {array.shape} must be (B, T) = {(batch, length)}, as q is."
            )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part: how queries are cut into steps, and what a step computes."""

    block: int  # queries per step
    steps: int
    groups: tuple[tuple[int, int], ...]  # first and last + 1 step of each group
    scale: float
    alpha: float


def _plan(shape, block, scale, alpha) -> _Plan:
    batch, num_q_heads, length, _ = shape
    if jax.default_backend() == "cpu":
        fits = max(CPU_SCORES // (batch * num_q_heads * length), CPU_MIN_BLOCK)
        block = min(block, 1 << (fits.bit_length() - 1))
    block = min(block, length)
    steps = -(-length // block)
    size = -(-steps // MAX_GROUPS)
    groups = tuple((i, min(i + size, steps)) for i in range(0, steps, size))
    return _Plan(block, steps, groups, scale, alpha)


def _fold(x, plan, heads):
    # (B, Hq, T, D) -> (steps, B, Hkv, G * block, D): the query heads of a KV head and
    # a block of queries are the rows of one matrix.
    batch, _, length, size = x.shape
    padding = plan.steps * plan.block - length
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    x = x.reshape(batch, heads, -1, plan.steps, plan.block, size)
    x = x.transpose(3, 0, 1, 2, 4, 5)
    return x.reshape(plan.steps, batch, heads, -1, size)


def _unfold(x, plan, shape):
    batch, num_q_heads, length, size = shape
    heads = x.shape[2]
    x = x.reshape(plan.steps, batch, heads, -1, plan.block, size)
    x = x.transpose(1, 2, 3, 0, 4, 5)
    return x.reshape(batch, num_q_heads, -1, size)[:, :, :length]


def _fold_segments(segments, plan, group):
    if segments is None:
        return None
    padding = plan.steps * plan.block - segments.shape[1]
    rows = jnp.pad(segments, ((0, 0), (0, padding)))
    rows = rows.reshape(-1, plan.steps, plan.block).swapaxes(0, 1)
    return jnp.tile(rows, (1, 1, group))[:, :, None, :, None]


def _scores(plan, step, q, k, row_segments, segments):
    scores = _product("bkrd,bksd->bkrs", q, k)
    rows, keys = scores.shape[2:]
    index = step * plan.block + jnp.arange(plan.block, dtype=jnp.int32)
    index = jnp.tile(index, rows // plan.block)
    visible = jnp.arange(keys, dtype=jnp.int32) <= index[:, None]
    if segments is not None:
        columns = segments[:, None, None, :keys]
        visible = visible & (row_segments == columns) & (row_segments > 0)
    return jnp.where(visible, scores * plan.scale, -jnp.inf)


def _normalise(plan, scores):
    """`(terms, statistics)`: terms in proportion to the weights, and the few numbers a
    row from which :func:`_weights` computes the weights again."""
    if plan.alpha != 1:
        threshold = entmax.solve(scores, alpha=plan.alpha)
        return entmax.weights(scores, threshold, alpha=plan.alpha)[0], threshold
    top = scores.max(-1, keepdims=True)
    # A row that sees nothing: every term below is exp(-inf) = 0.
    top = jnp.where(top == -jnp.inf, 0.0, top)
    terms = jnp.exp(scores - top)
    return terms, top + jnp.log(_positive(terms.sum(-1, keepdims=True)))


def _weights(plan, scores, statistics):
    """The weights again, and their slopes: a row's scores change by dz, its weights by
    slope * (dz - sum(slope * dz) / sum(slope))."""
    if plan.alpha != 1:
        return entmax.weights(scores, statistics, alpha=plan.alpha)
    weights = jnp.exp(scores - statistics)
    return weights, weights


def _wide(dtype):
    # Scores, statistics and sums: float32, or float64 where the inputs are.
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _product(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=_wide(a.dtype))


def _positive(total):
    return jnp.where(total == 0, 1.0, total)


def _loop(body, carry, inputs, first, last):
    """`lax.scan` over steps [first, last), without a loop for one."""
    inputs = jax.tree.map(lambda x: x[first:last], inputs)
    inputs = (jnp.arange(first, last, dtype=jnp.int32), *inputs)
    if last - first > 1:
        return lax.scan(body, carry, inputs)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, jax.tree.map(lambda x: x[None], out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, segments):
    return _forward(plan, q, k, v, segments)[0]


def _forward(plan, q, k, v, segments):
    heads = k.shape[1]
    row_segments = _fold_segments(segments, plan, q.shape[1] // heads)
    inputs = (_fold(q, plan, heads), row_segments)
    outs = []
    for first, last in plan.groups:
        end = last * plan.block
        keys, values = k[:, :, :end], v[:, :, :end]

        def body(carry, x, keys=keys, values=values):
            step, q, row_segments = x
            scores = _scores(plan, step, q, keys, row_segments, segments)
            terms, statistics = _normalise(plan, scores)
            out = _product("bkrs,bksd->bkrd", terms.astype(values.dtype), values)
            out = out / _positive(terms.sum(-1, keepdims=True))
            return carry, (out.astype(q.dtype), statistics)

        outs.append(_loop(body, None, inputs, first, last)[1])
    out, statistics = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
    # Softmax's slopes are its weights: their mean needs `out` only, not the scores.
    kept = out if plan.alpha == 1 else None
    return _unfold(out, plan, q.shape), (q, k, v, segments, kept, statistics)


def _backward(plan, residuals, grad):
    q, k, v, segments, out, statistics = residuals
    batch, heads, length, size = k.shape
    row_segments = _fold_segments(segments, plan, q.shape[1] // heads)
    folded_grad = _fold(grad, plan, heads)
    mean = None
    if out is not None:
        wide = folded_grad.astype(_wide(q.dtype)) * out.astype(_wide(q.dtype))
        mean = wide.sum(-1, keepdims=True)
    inputs = (_fold(q, plan, heads), folded_grad, statistics, mean, row_segments)
    dk = dv = jnp.zeros((batch, heads, size, length), _wide(q.dtype))
    dqs = []
    for first, last in plan.groups:
        end = min(last * plan.block, length)
        keys, values = k[:, :, :end], v[:, :, :end]

        def body(carry, x, keys=keys, values=values):
            dk, dv = carry
            step, q, grad, statistics, mean, row_segments = x
            scores = _scores(plan, step, q, keys, row_segments, segments)
            weights, slopes = _weights(plan, scores, statistics)
            # Sums over rows are taken as (D, S): with the large matrix on the right,
            # XLA's CPU backend runs them twice as fast.
            dv += _product("bkrd,bkrs->bkds", grad, weights.astype(grad.dtype))
            dweights = _product("bkrd,bksd->bkrs", grad, values)
            if mean is None:
                total = _positive(slopes.sum(-1, keepdims=True))
                mean = (slopes * dweights).sum(-1, keepdims=True) / total
            dscores = (slopes * (dweights - mean)).astype(q.dtype)
            dk += _product("bkrd,bkrs->bkds", q, dscores)
            dq = _product("bkrs,bksd->bkrd", dscores, keys)
            return (dk, dv), dq.astype(q.dtype)

        empty = jnp.zeros((batch, heads, size, end), dk.dtype)
        carry, dq = _loop(body, (empty, empty), inputs, first, last)
        dk = dk.at[..., :end].add(carry[0])
        dv = dv.at[..., :end].add(carry[1])
        dqs.append(dq)
    dq = _unfold(jnp.concatenate(dqs), plan, q.shape) * plan.scale
    dk = (dk * plan.scale).swapaxes(2, 3)
    return (
        dq.astype(q.dtype),
        dk.astype(k.dtype),
        dv.swapaxes(2, 3).astype(v.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)
