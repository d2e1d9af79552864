"""Cascading KV cache: rings of tokens that thin out with age, and strided prefill."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.attention.partials import softmax_only
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.methods.cascade import rings, schedule
from kvjax.stores import buffers, kept_slots


class CascadePrompt(NamedTuple):
    """State of :func:`cascade` until the prompt ends, one layer."""

    spec: CacheSpec
    held: rings.Rings  # as it was when the running stride began
    k: Float[Array, "B Hkv T D"]  # of the running stride, T = stride; un-rotated
    v: Float[Array, "B Hkv T D"]
    received: Float[Array, "B Hq J"]  # attention in this stride: slots, then its tokens
    length: Int[Array, "B"]


class CascadeState(NamedTuple):
    """State of :func:`cascade` while decoding, one layer."""

    spec: CacheSpec
    held: rings.Rings  # all tokens but the current one
    k: Float[Array, "B Hkv 1 D"]  # of the current token, un-rotated
    v: Float[Array, "B Hkv 1 D"]
    score: Float[Array, "B Hkv 1"]  # what it gave itself
    length: Int[Array, "B"]


@softmax_only
def cascade(
    *,
    budget: int = 1024,
    num_cascades: int = 4,
    num_sinks: int = 4,
    beta: float = 0.9999,
    stride: int = 512,
    head_reduction: schedule.HeadReduce = "max",
    homogeneous_heads: bool = False,
    eager_fill: bool = True,
) -> Method:
    """Keeps the newest tokens densely and older ones ever more thinly.

    The cache is cut into rings. The first takes every token; what it expels comes to
    the second, which takes every other one, and so on, every 2**i-th in ring i. A token
    that comes at another time meets the ring's newest entry, and the one that received
    more attention stays. So W slots in each of N rings span about W * (2**N - 1)
    tokens. Positions are re-numbered inside the cache.

    The prompt goes in strides, which begin at every multiple of `stride` tokens: within
    one, tokens attend to what the cache held when it began and to each other, and enter
    the cache when it is full or the prompt ends. Memory is constant and time linear in
    the prompt, however it is split into chunks.

    With ``num_cascades=1`` this is :func:`kvjax.streaming_llm` of the same budget: kept
    tokens and decode steps at any stride, the prompt's outputs at ``stride=1``.

    Args:
        budget: tokens attended to per step, sinks and the current token included. What
            these leave is cut into `num_cascades` equal rings; a remainder is not used.
            A prompt's token attends, besides, to those before it in its stride.
        num_cascades: rings, N. Paper: 4; 8 for retrieval.
        num_sinks: first tokens of the sequence that always stay. Official: 4 or 64.
        beta: decay of a score by a query, of exponential moving averages. Official:
            0.9999 for the paper's results.
        stride: tokens of a prompt that enter together. Official: 512 to 4,096.
        head_reduction: `max`, `mean` or (lower) `median` of the heads of a group.
        homogeneous_heads: reduce over all heads of the layer, which then keep the same
            tokens.
        eager_fill: while there is room nothing is dropped.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`CascadeState` after `finish`.

    State: sinks and rings, together k, v `(B, Hkv, budget - 1, D)` cache dtype; scores
        float32, positions int32 `(B, Hkv, budget)`; the current token. While the prompt
        runs: a stride instead of the token, and what its queries gave, float32
        `(B, Hq, budget + stride)`.
    Reads per step and layer: 2*min(budget, length)*D*Hkv elements of KV, the scores,
        and less than a row a ring to move, per row.
    Exact when: budget >= length + num_cascades - 1, with eager_fill; under `dynamic`
        RoPE up to the original context.

    Raises:
        ValueError: if an option is out of its range, or the budget leaves no slot for
            some ring.

    Source:
        Willette et al., "Training-Free Exponential Context Extension via Cascading KV
        Cache", ICLR 2025, arXiv:2406.17808. Official code:
        jeffwillette/cascading_kv_cache@76c89a4.
    Deviations:
        Scores are float32 and in line with their tokens, from the true softmax: in the
        official prompt kernel those of cached tokens are shifted by the sinks, float16,
        and divided by an estimate. A score is the sum that decays, not times 1 - beta.
        In the official eager path a query weighs on the tokens of its own chunk the
        more, the older it is; here the newest always weighs most. Strides begin at
        absolute positions, whatever the chunks. Left out: original positions
        (`do_og_pos`, which no result of theirs uses; one too high behind the first
        chunk) and acceptance by powers of 3 or 4, by i + 1, by 1 then 2, and by
        doubling in a part of the rings alone: ring i takes every 2**i-th token. A token
        meets the newest entry of a ring, as in their kernel; their slower class reads
        the score of the oldest. The paper's text could not be consulted, only its
        abstract and code.

    Example:
        >>> method = kvjax.cascade(budget=256, num_cascades=4)
        >>> state = method.init(spec)
    """
    if num_cascades < 1:
        raise ValueError(f"{num_cascades=} must be at least 1.")
    if num_sinks < 0:
        raise ValueError(f"{num_sinks=} must be at least 0.")
    width = (budget - num_sinks - 1) // num_cascades
    if width < 1:
        least = num_sinks + 1 + num_cascades
        raise ValueError(
            f"{budget=} must be at least {least}: {num_sinks=}, the current token and "
            f"a slot for each of {num_cascades=}."
        )
    if not 0 < beta <= 1:
        raise ValueError(f"{beta=} must be in (0, 1].")
    if stride < 1:
        raise ValueError(f"{stride=} must be at least 1 token.")
    if head_reduction not in ("mean", "max", "median"):
        raise ValueError(f"{head_reduction=} must be one of mean, max, median.")
    plan = schedule.Plan(num_sinks, num_cascades, width, eager_fill)
    # In one ring nothing ever meets: no score is needed.
    is_scored = num_cascades > 1
    columns = plan.window + stride if is_scored else 0

    def reduced(received, spec):
        return schedule.reduce_heads(
            received, spec.num_kv_heads, head_reduction, homogeneous_heads
        )

    def init(spec, weights=None):
        del weights
        shape = (spec.batch, spec.num_kv_heads, stride, spec.head_dim)
        received = (spec.batch, spec.num_q_heads, columns)
        return CascadePrompt(
            spec,
            rings.empty(plan, spec),
            buffers.allocate(shape, spec.dtype),
            buffers.allocate(shape, spec.dtype),
            buffers.allocate(received, jnp.float32, fill=0.0),
            buffers.lengths(spec),
        )

    def enter(state, is_due):
        """The running stride goes into the rings, in the rows that are due."""
        spec, held = state.spec, state.held
        count = jnp.where(is_due, state.length - held.seen, 0)
        fresh = jnp.zeros((*state.k.shape[:2], stride), jnp.float32)
        received = state.received
        if is_scored:
            given = reduced(jnp.where(is_due[:, None, None], received, 0.0), spec)
            scores = schedule.ema(held.scores, given[..., : plan.window], beta, count)
            held, fresh = held._replace(scores=scores), given[..., plan.window :]
            received = jnp.where(is_due[:, None, None], 0.0, received)
        held = rings.insert(plan, spec.rope, held, state.k, state.v, fresh, count)
        return state._replace(held=held, received=received)

    def prefill(state, q, k, v, lengths):
        spec, size = state.spec, min(stride, q.shape[2])

        def is_running(carry):
            return (carry[1] < lengths).any()

        def one_stride(carry):
            """Of each row the tokens up to the end of its running stride."""
            state, done, out = carry
            first = state.length - state.held.seen
            count = jnp.clip(jnp.minimum(lengths - done, stride - first), 0, size)
            index = done[:, None] + jnp.arange(size, dtype=jnp.int32)
            index = jnp.minimum(index, q.shape[2] - 1)[:, None]
            queries, new_k, new_v = (buffers.gather(x, index) for x in (q, k, v))
            stride_k = buffers.write_run(state.k, new_k, first, count)
            stride_v = buffers.write_run(state.v, new_v, first, count)
            found, received = rings.attend_chunk(
                plan,
                spec.rope,
                state.held,
                queries,
                stride_k,
                stride_v,
                first,
                count,
                sm_scale=spec.sm_scale,
                beta=beta if is_scored else None,
            )
            out = buffers.write_run(out, found.out.astype(q.dtype), done, count)
            if is_scored:
                received = schedule.ema(state.received, received, beta, count)
            else:
                received = state.received
            length = state.length + count
            state = CascadePrompt(
                spec, state.held, stride_k, stride_v, received, length
            )
            is_full = length - state.held.seen == stride
            state = lax.cond(
                is_full.any(), lambda s: enter(s, is_full), lambda s: s, state
            )
            return state, done + count, out

        carry = (state, jnp.zeros_like(lengths), jnp.zeros_like(q))
        state, _, out = lax.while_loop(is_running, one_stride, carry)
        return state, out

    def finish(state):
        held = enter(state, jnp.ones_like(state.length, bool)).held
        shape = (*state.k.shape[:2], 1, state.k.shape[3])
        return CascadeState(
            state.spec,
            held,
            buffers.allocate(shape, state.spec.dtype),
            buffers.allocate(shape, state.spec.dtype),
            buffers.allocate(shape[:3], jnp.float32, fill=0.0),
            state.length,
        )

    def append(state, k, v):
        # The token before goes in only now, so that buffers are written, then read.
        held = rings.insert_one(
            plan,
            state.spec.rope,
            state.held,
            state.k,
            state.v,
            state.score,
            state.held.seen < state.length,
        )
        dtype = state.spec.dtype
        return state._replace(
            held=held, k=k.astype(dtype), v=v.astype(dtype), length=state.length + 1
        )

    def inspect_step(state, q):
        spec, held = state.spec, state.held
        (out, lse), weights, own = rings.attend_one(
            plan, spec.rope, held, q, state.k, state.v, sm_scale=spec.sm_scale
        )
        if is_scored:
            given = reduced(jnp.concatenate([weights, own], axis=2), spec)
            one = jnp.ones_like(state.length)
            scores = schedule.ema(held.scores, given[..., :-1], beta, one)
            state = state._replace(
                held=held._replace(scores=scores), score=given[..., -1:]
            )
        sinks = jnp.arange(num_sinks, dtype=jnp.int32)
        sinks = jnp.where(sinks < held.seen[:, None, None], sinks, -1)
        lists = held.tokens.shape[:2]
        attended = (sinks, held.tokens, (state.length - 1)[:, None, None])
        attended = [jnp.broadcast_to(x, (*lists, x.shape[2])) for x in attended]
        attended = jnp.concatenate(attended, axis=2)
        exact = kept_slots.holds_all(attended, state.length, q.shape[1])
        alike = kept_slots.turns_alike(state.spec, state.length)
        diagnostics = Diagnostics(attended, lse, exact.all(1), exact & alike)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        before = plan.num_held(max(length - 1, 0))
        metadata = 0
        if is_scored:
            stored = max(before - num_sinks, 0)
            lists = spec.batch * spec.num_kv_heads
            scores = lists * stored * jnp.dtype(jnp.float32).itemsize
            metadata = scores + buffers.kv_bytes(spec, min(num_cascades, stored))
        read = min(before + 1, length)
        return Traffic(kv=buffers.kv_bytes(spec, read), metadata=metadata)

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=traffic,
    )
