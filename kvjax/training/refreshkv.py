"""Attention as RefreshKV decodes, for training: every step of a sequence at once.

The first tokens of a row are its prompt and attend in full. Of the rest, every
`stride`-th may take a full step; the others attend to what the last full step selected
and to what came since. All queries of a layer are known, so nothing is sequential but
which steps are full, a scan over one vector a step.

    C  checks, the steps that may be full       R  stride       N  budget
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from kvjax.attention import selection
from kvjax.methods.refreshkv import policy
from kvjax.training.attention import Attention, causal_attention


class Selections(NamedTuple):
    """The decisions of a layer; no gradient goes through them."""

    chosen: Int[Array, "C B Hkv N"]  # of each check, were it full
    full: Bool[Array, "C B"]
    anchor: Int[Array, "C B"]  # the last full check up to this one


def refresh_attention(
    rope: Callable[..., Array],
    *,
    prompt: int,
    budget: int,
    stride: int = 5,
    schedule: Literal["fixed", "qc"] = "fixed",
    threshold: float = 0.85,
    kernel: int = 7,
    group_reduce: selection.Reduce = "max",
    max_gap: int | None = None,
    self_mode: policy.SelfMode = "paper",
    qc_rope: Literal["post", "pre"] = "post",
    eviction: Literal["exact", "none"] = "exact",
    sm_scale: float | None = None,
    block: int = 256,
) -> Attention:
    """The `attention(layer, q, k, v)` of a model that decodes with RefreshKV.

    Memory is linear in the length: a stride's weights are computed again in the
    backward pass. The gradient is that of attention over the selected tokens; the
    selection itself has none.

    Args:
        rope: `rope(x, positions)` rotates queries and keys.
        prompt: tokens of every row that attend in full.
        eviction: `exact` attends to what :func:`kvjax.refreshkv` with these options
            does, so that the loss is that of decoding; `none`, as the paper trains,
            keeps the whole selection beside all tokens since.
        sm_scale: factor on the logits; None means ``head_dim ** -0.5``.
        block: most queries of the prompt at a time.
        budget, stride, schedule, threshold, kernel, group_reduce, max_gap, self_mode,
            qc_rope: as :func:`kvjax.refreshkv`.

    Returns:
        `attention(layer, q, k, v) -> out`: q and k not yet rotated, out in q's dtype.

    Raises:
        ValueError: for options out of range, and, when called, if the rows are not
            longer than the prompt.

    Source:
        Xu, Goyal, Choi, "RefreshKV", ACL 2025, arXiv:2411.05787, Sec. 6. The form for
        all steps at once is ours.
    """
    policy.check(
        budget,
        stride,
        kernel,
        max_gap,
        schedule=schedule,
        self_mode=self_mode,
        qc_rope=qc_rope,
        eviction=eviction,
    )
    selection.check_reduce(group_reduce=group_reduce)
    if prompt < 1:
        raise ValueError(f"{prompt=} must be at least 1 token.")
    if schedule == "never":
        raise ValueError(f"{schedule=} must be 'fixed' or 'qc'.")
    longest_gap = budget - 1 if max_gap is None else max_gap
    dense = causal_attention(rope, sm_scale=sm_scale, block=block)
    has_turned = None
    if schedule != "fixed":
        has_turned = functools.partial(
            policy.has_turned, threshold=threshold, stride=stride, max_gap=longest_gap
        )

    def attention(layer, q, k, v):
        batch, num_q_heads, length, head_dim = q.shape
        heads = k.shape[1]
        if length <= prompt:
            raise ValueError(f"rows of {length} tokens must be longer than {prompt=}.")
        scale = head_dim**-0.5 if sm_scale is None else sm_scale
        first = prompt - 1  # check 0 is the prompt's last token, whose step is full
        checks = -(-(length - first) // stride)
        end = first + checks * stride
        prefix = dense(layer, *(x[:, :, :prompt] for x in (q, k, v)))
        where = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        rotated, keys = rope(q, where), rope(k, where)
        means = (rotated if qc_rope == "post" else q)[:, :, first::stride]
        padding = ((0, 0), (0, 0), (0, end - length), (0, 0))
        grouped = (batch, heads, num_q_heads // heads)
        rows = jnp.pad(rotated, padding)[:, :, first:]
        rows = rows.reshape(*grouped, checks, stride, head_dim)
        rows = jnp.moveaxis(rows, 3, 0)  # (C, B, Hkv, G, R, D)
        at = first + stride * jnp.arange(checks, dtype=jnp.int32)

        decided = _decide(
            *lax.stop_gradient((rows[:, :, :, :, 0], keys, means)),
            at,
            sm_scale=scale,
            pick=functools.partial(
                policy.select,
                num_kv_heads=heads,
                budget=budget,
                kernel=kernel,
                group_reduce=group_reduce,
                self_mode=self_mode,
            ),
            has_turned=has_turned,
        )
        # The oldest token since the last full step, seen from the stride's last row.
        span = stride if schedule == "fixed" else min(longest_gap + stride, length)
        lost = budget - 1 if eviction == "exact" else None
        stride_of = functools.partial(_stride, scale, span, schedule == "qc", lost)
        ends = jnp.pad(keys, padding), jnp.pad(v, padding)
        body = jax.checkpoint(lambda _, x: (None, stride_of(*ends, length, *x)))
        chosen = decided.chosen
        if schedule == "qc":
            index = decided.anchor[:, :, None, None]
            chosen = jnp.take_along_axis(chosen, index, axis=0)
        since = at[:, None] - (first + stride * decided.anchor)
        _, out = lax.scan(body, None, (rows, at, chosen, decided.full, since))
        out = jnp.moveaxis(out, 0, 3).reshape(batch, num_q_heads, -1, head_dim)
        sparse = out[:, :, 1 : length - first].astype(q.dtype)
        return jnp.concatenate([prefix, sparse], axis=2)

    return attention


def _decide(checked, keys, means, at, *, sm_scale, pick, has_turned) -> Selections:
    """Decides for the queries `checked (C, B, Hkv, G, D)` at positions `at`."""
    slots = jnp.arange(keys.shape[2], dtype=jnp.int32)

    def one(x):
        query, position = x
        scores = _product("bkgd,bksd->bkgs", query, keys) * sm_scale
        scores = jnp.where(slots <= position, scores, -jnp.inf)
        batch = scores.shape[0]
        logits = scores.reshape(batch, -1, scores.shape[-1]).astype(jnp.float32)
        return pick(logits, jnp.broadcast_to(position, (batch,)))

    chosen = lax.map(one, (checked, at))
    checks, batch = chosen.shape[:2]
    index = jnp.broadcast_to(
        jnp.arange(checks, dtype=jnp.int32)[:, None], chosen.shape[:2]
    )
    if has_turned is None:
        return Selections(chosen, jnp.ones((checks, batch), bool), index)
    means = jnp.moveaxis(means.astype(jnp.float32).mean(1), 1, 0)  # (C, B, D)

    def check(carry, x):
        reference, anchor = carry
        number, query, position = x
        since = position - at[anchor] - 1
        full = has_turned(query, reference, since)
        reference = jnp.where(full[:, None], query, reference)
        anchor = jnp.where(full, number, anchor)
        return (reference, anchor), (full, anchor)

    # The prompt's last token comes first: its step is full whatever it looks like.
    start = means[0], index[0]
    xs = index[1:, 0], means[1:], at[1:]
    _, (full, anchor) = lax.scan(check, start, xs)
    full = jnp.concatenate([jnp.ones((1, batch), bool), full])
    return Selections(chosen, full, jnp.concatenate([index[:1], anchor]))


def _stride(
    scale, span, may_pass, lost, keys, values, length, rows, at, chosen, full, since
):
    """Outputs `(B, Hkv, G, R, D)` of one stride, whose first row is the check `at`.

    Args:
        scale: factor on the logits.
        span: newest keys that may be local to the stride's last row.
        may_pass: if the check may be a small step.
        lost: a small step sees no token so many back or more, and of a selection has
            lost a token a step; None keeps everything.
        keys, values: `(B, Hkv, S, D)`, S a whole number of strides past the prompt.
        length: real keys.
        rows: `(B, Hkv, G, R, D)` rotated queries.
        at: position of the first.
        chosen: `(B, Hkv, N)` of the last full step.
        full: `(B,)`, whether the first row is full.
        since: `(B,)`, positions from the last full step to the check.
    """
    stride = rows.shape[3]
    step = jnp.arange(stride, dtype=jnp.int32)
    position, age = at + step, since[:, None] + step  # (R,), (B, R): m of each row

    # What was selected: slots are taken in order, one a step, the first by the first.
    slot = jnp.arange(chosen.shape[2], dtype=jnp.int32)
    gone = jnp.ones_like(age) if lost is None else age
    kept = slot >= gone[..., None]  # (B, R, N)
    kept = kept[:, None] & (chosen >= 0)[:, :, None]  # (B, Hkv, R, N)
    selected_k, selected_v = (
        jnp.take_along_axis(x, jnp.maximum(chosen, 0)[..., None], axis=2)
        for x in (keys, values)
    )
    # What came since: behind the last full step, up to the row itself.
    start = jnp.maximum(at + stride - span, 0)
    size = (*keys.shape[:2], span, keys.shape[3])
    local_k, local_v = (
        lax.dynamic_slice(x, (0, 0, start, 0), size) for x in (keys, values)
    )
    place = start + jnp.arange(span, dtype=jnp.int32)
    behind = (at - since)[:, None, None] < place
    local = behind & (place <= position[:, None])
    if lost is not None:
        local = local & (place >= position[:, None] - lost)
    mask = jnp.broadcast_to(local[:, None], (*kept.shape[:3], span))
    mask = jnp.concatenate([kept, mask], axis=-1)[:, :, None]
    logits = jnp.concatenate(
        [_product("bkgrd,bksd->bkgrs", rows, x) for x in (selected_k, local_k)], axis=-1
    )
    both = jnp.concatenate([selected_v, local_v], axis=2)
    out = _attend(logits * scale, mask, both)

    # The check itself, over everything.
    seen = jnp.arange(keys.shape[2], dtype=jnp.int32) <= jnp.minimum(at, length - 1)
    logits = _product("bkgrd,bksd->bkgrs", rows[:, :, :, :1], keys) * scale
    whole = _attend(logits, seen, values)
    if may_pass:
        whole = jnp.where(full[:, None, None, None, None], whole, out[:, :, :, :1])
    return jnp.concatenate([whole, out[:, :, :, 1:]], axis=3)


def _attend(logits, mask, values):
    logits = jnp.where(mask, logits, -jnp.inf)
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    # A padded row may see nothing.
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return _product("bkgrs,bksd->bkgrd", weights.astype(values.dtype), values)


def _product(axes, a, b):
    wide = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(axes, a, b, preferred_element_type=wide)
