"""H2O: heavy hitters by accumulated attention, and the newest tokens."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only, weighted_attention
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots
from pallas_kernels.received_attention import received_attention


class H2OPrompt(NamedTuple):
    """State of :func:`h2o` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    scores: Float[Array, "B Hkv S"]  # attention each token has received so far


class H2OState(NamedTuple):
    """State of :func:`h2o` while decoding, one layer."""

    kept: kept_slots.Kept
    scores: Float[Array, "B Hkv N"]


@softmax_only
def h2o(
    *,
    budget: int = 1024,
    recent: int | None = None,
    group_reduce: selection.Reduce = "max",
) -> Method:
    """Keeps the tokens that received most attention so far, and the newest.

    The prompt is attended to in full. A token's score is the sum of the weights it was
    given by every query since (Alg. 1). When the budget is full, a new token replaces
    the lowest score outside the recent ones.

    Args:
        budget: tokens attended to per step and KV head, the current one included.
        recent: newest tokens that are never evicted; half the budget if None.
        group_reduce: `max` or `mean` of a query's weights over the heads of a group.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`H2OState` after `finish`.

    State: k, v `(B, Hkv, N, D)` cache dtype, N = min(budget, capacity); scores float32,
        positions int32 `(B, Hkv, N)`. While the prompt runs: the whole cache and its
        scores.
    Reads per step and layer: 2*min(budget, length)*D*Hkv elements of KV, and as many
        scores and positions, per row.
    Exact when: budget >= length.

    Raises:
        ValueError: unless 1 <= recent < budget.

    Source:
        Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of
        Large Language Models", NeurIPS 2023, arXiv:2306.14048, Alg. 1. RefreshKV,
        arXiv:2411.05787, for half heavy, half recent and the max over the group.
    Deviations:
        The current token counts in the budget; the official code evicts after
        attending, so that one token more is attended to.

    Example:
        >>> method = kvjax.h2o(budget=256)
        >>> state = method.init(spec)
    """
    if budget < 2:
        raise ValueError(f"{budget=} must be at least 2 tokens: one heavy, one recent.")
    if recent is None:
        recent = budget // 2
    if not 1 <= recent < budget:
        raise ValueError(f"{recent=} must be in [1, {budget=}); raise the budget.")
    selection.check_reduce(group_reduce=group_reduce)

    def init(spec, weights=None):
        del weights
        shape = (spec.batch, spec.num_kv_heads, spec.capacity)
        return H2OPrompt(contiguous.contiguous(spec), jnp.zeros(shape, jnp.float32))

    def prefill(state, q, k, v, lengths):
        store = contiguous.extend(state.store, k, v, lengths)
        spec = store.spec
        rotated, positions = contiguous.rotate_queries(spec, q, store.length, lengths)
        out, lse = contiguous.attend(store, rotated, positions)
        voters = jnp.where(positions < store.length[:, None], positions, -1)
        mass = received_attention(
            rotated,
            store.k,
            lse,
            voters,
            sm_scale=spec.sm_scale,
            group_reduce=group_reduce,
        )
        return H2OPrompt(store, state.scores + mass), out.astype(q.dtype)

    def finish(state):
        store = state.store
        slots = jnp.arange(store.spec.capacity, dtype=jnp.int32)
        length = store.length[:, None, None]
        is_older = slots < length - recent
        heavy = selection.top_k(state.scores, budget - recent, is_older)
        count = min(recent, store.spec.capacity)
        newest = length - count + jnp.arange(count, dtype=jnp.int32)
        newest = jnp.broadcast_to(newest, (*heavy.shape[:2], count))
        positions = jnp.concatenate([heavy, jnp.maximum(newest, -1)], axis=-1)
        # No more than there is room for: empty slots are the last.
        positions = selection.in_order(positions)[..., : store.spec.capacity]
        scores = jnp.take_along_axis(state.scores, jnp.maximum(positions, 0), axis=-1)
        return H2OState(kept_slots.keep(store, positions), scores)

    def append(state, k, v):
        kept = state.kept
        # The new token is itself one of the `recent` newest.
        oldest_recent = (kept.length - recent + 1)[:, None, None]
        may_go = (kept.positions >= 0) & (kept.positions < oldest_recent)
        victim = selection.lowest(state.scores, kept.positions, may_go)
        used = kept_slots.num_kept(kept)[:, None]
        slots = jnp.where(used < kept.positions.shape[-1], used, victim)
        fresh = jnp.zeros((*slots.shape, 1), jnp.float32)
        scores = buffers.write(
            state.scores, fresh, slots[..., None], jnp.ones_like(fresh, bool)
        )
        return H2OState(kept_slots.put(kept, slots, k, v), scores)

    def inspect_step(state, q):
        kept, spec = state.kept, state.kept.spec
        rotated, positions = contiguous.rotate_queries(spec, q, kept.length)
        (out, lse), weights = weighted_attention(
            rotated, kept.k, kept.v, positions, kept.positions, sm_scale=spec.sm_scale
        )
        given = selection.reduce_group(
            weights[:, :, 0], spec.num_kv_heads, group_reduce
        )
        refreshed = kept_slots.num_kept(kept) == kept.length
        exact = kept_slots.holds_all(kept.positions, kept.length, spec.num_q_heads)
        diagnostics = Diagnostics(kept.positions, lse, refreshed, exact)
        return H2OState(kept, state.scores + given), out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        held = min(budget, length)
        per_token = jnp.dtype(jnp.float32).itemsize + jnp.dtype(jnp.int32).itemsize
        metadata = spec.batch * spec.num_kv_heads * held * per_token
        return Traffic(kv=buffers.kv_bytes(spec, held), metadata=metadata)

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=traffic,
        exact_prompt=True,
    )
