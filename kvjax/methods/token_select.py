"""TokenSelect: the heads of a layer vote on the tokens that all of them read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots
from pallas_kernels.decode_attention import decode_attention, decode_logits

PAPER = {"num_sinks": 128, "window": 512, "budget": 2688}


class TokenSelectState(NamedTuple):
    """State of :func:`token_select`, one layer."""

    spec: CacheSpec
    k: Float[Array, "B Hkv S D"]  # not rotated: places change from step to step
    v: Float[Array, "B Hkv S D"]
    query: Float[Array, "B Hq D"]  # of the last choice, not rotated; 0 before the first
    chosen: Int[Array, "B 1 K"]  # by it, ascending, -1 = none
    length: Int[Array, "B"]


@softmax_only
def token_select(
    *,
    budget: int = 1024,
    num_sinks: int | None = None,
    window: int | None = None,
    threshold: float | None = None,
) -> Method:
    """Keeps every token; per step reads all keys, or none, to choose the few it uses.

    A head's votes are the softmax of its query's product with each key between the
    first tokens and the newest ones, at one distance from all of them and unscaled as
    in the official code; the votes of all query heads of the layer are added up, and
    all heads attend to the same tokens. What is attended to is numbered 0, 1, 2, ... in
    order, so that decode steps stay within the model's positions however long the
    context is. A query much like that of the last choice takes the tokens chosen then
    (Selection Cache). The prompt is attended to in full, at its own positions.

    Args:
        budget: tokens attended to per step, the current one included. Paper: 2,688.
        num_sinks: first tokens that are always read; None: the paper's share of the
            budget, 128 of 2,688.
        window: newest tokens that are always read, the current one among them; None:
            the paper's share, 512 of 2,688, and at least 1.
        threshold: of the cosine, over all heads, of the query and that of the last
            choice: below it the step chooses anew. Paper: 0.9. None, as the official
            code has it: every step does.

    Returns:
        A :class:`kvjax.Method` over :class:`TokenSelectState`.

    State: k, v `(B, Hkv, S, D)` and query `(B, Hq, D)`, cache dtype; chosen
        `(B, 1, min(budget, S) - num_sinks - window)` int32. A chunk of the prompt
        rotates a copy of all keys.
    Reads per step and layer: 2*min(budget, length)*D*Hkv elements of KV, and
        length*D*Hkv elements of keys to choose, per row; under a `threshold` the keys
        only at steps that do (`Diagnostics.refreshed`), which the accounting, made of
        shapes alone, takes for all.
    Exact when: budget >= length; under `dynamic` RoPE up to the original context.

    Raises:
        ValueError: unless num_sinks >= 0, window >= 1, num_sinks + window < budget and
            threshold is None or in (0, 1].

    Source:
        Wu et al., "TokenSelect: Efficient Long-Context Inference and Length
        Extrapolation for LLMs via Dynamic Token-Level KV Cache Selection", EMNLP 2025,
        arXiv:2411.02886.
    Deviations:
        The prompt is attended to in full; the paper chooses tokens for each 512 of its
        queries by their mean, and so reads prompts longer than the model's context.

    Example:
        >>> method = kvjax.token_select(budget=256)
        >>> state = method.init(spec)
    """
    if num_sinks is None:
        num_sinks = budget * PAPER["num_sinks"] // PAPER["budget"]
    if window is None:
        window = max(1, budget * PAPER["window"] // PAPER["budget"])
    if num_sinks < 0 or window < 1 or num_sinks + window >= budget:
        raise ValueError(
            f"{num_sinks=} >= 0 and {window=} >= 1 must together be below {budget=}; "
            "raise the budget."
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"{threshold=} must be in (0, 1], or None.")
    num_chosen = budget - num_sinks - window

    def room(spec):
        """Sinks, chosen and newest tokens of a list: a step costs what can be there."""
        sinks = min(num_sinks, spec.capacity)
        recent = min(window, spec.capacity - sinks)
        return sinks, min(num_chosen, spec.capacity - sinks - recent), recent

    def init(spec, weights=None):
        del weights
        shape = (spec.batch, spec.num_kv_heads, spec.capacity, spec.head_dim)
        _, most, _ = room(spec)
        return TokenSelectState(
            spec,
            k=buffers.allocate(shape, spec.dtype),
            v=buffers.allocate(shape, spec.dtype),
            query=buffers.allocate(
                (spec.batch, spec.num_q_heads, spec.head_dim), spec.dtype, fill=0.0
            ),
            chosen=jnp.full((spec.batch, 1, most), -1, jnp.int32),
            length=buffers.lengths(spec),
        )

    def extend(state, k, v, lengths=None):
        _, valid = buffers.chunk_positions(state.length, lengths, k.shape[2])
        count = valid.sum(-1, dtype=jnp.int32)
        return state._replace(
            k=buffers.write_run(state.k, k, state.length, count),
            v=buffers.write_run(state.v, v, state.length, count),
            length=state.length + count,
        )

    def prefill(state, q, k, v, lengths):
        state = extend(state, k, v, lengths)
        spec = state.spec
        rotated, positions = contiguous.rotate_queries(spec, q, state.length, lengths)
        places = jnp.arange(spec.capacity, dtype=jnp.int32)
        places = jnp.broadcast_to(places, (spec.batch, spec.capacity))
        keys = spec.rope(state.k, places, state.length)
        out, _ = decode_attention(
            rotated, keys, state.v, positions, sm_scale=spec.sm_scale
        )
        return state, out.astype(q.dtype)

    def select(state, q):
        """The tokens between the sinks and the window with most votes, ascending."""
        sinks, _, recent = room(state.spec)
        newest = (state.length - 1)[:, None]
        near = state.spec.rope(q, jnp.full_like(newest, recent), state.length)
        logits = decode_logits(near, state.k, newest, sm_scale=1.0)[:, :, 0]
        slots = jnp.arange(state.spec.capacity, dtype=jnp.int32)
        is_between = slots < (state.length - recent)[:, None, None]
        is_between &= slots >= sinks
        # Finite, so that a row with nothing between has votes too.
        logits = jnp.where(is_between, logits, jnp.finfo(logits.dtype).min)
        votes = jax.nn.softmax(logits, axis=-1).sum(1, keepdims=True)
        best = selection.top_k(votes, state.chosen.shape[-1], is_between)
        return selection.in_order(best)

    def choose(state, q):
        """What :func:`select` gives, in rows that need it, and which these are."""
        sinks, _, recent = room(state.spec)
        is_due = is_over = state.length > min(budget, state.spec.capacity)
        if not state.chosen.shape[-1]:
            return state, is_due  # sinks and window have room for the whole cache
        if threshold is not None:
            flat = (x.reshape(x.shape[0], -1) for x in (q, state.query))
            is_due &= selection.cosine(*flat) < threshold
        by_row = is_due[:, None, None]
        # While the budget holds everything there is nothing to choose.
        place = sinks + jnp.arange(state.chosen.shape[-1], dtype=jnp.int32)
        is_held = place < (state.length - recent)[:, None, None]
        whole = jnp.where(is_held, place, -1)
        before = jnp.where(is_over[:, None, None], state.chosen, whole)
        chosen = lax.cond(
            is_due.any(),
            lambda: jnp.where(by_row, select(state, q), before),
            lambda: before,
        )
        query = jnp.where(by_row, q[:, :, 0].astype(state.query.dtype), state.query)
        return state._replace(chosen=chosen, query=query), is_due

    def inspect_step(state, q):
        spec = state.spec
        num_first, _, recent = room(spec)
        state, is_due = choose(state, q)
        length = state.length[:, None, None]
        first = jnp.arange(num_first, dtype=jnp.int32)
        first = jnp.where(first < length, first, -1)
        newest = length - recent + jnp.arange(recent, dtype=jnp.int32)
        newest = jnp.where(newest >= num_first, newest, -1)
        attended = jnp.concatenate([first, state.chosen, newest], axis=-1)

        is_listed = attended >= 0
        place = jnp.where(is_listed, jnp.cumsum(is_listed, -1, dtype=jnp.int32) - 1, -1)
        count = is_listed[:, 0].sum(-1, dtype=jnp.int32)
        keys = spec.rope(
            buffers.gather(state.k, attended), jnp.maximum(place[:, 0], 0), count
        )
        rotated, positions = contiguous.rotate_queries(spec, q, count)
        out, lse = decode_attention(
            rotated,
            keys,
            buffers.gather(state.v, attended),
            positions,
            place,
            sm_scale=spec.sm_scale,
        )
        attended = jnp.broadcast_to(attended, (*keys.shape[:2], attended.shape[-1]))
        exact = kept_slots.holds_all(attended, state.length, spec.num_q_heads)
        alike = kept_slots.turns_alike(spec, state.length)
        diagnostics = Diagnostics(attended, lse, is_due | exact.all(-1), exact & alike)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        keys = buffers.kv_bytes(spec, length) // 2 if length > budget else 0
        return Traffic(kv=buffers.kv_bytes(spec, min(budget, length)), metadata=keys)

    return Method(
        init=init,
        prefill=prefill,
        finish=lambda state: state,
        append=extend,
        inspect_step=inspect_step,
        traffic=traffic,
        exact_prompt=True,
    )
