"""Cascading KV cache: rings of tokens that thin out with age, and strided prefill."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import heads
from kvjax.attention.choices import check_choice
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.methods.cascade import rings, schedule
from kvjax.stores import buffers, step


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


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`cascade`."""

    budget: int
    num_cascades: int
    num_sinks: int
    beta: float
    stride: int
    head_reduction: schedule.HeadReduce
    homogeneous_heads: bool
    eager_fill: bool

    def __post_init__(self) -> None:
        budget, num_cascades = self.budget, self.num_cascades
        num_sinks, beta, stride = self.num_sinks, self.beta, self.stride
        if num_cascades < 1:
            raise ValueError(f"{num_cascades=} must be at least 1.")
        if num_sinks < 0:
            raise ValueError(f"{num_sinks=} must be at least 0.")
        if self._width < 1:
            least = num_sinks + 1 + num_cascades
            raise ValueError(
                f"{budget=} must be at least {least}: {num_sinks=}, the current token "
                f"and a slot for each of {num_cascades=}."
            )
        if not 0 < beta <= 1:
            raise ValueError(f"{beta=} must be in (0, 1].")
        if stride < 1:
            raise ValueError(f"{stride=} must be at least 1 token.")
        check_choice("head_reduction", self.head_reduction, schedule.HeadReduce)

    @property
    def _width(self) -> int:
        return (self.budget - self.num_sinks - 1) // self.num_cascades

    @functools.cached_property
    def plan(self) -> schedule.Plan:
        """The shape of the rings."""
        return schedule.Plan(
            self.num_sinks, self.num_cascades, self._width, self.eager_fill
        )

    @property
    def is_scored(self) -> bool:
        """Says whether scores are needed: in one ring tokens never meet."""
        return self.num_cascades > 1

    def reduce(
        self, received: Float[Array, "B Hq S"], spec: CacheSpec
    ) -> Float[Array, "B Hkv S"]:
        """Reduces attention received over the heads that keep the same tokens."""
        if self.homogeneous_heads:  # one number for the heads of all devices
            received = heads.gathered(spec, received)
        reduced = schedule.reduce_heads(
            received,
            heads.count(spec, spec.num_kv_heads)
            if self.homogeneous_heads
            else spec.num_kv_heads,
            self.head_reduction,
            self.homogeneous_heads,
        )
        return reduced[:, : spec.num_kv_heads]


@typed
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
        float32, positions int32 `(B, Hkv, budget)`; the current token. What is appended
        goes into the rings, and out of them, as the prompt did. While the prompt
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
    options = Options(
        budget,
        num_cascades,
        num_sinks,
        beta,
        stride,
        head_reduction,
        homogeneous_heads,
        eager_fill,
    )
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        renumbers=True,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> CascadePrompt:
    """Makes empty rings, and a stride that has not begun."""
    del weights
    shape = (spec.batch, spec.num_kv_heads, options.stride, spec.head_dim)
    columns = options.plan.window + options.stride if options.is_scored else 0
    received = (spec.batch, spec.num_q_heads, columns)
    return CascadePrompt(
        spec,
        rings.empty(options.plan, spec),
        buffers.allocate(shape, spec.dtype),
        buffers.allocate(shape, spec.dtype),
        buffers.allocate(received, jnp.float32, fill=0.0),
        buffers.lengths(spec),
    )


