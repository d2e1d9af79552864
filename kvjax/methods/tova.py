"""TOVA: the newest query alone decides which token to drop, for a whole layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only, weighted_attention
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots
from pallas_kernels.decode_attention import decode_logits


class TovaPrompt(NamedTuple):
    """State of :func:`tova` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    query: Float[Array, "B Hq 1 D"]  # of the newest token, rotated


class TovaState(NamedTuple):
    """State of :func:`tova` while decoding, one layer."""

    kept: kept_slots.Kept  # positions (B, 1, N): one set for all heads
    weights: Float[Array, "B 1 N"]  # the newest query's, averaged over the heads


@softmax_only
def tova(*, budget: int = 1024) -> Method:
    """Drops, when full, the token to which the newest query attends least.

    The prompt is attended to in full. Weights are averaged over all query heads of the
    layer, so that its heads keep the same tokens (Sec. 3.2). Nothing is protected: not
    the first tokens, not the newest.

    Args:
        budget: tokens attended to per step, the current one included.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`TovaState` after `finish`.

    State: k, v `(B, Hkv, N, D)` cache dtype, N = min(budget, capacity); weights float32
        and positions int32 `(B, 1, N)`. While the prompt runs: the whole cache and one
        query.
    Reads per step and layer: 2*min(budget, length)*D*Hkv elements of KV, and as many
        weights and positions as tokens, per row.
    Exact when: budget >= length.

    Raises:
        ValueError: if `budget` is below 1.

    Source:
        Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, arXiv:2401.06104,
        Sec. 3.2.
    Deviations:
        The current token counts in the budget; the official code evicts after
        attending, so that one token more is attended to.

    Example:
        >>> method = kvjax.tova(budget=256)
        >>> state = method.init(spec)
    """
    if budget < 1:
        raise ValueError(f"{budget=} must be at least 1 token.")

    def head_mean(weights):  # (B, Hq, 1, S) -> (B, 1, S)
        return weights.mean(1)

    def init(spec, weights=None):
        del weights
        shape = (spec.batch, spec.num_q_heads, 1, spec.head_dim)
        return TovaPrompt(
            contiguous.contiguous(spec), buffers.allocate(shape, spec.dtype)
        )

    def prefill(state, q, k, v, lengths):
        store = contiguous.extend(state.store, k, v, lengths)
        rotated, positions = contiguous.rotate_queries(
            store.spec, q, store.length, lengths
        )
        out = contiguous.attend(store, rotated, positions).out
        is_last = positions == store.length[:, None] - 1
        query = buffers.write(state.query, rotated, jnp.zeros_like(positions), is_last)
        return TovaPrompt(store, query), out.astype(q.dtype)

    def finish(state):
        store = state.store
        logits = decode_logits(
            state.query,
            store.k,
            store.length[:, None] - 1,
            sm_scale=store.spec.sm_scale,
        )
        weights = head_mean(jax.nn.softmax(logits, axis=-1))
        slots = jnp.arange(store.spec.capacity, dtype=jnp.int32)
        is_held = slots < store.length[:, None, None]
        positions = selection.in_order(selection.top_k(weights, budget, is_held))
        weights = jnp.take_along_axis(weights, jnp.maximum(positions, 0), axis=-1)
        return TovaState(kept_slots.keep(store, positions), weights)

    def append(state, k, v):
        kept = state.kept
        victim = selection.lowest(state.weights, kept.positions, kept.positions >= 0)
        used = kept_slots.num_kept(kept)[:, None]
        slots = jnp.where(used < kept.positions.shape[-1], used, victim)
        return TovaState(kept_slots.put(kept, slots, k, v), state.weights)

    def inspect_step(state, q):
        kept, spec = state.kept, state.kept.spec
        rotated, positions = contiguous.rotate_queries(spec, q, kept.length)
        (out, lse), weights = weighted_attention(
            rotated, kept.k, kept.v, positions, kept.positions, sm_scale=spec.sm_scale
        )
        shape = (spec.batch, spec.num_kv_heads, kept.positions.shape[-1])
        attended = jnp.broadcast_to(kept.positions, shape)
        refreshed = kept_slots.num_kept(kept) == kept.length
        exact = kept_slots.holds_all(attended, kept.length, spec.num_q_heads)
        diagnostics = Diagnostics(attended, lse, refreshed, exact)
        return TovaState(kept, head_mean(weights)), out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        held = min(budget, length)
        per_token = jnp.dtype(jnp.float32).itemsize + jnp.dtype(jnp.int32).itemsize
        kv = buffers.kv_bytes(spec, held)
        return Traffic(kv=kv, metadata=spec.batch * held * per_token)

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=traffic,
        exact_prompt=True,
    )
