"""CItruS: a prompt is read in chunks, and its instruction votes on what stays."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.choices import check_choice
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.hooks import Asked
from kvjax.interface import CacheSpec, Diagnostics, Hooks, Method, Traffic
from kvjax.stores import buffers, places, step
from kvjax.stores.places import Places, Settled

Variant = Literal["shared", "individual", "chunk"]


class CitrusPrompt(NamedTuple):
    """State of :func:`citrus` while the context is read, one layer."""

    spec: CacheSpec
    past: Places  # the chunks before the running one, as far as they are kept
    votes: Float[Array, "B 1 N"]  # what the past received since it was last cut
    other: Places | None  # the cache that answers, of "individual" alone
    other_votes: Float[Array, "B 1 N"] | None
    probed: Bool[Array, "B"]  # the votes are the instruction's
    run_k: Float[Array, "B Hkv C D"]  # of the running chunk, C = stride; un-rotated
    run_v: Float[Array, "B Hkv C D"]
    length: Int[Array, "B"]
    entered: Int[Array, "B"]  # tokens that went into the past


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`citrus`."""

    budget: int
    stride: int
    variant: Variant
    instruction: int

    def __post_init__(self) -> None:
        budget, stride, instruction = self.budget, self.stride, self.instruction
        if budget < 2:
            raise ValueError(f"{budget=} must be at least 2: the past, and a chunk.")
        if not 1 <= stride < budget:
            raise ValueError(
                f"{stride=} must be in [1, {budget=}), which holds the chunk and what "
                "is kept of the past; raise the budget."
            )
        check_choice("variant", self.variant, Variant)
        if not 1 <= instruction <= stride:
            raise ValueError(
                f"{instruction=} must be in [1, {stride=}] tokens; raise the stride."
            )

    def kept(self, spec: CacheSpec) -> int:
        """Returns the most tokens that a cut leaves of the past, K."""
        if self.budget >= spec.capacity:
            return spec.capacity
        return self.budget - self.stride

    def slots(self, spec: CacheSpec) -> int:
        """Returns the most tokens of the past: what a cut leaves, and a chunk."""
        return min(self.budget, spec.capacity)