def prefill(
    options: Options,
    state: CascadePrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[CascadePrompt, Float[Array, "B Hq T D"]]:
    """Reads the chunk stride by stride, each row at its own place."""

    def is_running(carry: tuple[CascadePrompt, Array, Array]) -> Bool[Array, ""]:
        return (carry[1] < lengths).any()

    def read(
        carry: tuple[CascadePrompt, Array, Array],
    ) -> tuple[CascadePrompt, Array, Array]:
        return read_stride(options, carry, q, k, v, lengths)

    carry = (state, jnp.zeros_like(lengths), jnp.zeros_like(q))
    state, _, out = lax.while_loop(is_running, read, carry)
    return state, out


def finish(options: Options, state: CascadePrompt) -> CascadeState:
    """Puts the last stride into the rings."""
    held = enter(options, state, jnp.ones_like(state.length, bool)).held
    shape = (*state.k.shape[:2], 1, state.k.shape[3])
    return CascadeState(
        state.spec,
        held,
        buffers.allocate(shape, state.spec.dtype),
        buffers.allocate(shape, state.spec.dtype),
        buffers.allocate(shape[:3], jnp.float32, fill=0.0),
        state.length,
    )


def append(
    options: Options,
    state: CascadeState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> CascadeState:
    """Puts the token before into the rings, and the next one beside them.

    That one goes in only now, so that buffers are written, then read.
    """
    held = rings.insert_one(
        options.plan,
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


def inspect_step(
    options: Options, state: CascadeState, q: Float[Array, "B Hq 1 D"]
) -> tuple[CascadeState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to sinks, rings and the token itself, and scores them by it."""
    spec, held = state.spec, state.held
    (out, lse), weights, own = rings.attend_one(
        options.plan, spec.rope, held, q, state.k, state.v, sm_scale=spec.sm_scale
    )
    if options.is_scored:
        received = options.reduce(jnp.concatenate([weights, own], axis=2), spec)
        one = jnp.ones_like(state.length)
        scores = schedule.ema(held.scores, received[..., :-1], options.beta, one)
        state = state._replace(
            held=held._replace(scores=scores), score=received[..., -1:]
        )
    sinks = jnp.arange(options.num_sinks, dtype=jnp.int32)
    sinks = jnp.where(sinks < held.seen[:, None, None], sinks, -1)
    lists = held.tokens.shape[:2]
    attended = (sinks, held.tokens, (state.length - 1)[:, None, None])
    attended = [jnp.broadcast_to(x, (*lists, x.shape[2])) for x in attended]
    attended = jnp.concatenate(attended, axis=2)
    diagnostics = step.diagnose(attended, lse, state.length, spec)
    return state, out.astype(q.dtype), diagnostics


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of all that is kept, of scores, and of a row a ring to move."""
    before = options.plan.num_held(max(length - 1, 0))
    metadata = 0
    if options.is_scored:
        stored = max(before - options.num_sinks, 0)
        lists = spec.batch * spec.num_kv_heads
        scores = lists * stored * jnp.dtype(jnp.float32).itemsize
        metadata = scores + buffers.kv_bytes(spec, min(options.num_cascades, stored))
    read = min(before + 1, length)
    return Traffic(kv=buffers.kv_bytes(spec, read), metadata=metadata)


# --- the strides of a prompt


def read_stride(
    options: Options,
    carry: tuple[CascadePrompt, Int[Array, "B"], Float[Array, "B Hq T D"]],
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[CascadePrompt, Int[Array, "B"], Float[Array, "B Hq T D"]]:
    """Reads of each row the tokens up to the end of its running stride.

    Args:
        carry: the state, how many tokens of the chunk are read, and their outputs.
        q, k, v, lengths: of the chunk.
    """
    state, done, out = carry
    spec, stride = state.spec, options.stride
    size = min(stride, q.shape[2])
    first = state.length - state.held.seen
    count = jnp.clip(jnp.minimum(lengths - done, stride - first), 0, size)
    index = done[:, None] + jnp.arange(size, dtype=jnp.int32)
    index = jnp.minimum(index, q.shape[2] - 1)[:, None]
    queries, new_k, new_v = (buffers.gather(x, index) for x in (q, k, v))
    stride_k = buffers.write_run(state.k, new_k, first, count)
    stride_v = buffers.write_run(state.v, new_v, first, count)
    part, received = rings.attend_chunk(
        options.plan,
        spec.rope,
        state.held,
        queries,
        stride_k,
        stride_v,
        first,
        count,
        sm_scale=spec.sm_scale,
        beta=options.beta if options.is_scored else None,
    )
    out = buffers.write_run(out, part.out.astype(q.dtype), done, count)
    if received is None:
        received = state.received
    else:
        received = schedule.ema(state.received, received, options.beta, count)
    length = state.length + count
    state = CascadePrompt(spec, state.held, stride_k, stride_v, received, length)
    is_full = length - state.held.seen == stride
    state = lax.cond(
        is_full.any(), lambda s: enter(options, s, is_full), lambda s: s, state
    )
    return state, done + count, out


def enter(
    options: Options, state: CascadePrompt, is_due: Bool[Array, "B"]
) -> CascadePrompt:
    """Puts the running stride into the rings, in the rows that are due."""
    spec, held, window = state.spec, state.held, options.plan.window
    count = jnp.where(is_due, state.length - held.seen, 0)
    fresh = jnp.zeros((*state.k.shape[:2], options.stride), jnp.float32)
    received = state.received
    if options.is_scored:
        by_head = options.reduce(jnp.where(is_due[:, None, None], received, 0.0), spec)
        scores = schedule.ema(held.scores, by_head[..., :window], options.beta, count)
        held, fresh = held._replace(scores=scores), by_head[..., window:]
        received = jnp.where(is_due[:, None, None], 0.0, received)
    held = rings.insert(options.plan, spec.rope, held, state.k, state.v, fresh, count)
    return state._replace(held=held, received=received)
