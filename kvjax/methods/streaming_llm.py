"""StreamingLLM: attention sinks plus a sliding window, in one ring buffer."""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.partials import Partial, merge, softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.stores import buffers, step
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shared.quantized import Rows, as_stored, floats


class StreamingState(NamedTuple):
    """State of :func:`streaming_llm`, one layer."""

    spec: CacheSpec
    sink_k: Float[Rows, "B Hkv M D"]  # the first M = num_sinks tokens
    sink_v: Float[Rows, "B Hkv M D"]
    k: Float[Rows, "B Hkv R D"]  # the newest R = budget - num_sinks others, a ring
    v: Float[Rows, "B Hkv R D"]
    length: Int[Array, "B"]  # tokens seen, not slots used

    ROWS = types.MappingProxyType(
        {"sink_k": "keys", "sink_v": "values", **buffers.KEYS_AND_VALUES}
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`streaming_llm`."""

    budget: int
    num_sinks: int

    def __post_init__(self) -> None:
        budget, num_sinks = self.budget, self.num_sinks
        if budget < 1:
            raise ValueError(f"{budget=} must be at least 1 token.")
        if not 0 <= num_sinks < budget:
            raise ValueError(
                f"{num_sinks=} must be in [0, {budget=}); raise the budget."
            )

    @property
    def ring(self) -> int:
        """Slots of the ring, R."""
        return self.budget - self.num_sinks


@typed
@softmax_only
def streaming_llm(*, budget: int = 1024, num_sinks: int = 4) -> Method:
    """Keeps the first few tokens and the newest ones; forgets what lies between.

    Positions are re-numbered inside the cache (Sec. 3.2): kept tokens sit at 0, 1, 2,
    ... in order. Inside the window that changes no distance, so keys stay rotated at
    their absolute position and only the query that meets the sinks is rotated anew, at
    its place in the cache.

    Prompts obey the same rule, token by token: a token attends to the sinks and to the
    window that ends in it, so prefill takes constant memory.

    Args:
        budget: tokens attended to per step, sinks and the current token included.
        num_sinks: first tokens of the sequence that always stay. Paper: 4.

    Returns:
        A :class:`kvjax.Method` over :class:`StreamingState`.

    State: sinks and ring, together k, v `(B, Hkv, budget, D)` cache dtype; length.
        What is appended takes the place of the oldest in the ring.
    Reads per step and layer: 2*min(budget, length)*D*Hkv elements of KV, per row.
    Exact when: budget >= length; under `dynamic` RoPE up to the original context.

    Raises:
        ValueError: unless 0 <= num_sinks < budget.

    Source:
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
        ICLR 2024, arXiv:2309.17453, Sec. 3.2.
    Deviations:
        The current token counts in the budget; the official code evicts after
        attending, so that one token more is attended to. A token of the prompt too sees
        its own cache and no more; the official script attends to a prompt in full.

    Example:
        >>> method = kvjax.streaming_llm(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(budget, num_sinks)
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=step.finish_unchanged,
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        renumbers=True,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> StreamingState:
    """Makes empty sinks and an empty ring."""
    del weights

    def allocate(slots: int) -> tuple[Rows, Rows]:
        shape = (spec.batch, spec.num_kv_heads, slots)
        keys = buffers.allocate_rows(spec, shape, "keys")
        return keys, buffers.allocate_rows(spec, shape, "values")

    sinks, ring = allocate(options.num_sinks), allocate(options.ring)
    return StreamingState(spec, *sinks, *ring, buffers.lengths(spec))


def prefill(
    options: Options,
    state: StreamingState,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[StreamingState, Float[Array, "B Hq T D"]]:
    """Attends to the sinks and to the window that ends in each token."""
    before = ring_positions(options, state.length)
    start = state.length[:, None]
    new, rotated, fresh = write(options, state, k, v, lengths)
    in_ring = jnp.where(fresh >= options.num_sinks, fresh, -1)[:, None, :]
    positions = start + jnp.arange(q.shape[2], dtype=jnp.int32)
    out, _ = attend(
        options,
        new,
        q,
        positions,
        jnp.concatenate([floats(state.k), as_stored(state.k, rotated)], axis=2),
        jnp.concatenate([floats(state.v), as_stored(state.v, v)], axis=2),
        jnp.concatenate([before, in_ring], axis=2),
    )
    return new, out.astype(q.dtype)


def append(
    options: Options,
    state: StreamingState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> StreamingState:
    """Writes the next token over the oldest of the ring."""
    return write(options, state, k, v, None)[0]


def inspect_step(
    options: Options, state: StreamingState, q: Float[Array, "B Hq 1 D"]
) -> tuple[StreamingState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to all that is kept."""
    in_ring = ring_positions(options, state.length)
    positions = (state.length - 1)[:, None]
    out, lse = attend(options, state, q, positions, state.k, state.v, in_ring)
    sinks = jnp.arange(options.num_sinks, dtype=jnp.int32)
    sinks = jnp.where(sinks < state.length[:, None, None], sinks, -1)
    attended = jnp.concatenate([sinks, in_ring], axis=2)
    lists = (attended.shape[0], state.k.shape[1], options.budget)
    attended = jnp.broadcast_to(attended, lists)
    diagnostics = step.diagnose(attended, lse, state.length, state.spec)
    return state, out.astype(q.dtype), diagnostics


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of all that is kept."""
    kept = min(options.budget, length)
    return Traffic(kv=buffers.kv_bytes(spec, kept), metadata=0)


# --- the ring


def ring_positions(options: Options, length: Int[Array, "B"]) -> Int[Array, "B 1 R"]:
    """Positions of what each slot of the ring holds after `length` tokens.

    The newest position p < length with p >= num_sinks and (p - num_sinks) = slot
    modulo the ring; -1 while the slot has none.
    """
    slots = options.num_sinks + jnp.arange(options.ring, dtype=jnp.int32)
    last = length[:, None] - 1
    newest = last - (last - slots) % options.ring
    return jnp.where(newest >= options.num_sinks, newest, -1)[:, None, :]


def write(
    options: Options,
    state: StreamingState,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None,
) -> tuple[StreamingState, Float[Array, "B Hkv T D"], Int[Array, "B T"]]:
    """Rotates and writes the next tokens of each row; `lengths=None` means all T.

    Returns:
        The state, the rotated keys, and the tokens' positions, -1 = padding.
    """
    num_sinks, ring = options.num_sinks, options.ring
    positions, valid = buffers.chunk_positions(state.length, lengths, k.shape[2])
    length = state.length + valid.sum(-1, dtype=jnp.int32)
    is_sink = positions < num_sinks
    # Of the tokens that share a slot only the newest may be written.
    is_newest = positions >= (length - ring)[:, None]
    slots = (positions - num_sinks) % ring
    k = state.spec.rope(k, positions)
    state = state._replace(
        k=buffers.write(state.k, k, slots, valid & ~is_sink & is_newest),
        v=buffers.write(state.v, v, slots, valid & ~is_sink & is_newest),
        length=length,
    )
    if num_sinks:
        state = state._replace(
            sink_k=buffers.write(state.sink_k, k, positions, valid & is_sink),
            sink_v=buffers.write(state.sink_v, v, positions, valid & is_sink),
        )
    return state, k, jnp.where(valid, positions, -1)


def attend(
    options: Options,
    state: StreamingState,
    q: Float[Array, "B Hq T D"],
    positions: Int[Array, "B T"],
    k: Float[Rows, "B Hkv N D"],
    v: Float[Rows, "B Hkv N D"],
    key_positions: Int[Array, "B 1 N"],
) -> Partial:
    """Attends to the sinks in `state`, and to the given keys of the window."""
    spec = state.spec
    in_window = decode_attention(
        spec.rope(q, positions),
        k,
        v,
        positions,
        key_positions,
        sm_scale=spec.sm_scale,
        window=options.ring,
    )
    if not options.num_sinks:
        return Partial(*in_window)
    # In the cache the query is the last of at most `budget` tokens.
    place = jnp.minimum(positions, options.budget - 1)
    sinks = decode_attention(
        spec.rope(q, place),
        state.sink_k,
        state.sink_v,
        positions,
        sm_scale=spec.sm_scale,
    )
    return merge(Partial(*sinks), Partial(*in_window))
