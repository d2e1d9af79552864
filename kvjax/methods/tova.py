"""TOVA: the newest query alone decides which token to drop, for a whole layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import heads, selection
from kvjax.attention.partials import softmax_only, weighted_attention
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots, step
from pallas_kernels.decode_attention import decode_logits


class TovaPrompt(NamedTuple):
    """State of :func:`tova` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    query: Float[Array, "B Hq 1 D"]  # of the newest token, rotated


class TovaState(NamedTuple):
    """State of :func:`tova` while decoding, one layer."""

    kept: kept_slots.Kept  # positions (B, 1, N): one set for all heads
    weights: Float[Array, "B 1 N"]  # the newest query's, averaged over the heads

    KEEPS_NEWEST = True


@typed
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
        and positions int32 `(B, 1, N)`. What is appended evicts, once there are N, the
        token with the least weight. While the prompt runs: the whole cache and one
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
    return Method(
        init=init,
        prefill=prefill,
        finish=functools.partial(finish, budget),
        append=append,
        inspect_step=inspect_step,
        traffic=functools.partial(traffic, budget),
        exact_prompt=True,
    )


def init(spec: CacheSpec, weights: Any = None) -> TovaPrompt:
    """Makes a store of the whole prompt, and room for a query."""
    del weights
    shape = (spec.batch, spec.num_q_heads, 1, spec.head_dim)
    query = buffers.allocate(shape, spec.dtype)
    return TovaPrompt(contiguous.contiguous(spec), query)


def prefill(
    state: TovaPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[TovaPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything, and keeps the newest query."""
    store, chunk = step.read_chunk(state.store, q, k, v, lengths)
    positions = chunk.positions
    is_last = positions == store.length[:, None] - 1
    query = buffers.write(
        state.query, chunk.rotated, jnp.zeros_like(positions), is_last
    )
    return TovaPrompt(store, query), chunk.out


def finish(budget: int, state: TovaPrompt) -> TovaState:
    """Keeps the tokens to which the newest query attends most."""
    store = state.store
    logits = decode_logits(
        state.query,
        store.k,
        store.length[:, None] - 1,
        sm_scale=store.spec.sm_scale,
    )
    weights = heads.mean(store.spec, jax.nn.softmax(logits, axis=-1))
    slots = jnp.arange(store.spec.capacity, dtype=jnp.int32)
    is_held = slots < store.length[:, None, None]
    positions = selection.in_order(selection.top_slots(weights, budget, is_held))
    weights = jnp.take_along_axis(weights, jnp.maximum(positions, 0), axis=-1)
    return TovaState(kept_slots.take(store, positions), weights)


def append(
    state: TovaState, k: Float[Array, "B Hkv 1 D"], v: Float[Array, "B Hkv 1 D"]
) -> TovaState:
    """Writes the next token, when there is no room over the one of least weight."""
    kept = state.kept
    victim = selection.lowest(state.weights, kept.positions, kept.positions >= 0)
    slots = kept_slots.next_slot(kept, victim)
    return TovaState(kept_slots.write(kept, slots, k, v), state.weights)


def inspect_step(
    state: TovaState, q: Float[Array, "B Hq 1 D"]
) -> tuple[TovaState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to all that is kept, and weighs it for the next eviction."""
    kept, spec = state.kept, state.kept.spec
    rotated, positions = contiguous.rotate_queries(spec, q, kept.length)
    (out, lse), weights = weighted_attention(
        rotated, kept.k, kept.v, positions, kept.positions, sm_scale=spec.sm_scale
    )
    shape = (spec.batch, spec.num_kv_heads, kept.positions.shape[-1])
    attended = jnp.broadcast_to(kept.positions, shape)
    diagnostics = step.diagnose(attended, lse, kept.length)
    weights = heads.mean(spec, weights)
    return TovaState(kept, weights), out.astype(q.dtype), diagnostics


def traffic(budget: int, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the kept tokens, with a weight and a position of each."""
    kept = min(budget, length)
    per_token = jnp.dtype(jnp.float32).itemsize + jnp.dtype(jnp.int32).itemsize
    metadata = spec.batch * kept * per_token
    return Traffic(kv=buffers.kv_bytes(spec, kept), metadata=metadata)
