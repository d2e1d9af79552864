"""A transform: what is generated is evicted too, by the method's own importance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import (
    CacheSpec,
    Diagnostics,
    ImportanceFn,
    Method,
    State,
    Traffic,
)
from kvjax.stores import buffers, contiguous, kept_slots, step
from pallas_kernels.decode_attention import decode_attention


class Evicting(NamedTuple):
    """State of :func:`decode_eviction` while decoding, one layer."""

    spec: CacheSpec
    prompt: Any  # the method's state of a prompt: the tokens that are here, in order
    positions: Int[Array, "B Hkv N"]  # where each of them stands; N = budget + every
    length: Int[Array, "B"]  # tokens seen, not slots used
    k: Float[Array, "B Hkv 1 D"]  # un-rotated, of a token that is not in `prompt` yet
    v: Float[Array, "B Hkv 1 D"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`decode_eviction`, the wrapped method among them."""

    method: Method
    importance: ImportanceFn  # the method's
    every: int

    def small(self, spec: CacheSpec) -> CacheSpec:
        """Returns the spec of the slots that a layer has while decoding."""
        slots = kept_slots.budget_of(self.method, spec) + self.every
        return dataclasses.replace(spec, capacity=slots, max_new_tokens=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted:
    """A rotation of tokens whose slots are `by` places before their positions."""

    rope: Callable[..., Array]
    by: Int[Array, "B"]

    def __call__(
        self,
        x: Float[Array, "B H T D"],
        positions: Int[Array, "b T"],
        length: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H T D"]:
        """Rotates `x` where its tokens stand in the text."""
        length = None if length is None else length + self.by
        return self.rope(x, positions + self.by[:, None], length)


@typed
@softmax_only
def decode_eviction(method: Method, *, every: int = 64) -> Method:
    """Evicts generated tokens too: every so many, the most important ones stay.

    `method` keeps the `budget` most important tokens of a prompt and everything after
    it, so that a long answer grows the cache. Here a KV head has budget + every slots
    for good. The prompt leaves the budget in them and each step adds its token; a step
    that finds them full first keeps the `budget` most important and frees the rest. The
    importance is that of `method`, of the tokens in the slots as if they were a prompt:
    in their order, by queries and keys at their true positions, by the newest queries
    where it goes by queries. A row evicts when its own slots are full, whatever the
    other rows do.

    Args:
        method: scores a prompt's tokens (`Method.importance`) by keys, values and the
            newest queries alone: :func:`kvjax.snapkv`, `knorm`, `keydiff`.
        every: tokens between two evictions of a row, at least the queries that
            `method` scores by (its `window`). R-KV: 128.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`Evicting` after `finish`.

    State: k, v `(B, Hkv, budget + every, D)` cache dtype, positions int32, and what
        `method` scores by. While the prompt runs: that of `method`.
    Reads per step and layer: 2*(budget + every)*D*Hkv elements of KV at most, per row;
        to choose, the keys again once in `every` steps.
    Exact when: budget >= prompt length, and budget + every >= length.

    Raises:
        ValueError: unless every >= 1, and `method` keeps the most important tokens of a
            prompt, a number for each KV head; from `init`, if `every` is below the
            queries that it scores by, or if it scores by more of a prompt than keys,
            values and its newest queries.

    Source:
        Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
        NeurIPS 2025, arXiv:2505.24133, Sec. 3: a budget, and a buffer whose filling
        compresses both.
    Deviations:
        The importance is the wrapped method's, without R-KV's redundancy of keys.
        Pooling over neighbours is over neighbours among the tokens that are left.

    Example:
        >>> method = kvjax.decode_eviction(kvjax.snapkv(budget=256), every=64)
        >>> state = method.init(spec)
    """
    if every < 1:
        raise ValueError(f"{every=} must be at least 1 token.")
    if method.importance is None or method.rows != 1:
        raise ValueError(
            "decode_eviction ranks tokens by their importance, which "
            f"{method.spec_text()} does not tell: wrap a method that does, with "
            "transforms outside, as in 'layer_budgets+decode_eviction+snapkv'."
        )
    options = Options(method, method.importance, every)
    return Method(
        init=functools.partial(init, options),
        prefill=method.prefill,
        finish=functools.partial(finish, options),
        append=append,
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=method.exact_prompt,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> State:
    """Makes the method's state, once it is known to be one that goes on."""
    every, state = options.every, options.method.init(spec, weights)
    fields = getattr(state, "_fields", ())
    if others := sorted({*fields} - {"store", "queries"}):
        raise ValueError(
            f"{options.method.spec_text()} scores by {', '.join(others)} of a whole "
            "prompt, which decode_eviction cannot go on with: wrap snapkv, knorm or "
            "keydiff."
        )
    # A ring of queries holds the newest of them again once it has gone round.
    if "queries" in fields and every < state.queries.shape[2]:
        raise ValueError(
            f"{every=} must be at least {state.queries.shape[2]}, the window of "
            "queries that the method scores by: raise it, or lower the window."
        )
    kept_slots.budget_of(options.method, spec)
    return state


def finish(options: Options, state: State) -> Evicting:
    """Keeps the most important tokens of the prompt, with room for `every` more."""
    store: contiguous.Contiguous = state.store
    spec, small = store.spec, options.small(store.spec)
    budget = small.capacity - options.every
    chosen = best(options, state, budget)
    kept = kept_slots.take(store, chosen, spare=options.every)
    left = contiguous.Contiguous(
        small, kept.k, kept.v, jnp.minimum(store.length, budget)
    )
    one = (spec.batch, spec.num_kv_heads, 1, spec.head_dim)
    return Evicting(
        spec,
        state._replace(store=left),
        kept.positions,
        store.length,
        buffers.allocate(one, spec.dtype),
        buffers.allocate(one, spec.dtype),
    )


def best(options: Options, state: State, budget: int) -> Int[Array, "B Hkv N"]:
    """Lists the slots of the most important tokens, in order, -1 = none."""
    store: contiguous.Contiguous = state.store
    slots = jnp.arange(store.k.shape[2], dtype=jnp.int32)
    is_held = slots < store.length[:, None, None]
    chosen = selection.top_slots(options.importance(state), budget, is_held)
    return selection.in_order(chosen)


def append(
    state: Evicting, k: Float[Array, "B Hkv 1 D"], v: Float[Array, "B Hkv 1 D"]
) -> Evicting:
    """Holds the next token until the step reads it with its query."""
    # Into the buffers that are there: a donated state keeps its memory.
    first, one = jnp.zeros_like(state.length), jnp.ones_like(state.length)
    return state._replace(
        k=buffers.write_run(state.k, k, first, one),
        v=buffers.write_run(state.v, v, first, one),
        length=state.length + 1,
    )


def inspect_step(
    options: Options, state: Evicting, q: Float[Array, "B Hq 1 D"]
) -> tuple[Evicting, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Evicts from full rows, reads the token as the last of a prompt, and attends."""
    small = state.prompt.store.spec
    # First: what reads the cache before a loop changes it makes XLA copy it.
    state = evict(options, state)
    turned = at_positions(state)
    # Its output is not used, and XLA drops it: attention with its log-sum-exp is below.
    one = jnp.ones_like(state.length)
    prompt = with_spec(state.prompt, turned)
    prompt, _ = options.method.prefill(prompt, q, state.k, state.v, one)
    store: contiguous.Contiguous = prompt.store
    rotated, slot = contiguous.rotate_queries(turned, q, store.length)
    out, lse = decode_attention(
        rotated, store.k, store.v, slot, sm_scale=turned.sm_scale
    )
    newest = (state.length - 1)[:, None, None]
    newest = jnp.broadcast_to(newest, (*state.positions.shape[:2], 1))
    positions = buffers.write_run(state.positions, newest, store.length - 1, one)
    diagnostics = step.diagnose(positions, lse, state.length)
    state = state._replace(prompt=with_spec(prompt, small), positions=positions)
    return state, out.astype(q.dtype), diagnostics


def at_positions(state: Evicting) -> CacheSpec:
    """Returns the slots' spec with a rotation at where the tokens stand."""
    store: contiguous.Contiguous = state.prompt.store
    # The token that waits has a position, and its slot is the next one.
    rope = Shifted(store.spec.rope, state.length - 1 - store.length)
    return dataclasses.replace(store.spec, rope=rope)


def evict(options: Options, state: Evicting) -> Evicting:
    """Keeps the best tokens of the rows that are full, in their first slots."""
    store: contiguous.Contiguous = state.prompt.store
    slots, turned = state.positions.shape[2], at_positions(state)
    budget = slots - options.every
    is_full = store.length == slots

    def move(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, k, v, positions = carry
        held = state.prompt._replace(store=store._replace(spec=turned, k=k, v=v))
        chosen = best(options, held, budget)

        def fill(old: Array) -> Array:
            first = old[:, :, :budget]
            fresh = buffers.where(is_full, buffers.take(old, chosen), first)
            return lax.dynamic_update_slice_in_dim(old, fresh, 0, axis=2)

        return jnp.bool_(False), *jax.tree.map(fill, (k, v, positions))

    # A loop of one turn or none: what a loop carries is updated in place.
    carry = (is_full.any(), store.k, store.v, state.positions)
    _, k, v, positions = lax.while_loop(lambda carry: carry[0], move, carry)
    left = jnp.where(is_full, budget, store.length)
    is_left = jnp.arange(slots, dtype=jnp.int32) < left[:, None, None]
    return state._replace(
        prompt=state.prompt._replace(store=store._replace(k=k, v=v, length=left)),
        positions=jnp.where(is_left, positions, -1),
    )


def with_spec(prompt: State, spec: CacheSpec) -> State:
    """Returns the method's state with another spec in its store."""
    return prompt._replace(store=prompt.store._replace(spec=spec))


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of full slots, and of their keys, read again to choose."""
    slots = options.small(spec).capacity
    held = min(length, slots)
    spec = kept_slots.spec_of(options.method, spec)
    keys = buffers.row_bytes(spec, held, "keys")
    return Traffic(buffers.kv_bytes(spec, held), -(-keys // options.every))