@typed
@softmax_only
def citrus(
    *,
    budget: int = 1024,
    stride: int | None = None,
    variant: Variant = "shared",
    instruction: int | None = None,
) -> Method:
    """Reads the prompt in chunks, and keeps of the past what its instruction looks at.

    When a chunk has been read, what the cache held before is cut to `budget - stride`
    tokens, by the attention that these receive, and the chunk comes behind them. In a
    layer all heads keep the same tokens. Who votes is the `variant`: the tokens of the
    chunk; or the instruction, the prompt's end, which is run behind the past before
    each chunk and forgotten again, in the one cache or in a second one that then
    answers. At the end, in every variant, the instruction cuts the cache once more, is
    read behind what is left, and everything from there on is kept.

    Positions are places in the cache, so that texts longer than the model's context can
    be read, in constant memory, if `budget + stride` and what is generated fit it.

    The caller says where the instruction begins: `generate(instruction=...)`,
    `--instruction`, and the tasks, whose last `stride` tokens of a question it is.
    Where a text is read before a question is known, as by `stream`, `prefill`, and with
    questions that come `after` their context, every variant is "chunk" without the
    last cut: a prefix that is saved serves any question, and none chose it.

    Args:
        budget: tokens held between two chunks. Official: 1024, of which 768 are past.
        stride: tokens of a chunk; a quarter of the budget, if not given. Official: 256.
        variant: "chunk", "shared" (the instruction, one cache), or "individual" (two
            caches: the chunks vote on the first, which reads the text; the instruction
            on the second).
        instruction: tokens of it where the caller does not say, up to `stride`; 16, if
            not given. One longer than the question looks at much else.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`kvjax.stores.places.Settled` after
        `finish`.

    State: k, v `(B, Hkv, budget + max_new_tokens, D)` cache dtype; positions int32.
        What is appended is kept, on top of the budget. While the prompt runs: budget +
        stride tokens, and votes, float32; of "individual" 2*budget + stride.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, per row.
    Exact when: nothing was cut, as of a context of budget - stride tokens; under
        `dynamic` RoPE up to the original context.

    Raises:
        ValueError: if an option is out of its range.

    Source:
        Bai, Zou, Huang, Chen, Rondeau, Gao, Cheung, "CItruS: Chunked Instruction-aware
        State Eviction for Long Sequence Modeling", EMNLP 2024, arXiv:2406.12018.
        Official code: ybai-nlp/CItruS@3e1c1b1.
    Deviations:
        An instruction has at most `stride` tokens. Votes are float32, summed over
        tokens, and of equal ones the earlier token wins; officially they are means in
        the model's half precision. The running chunk is kept apart, so that a prompt
        may be read in any pieces. A prompt is tokenised as one text, officially the
        instruction apart. The paper's text could not be consulted, only its abstract
        and code.

    Example:
        >>> method = kvjax.citrus(budget=256, variant="individual")
        >>> state = method.init(spec)
    """
    stride = max(1, budget // 4) if stride is None else stride
    options = Options(
        budget,
        stride,
        variant,
        min(16, max(stride, 1)) if instruction is None else instruction,
    )
    asked = Asked(
        stride=stride,
        tokens=options.instruction,
        probe=functools.partial(probe, options),
        close=functools.partial(close, options),
        settle=functools.partial(settle, options),
        reach=budget + stride,
        votes_once=variant == "chunk",
    )
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=places.extend,
        inspect_step=inspect_step,
        traffic=functools.partial(traffic, options),
        renumbers=True,
        hooks=Hooks(asked=asked),
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> CitrusPrompt:
    """Makes an empty past, and a chunk that has not begun."""
    del weights
    slots = options.slots(spec)
    is_individual = options.variant == "individual"
    shape = (spec.batch, spec.num_kv_heads, options.stride, spec.head_dim)

    def no_votes() -> Float[Array, "B 1 N"]:
        return buffers.allocate((spec.batch, 1, slots), jnp.float32, fill=0.0)

    return CitrusPrompt(
        spec,
        places.empty(spec, slots),
        no_votes(),
        places.empty(spec, slots) if is_individual else None,
        no_votes() if is_individual else None,
        jnp.zeros((spec.batch,), bool),
        buffers.allocate(shape, spec.dtype),
        buffers.allocate(shape, spec.dtype),
        buffers.lengths(spec),
        buffers.lengths(spec),
    )


def prefill(
    options: Options,
    state: CitrusPrompt | Settled,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[CitrusPrompt | Settled, Float[Array, "B Hq T D"]]:
    """Reads the context chunk by chunk, or the instruction, of which nothing is cut."""
    if isinstance(state, Settled):
        state = places.extend(state, k, v, lengths)
        return state, places.attend_settled(state, q, lengths).out.astype(q.dtype)

    def is_running(carry: tuple[CitrusPrompt, Array, Array]) -> Bool[Array, ""]:
        return (carry[1] < lengths).any()

    def read(
        carry: tuple[CitrusPrompt, Array, Array],
    ) -> tuple[CitrusPrompt, Array, Array]:
        return read_piece(options, carry, q, k, v, lengths)

    carry = (state, jnp.zeros_like(lengths), jnp.zeros_like(q))
    state, _, out = lax.while_loop(is_running, read, carry)
    return state, out


def finish(options: Options, state: CitrusPrompt | Settled) -> Settled:
    """Ends a prompt whose instruction nobody knew, with all that is held."""
    if isinstance(state, Settled):
        return state
    return settled(options, close(options, state))


def inspect_step(
    state: Settled, q: Float[Array, "B Hq 1 D"]
) -> tuple[Settled, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to all that is held."""
    out, lse = places.attend_settled(state, q)
    lists = (*state.k.shape[:2], state.positions.shape[2])
    attended = jnp.broadcast_to(state.positions, lists)
    diagnostics = step.diagnose(attended, lse, state.length, state.spec)
    return state, out.astype(q.dtype), diagnostics


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    held = min(length, options.budget + spec.max_new_tokens)
    return Traffic(kv=buffers.kv_bytes(spec, held), metadata=0)


# --- the chunks of a context


def read_piece(
    options: Options,
    carry: tuple[CitrusPrompt, Int[Array, "B"], Float[Array, "B Hq T D"]],
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[CitrusPrompt, Int[Array, "B"], Float[Array, "B Hq T D"]]:
    """Reads of each row the tokens up to the end of its running chunk.

    Args:
        carry: the state, how many tokens of what is given are read, and their outputs.
        q, k, v, lengths: what is given.
    """
    state, done, out = carry
    size = min(options.stride, q.shape[2])
    first = state.length - state.entered
    count = jnp.clip(jnp.minimum(lengths - done, options.stride - first), 0, size)
    index = done[:, None] + jnp.arange(size, dtype=jnp.int32)
    index = jnp.minimum(index, q.shape[2] - 1)[:, None]
    queries, new_k, new_v = (buffers.gather(x, index) for x in (q, k, v))
    state = state._replace(
        run_k=buffers.write_run(state.run_k, new_k, first, count),
        run_v=buffers.write_run(state.run_v, new_v, first, count),
        length=state.length + count,
    )
    # Attention first, eviction after: the whole past is there, the last chunk too.
    behind = places.attend(
        state.spec, state.past, queries, state.run_k, state.run_v, first, count
    )
    out = buffers.write_run(out, behind.out.astype(q.dtype), done, count)
    state = state._replace(votes=with_votes_of_chunk(options, state, behind))
    is_full = state.length - state.entered == options.stride
    state = lax.cond(
        is_full.any(), lambda s: enter(options, s, is_full), lambda s: s, state
    )
    return state, done + count, out


def with_votes_of_chunk(
    options: Options, state: CitrusPrompt, behind: places.Behind
) -> Float[Array, "B 1 N"]:
    """Adds what the past received of the chunk, where the instruction did not vote."""
    are_told = state.probed & (options.variant != "individual")

    def add() -> Float[Array, "B 1 N"]:
        votes = state.votes + places.received(state.spec, state.past, behind)
        return buffers.where(are_told, state.votes, votes)

    return lax.cond(are_told.all(), lambda: state.votes, add)


def enter(
    options: Options, state: CitrusPrompt, is_due: Bool[Array, "B"]
) -> CitrusPrompt:
    """Cuts the past by the votes and puts the running chunk behind it, in rows due."""
    count = jnp.where(is_due, state.length - state.entered, 0)

    def entered(held: Places, votes: Float[Array, "B 1 N"]) -> Places:
        held = places.cut(held, votes, options.kept(state.spec), is_due)
        return places.join(held, state.run_k, state.run_v, state.entered, count)

    def uncounted(votes: Float[Array, "B 1 N"]) -> Float[Array, "B 1 N"]:
        return buffers.where(is_due, jnp.zeros_like(votes), votes)

    votes = state.votes
    if state.other is not None and state.other_votes is not None:
        # Where no instruction ever voted, both caches are the same.
        told = buffers.where(state.probed, state.other_votes, votes)
        state = state._replace(
            other=entered(state.other, told), other_votes=uncounted(state.other_votes)
        )
    return state._replace(
        past=entered(state.past, votes),
        votes=uncounted(votes),
        probed=state.probed & ~is_due,
        entered=state.entered + count,
    )


# --- the instruction


def probe(
    options: Options,
    state: CitrusPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[CitrusPrompt, Float[Array, "B Hq T D"]]:
    """Attends from the instruction to the past and to itself, and votes by it.

    The running chunk is not looked at, and no key stays.
    """
    held, none = answering(state), jnp.zeros_like(lengths)
    behind = places.attend(state.spec, held, q, k, v, none, lengths)
    votes, is_there = places.received(state.spec, held, behind), lengths > 0
    name = "other_votes" if options.variant == "individual" else "votes"
    told = buffers.where(is_there, votes, getattr(state, name))
    state = state._replace(**{name: told}, probed=state.probed | is_there)
    return state, behind.out.astype(q.dtype)


def close(options: Options, state: CitrusPrompt) -> CitrusPrompt:
    """Puts the running chunk into the past, however short; rows without one stay."""
    return enter(options, state, state.length > state.entered)


def settle(options: Options, state: CitrusPrompt) -> Settled:
    """Cuts to what the instruction voted for, in rows where it did."""
    is_individual = options.variant == "individual"
    votes = state.votes if state.other_votes is None else state.other_votes
    most = options.kept(state.spec)
    held = places.cut(answering(state), votes, most, state.probed)
    name = "other" if is_individual else "past"
    return settled(options, state._replace(**{name: held}))


def answering(state: CitrusPrompt) -> Places:
    """Returns the cache that the answer comes from."""
    return state.past if state.other is None else state.other


def settled(options: Options, state: CitrusPrompt) -> Settled:
    """Gives the cache that answers its final shape."""
    spec = state.spec
    slots = min(options.budget + spec.max_new_tokens, spec.capacity)
    return places.settle(spec, answering(state), state.length, slots)
