"""SnapKV: the end of the prompt votes, once, on which of its tokens to keep."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_prompt, step
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.received_attention import received_attention


class SnapKVPrompt(NamedTuple):
    """State of :func:`snapkv` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    queries: Float[Array, "B Hq W D"]  # the newest W = window, rotated, a ring


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`snapkv`."""

    budget: int
    window: int
    kernel: int
    pooling: selection.Reduce
    group_reduce: selection.Reduce

    def __post_init__(self) -> None:
        budget, window, kernel = self.budget, self.window, self.kernel
        if window < 1:
            raise ValueError(f"{window=} must be at least 1 query.")
        if budget <= window:
            raise ValueError(f"{budget=} must exceed {window=}; raise the budget.")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"{kernel=} must be odd and at least 1.")
        selection.check_reduce(pooling=self.pooling, group_reduce=self.group_reduce)


@typed
@softmax_only
def snapkv(
    *,
    budget: int = 1024,
    window: int = 32,
    kernel: int = 7,
    pooling: selection.Reduce = "max",
    group_reduce: selection.Reduce = "max",
) -> Method:
    """Keeps the prompt tokens that its last queries attend to, and all later tokens.

    The prompt is attended to in full. At its end the weights of the last `window`
    queries are summed, reduced over the query heads of a KV head, pooled over
    neighbours; the best `budget - window` tokens and the window itself stay.

    Args:
        budget: prompt tokens kept per KV head. Generated tokens come on top.
        window: queries that vote, and newest tokens always kept. Official: 32 (64).
        kernel: width of the pooling, odd; 1 switches it off. Official: 7 (5).
        pooling: `max` or `mean` over the neighbours.
        group_reduce: `max` or `mean` over the query heads that share a KV head.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`kvjax.stores.kept_slots.Kept`
        after `finish`.

    State: k, v `(B, Hkv, budget + max_new_tokens, D)` cache dtype; positions int32.
        What is appended is kept, on top of the budget.
        While the prompt runs: the whole cache and `window` queries.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, and as many
        positions, per row.
    Exact when: budget >= prompt length.

    Raises:
        ValueError: unless 1 <= window < budget and kernel is odd.

    Source:
        Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation",
        NeurIPS 2024, arXiv:2404.14469, Sec. 4. RefreshKV, arXiv:2411.05787, for the
        max over the group.
    Deviations:
        One selection per KV head; the official code repeats the KV heads first and so
        stores one cache per query head.

    Example:
        >>> method = kvjax.snapkv(budget=256, window=16)
        >>> state = method.init(spec)
    """
    options = Options(budget, window, kernel, pooling, group_reduce)
    scores = functools.partial(importance, options)
    return Method(
        init=functools.partial(init, options),
        prefill=prefill,
        finish=functools.partial(kept_prompt.finish, scores, budget),
        append=kept_prompt.append,
        inspect_step=kept_prompt.inspect_step,
        traffic=functools.partial(traffic, options),
        importance=scores,
        exact_prompt=True,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> SnapKVPrompt:
    """Makes a store of the whole prompt, and room for the queries that vote."""
    del weights
    shape = (spec.batch, spec.num_q_heads, options.window, spec.head_dim)
    queries = buffers.allocate(shape, spec.dtype)
    return SnapKVPrompt(contiguous.contiguous(spec), queries)


def prefill(
    state: SnapKVPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[SnapKVPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything, and keeps the newest queries."""
    store, chunk = step.read_chunk(state.store, q, k, v, lengths)
    queries = buffers.write_newest(
        state.queries, chunk.rotated, chunk.positions, store.length
    )
    return SnapKVPrompt(store, queries), chunk.out


def importance(options: Options, state: SnapKVPrompt) -> Float[Array, "B Hkv S"]:
    """Counts the votes for each token of the prompt; the window is certain to stay."""
    store, spec, window = state.store, state.store.spec, options.window
    voters = buffers.newest_positions(store.length, window)
    # Values are not needed, only each voter's normaliser.
    _, lse = decode_attention(
        state.queries, store.k, store.v, voters, sm_scale=spec.sm_scale
    )
    votes = received_attention(
        state.queries, store.k, lse, voters, sm_scale=spec.sm_scale
    )
    votes = selection.reduce_group(votes, spec.num_kv_heads, options.group_reduce)
    prefix = jnp.arange(spec.capacity, dtype=jnp.int32)
    prefix = prefix < (store.length - window)[:, None, None]
    prefix = jnp.broadcast_to(prefix, votes.shape)
    votes = selection.pool(votes, options.kernel, options.pooling, prefix)
    return kept_prompt.with_certain(votes, store.length, window=window)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    return kept_prompt.traffic(options.budget, spec, length)
