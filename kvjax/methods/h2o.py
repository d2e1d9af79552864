"""H2O: heavy hitters by accumulated attention, and the newest tokens."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only, weighted_attention
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots, step
from pallas_kernels.received_attention import received_attention


class H2OPrompt(NamedTuple):
    """State of :func:`h2o` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    scores: Float[Array, "B Hkv S"]  # attention each token has received so far


class H2OState(NamedTuple):
    """State of :func:`h2o` while decoding, one layer."""

    kept: kept_slots.Kept
    scores: Float[Array, "B Hkv N"]

    KEEPS_NEWEST = True


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`h2o`."""

    budget: int
    recent: int
    group_reduce: selection.Reduce

    def __post_init__(self) -> None:
        budget, recent = self.budget, self.recent
        if budget < 2:
            raise ValueError(
                f"{budget=} must be at least 2 tokens: one heavy, one recent."
            )
        if not 1 <= recent < budget:
            raise ValueError(f"{recent=} must be in [1, {budget=}); raise the budget.")
        selection.check_reduce(group_reduce=self.group_reduce)


@typed
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
        positions int32 `(B, Hkv, N)`. What is appended evicts, once there are N, the
        lowest score before the `recent` newest. While the prompt runs: the whole cache
        and its scores.
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
    options = Options(budget, budget // 2 if recent is None else recent, group_reduce)
    return Method(
        init=init,
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=True,
    )


def init(spec: CacheSpec, weights: Any = None) -> H2OPrompt:
    """Makes a store of the whole prompt; no token has received attention."""
    del weights
    shape = (spec.batch, spec.num_kv_heads, spec.capacity)
    return H2OPrompt(contiguous.contiguous(spec), jnp.zeros(shape, jnp.float32))


def prefill(
    options: Options,
    state: H2OPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[H2OPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything, and adds up what each token received."""
    store, chunk = step.read_chunk(state.store, q, k, v, lengths)
    voters = jnp.where(chunk.positions < store.length[:, None], chunk.positions, -1)
    mass = received_attention(
        chunk.rotated,
        store.k,
        chunk.lse,
        voters,
        sm_scale=store.spec.sm_scale,
        group_reduce=options.group_reduce,
    )
    return H2OPrompt(store, state.scores + mass), chunk.out


def finish(options: Options, state: H2OPrompt) -> H2OState:
    """Keeps the heaviest of the older tokens, and the recent ones."""
    store = state.store
    slots = jnp.arange(store.spec.capacity, dtype=jnp.int32)
    length = store.length[:, None, None]
    is_older = slots < length - options.recent
    heavy = selection.top_slots(state.scores, options.budget - options.recent, is_older)
    count = min(options.recent, store.spec.capacity)
    newest = length - count + jnp.arange(count, dtype=jnp.int32)
    newest = jnp.broadcast_to(newest, (*heavy.shape[:2], count))
    positions = jnp.concatenate([heavy, jnp.maximum(newest, -1)], axis=-1)
    # No more than there is room for: empty slots are the last.
    positions = selection.in_order(positions)[..., : store.spec.capacity]
    scores = jnp.take_along_axis(state.scores, jnp.maximum(positions, 0), axis=-1)
    return H2OState(kept_slots.take(store, positions), scores)


def append(
    options: Options,
    state: H2OState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> H2OState:
    """Writes the next token, when there is no room over the lightest older one."""
    kept = state.kept
    # The new token is itself one of the `recent` newest.
    oldest_recent = (kept.length - options.recent + 1)[:, None, None]
    may_go = (kept.positions >= 0) & (kept.positions < oldest_recent)
    victim = selection.lowest(state.scores, kept.positions, may_go)
    slots = kept_slots.next_slot(kept, victim)
    fresh = jnp.zeros((*slots.shape, 1), jnp.float32)
    scores = buffers.write(
        state.scores, fresh, slots[..., None], jnp.ones_like(fresh, bool)
    )
    return H2OState(kept_slots.write(kept, slots, k, v), scores)


def inspect_step(
    options: Options, state: H2OState, q: Float[Array, "B Hq 1 D"]
) -> tuple[H2OState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to all that is kept, and adds what each token receives to its score."""
    kept, spec = state.kept, state.kept.spec
    rotated, positions = contiguous.rotate_queries(spec, q, kept.length)
    (out, lse), weights = weighted_attention(
        rotated, kept.k, kept.v, positions, kept.positions, sm_scale=spec.sm_scale
    )
    received = selection.reduce_group(
        weights[:, :, 0], spec.num_kv_heads, options.group_reduce
    )
    diagnostics = step.diagnose(kept.positions, lse, kept.length)
    return H2OState(kept, state.scores + received), out.astype(q.dtype), diagnostics


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the kept tokens, with a score and a position of each."""
    kept = min(options.budget, length)
    per_token = jnp.dtype(jnp.float32).itemsize + jnp.dtype(jnp.int32).itemsize
    metadata = spec.batch * spec.num_kv_heads * kept * per_token
    return Traffic(kv=buffers.kv_bytes(spec, kept), metadata=metadata)
