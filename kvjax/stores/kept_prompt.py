"""The best tokens of a prompt, chosen once at its end, and every token after it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.interface import CacheSpec, Diagnostics, ImportanceFn, State, Traffic
from kvjax.stores import buffers, contiguous, kept_slots, step
from kvjax.stores.kept_slots import Kept
from pallas_kernels.decode_attention import decode_attention


class Prompt(NamedTuple):
    """The state of a method that scores by keys and values alone, while it reads."""

    store: contiguous.Contiguous


def init(spec: CacheSpec, weights: Any = None) -> Prompt:
    """Makes a store of the whole prompt."""
    del weights
    return Prompt(contiguous.contiguous(spec))


def prefill(
    state: Prompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Prompt, Float[Array, "B Hq T D"]]:
    """Attends to everything."""
    store, out = step.prefill(state.store, q, k, v, lengths)
    return Prompt(store), out


def with_certain(
    scores: Float[Array, "B H S"],
    length: Int[Array, "B"],
    *,
    num_sinks: int = 0,
    window: int = 0,
) -> Float[Array, "B H S"]:
    """Marks scores as :class:`kvjax.interface.ImportanceFn` wants them.

    +inf for the first `num_sinks` and the last `window` of `length` tokens, -inf for
    what is no token.
    """
    slots = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    end = length[:, None, None]
    is_certain = (slots < num_sinks) | (slots >= end - window)
    scores = jnp.where(is_certain, jnp.inf, scores)
    return jnp.where(slots < end, scores, -jnp.inf)


def finish(importance: ImportanceFn, budget: int, state: State) -> Kept:
    """Keeps the `budget` most important tokens of each KV head.

    Args:
        state: before; its `store` holds the prompt.
    """
    store = state.store
    slots = jnp.arange(store.spec.capacity, dtype=jnp.int32)
    is_held = slots < store.length[:, None, None]
    kept = selection.top_slots(importance(state), budget, is_held)
    spare = store.spec.max_new_tokens
    return kept_slots.take(store, selection.in_order(kept), spare=spare)


def append(
    state: Kept, k: Float[Array, "B Hkv 1 D"], v: Float[Array, "B Hkv 1 D"]
) -> Kept:
    """Writes the next token into the first spare slot."""
    slot = kept_slots.num_kept(state)[:, None]
    slots = jnp.broadcast_to(slot, (slot.shape[0], state.positions.shape[1]))
    return kept_slots.write(state, slots, k, v)


def inspect_step(
    state: Kept, q: Float[Array, "B Hq 1 D"]
) -> tuple[Kept, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to all that is kept."""
    rotated, positions = contiguous.rotate_queries(state.spec, q, state.length)
    out, lse = decode_attention(
        rotated,
        state.k,
        state.v,
        positions,
        state.positions,
        sm_scale=state.spec.sm_scale,
    )
    diagnostics = step.diagnose(state.positions, lse, state.length)
    return state, out.astype(q.dtype), diagnostics


def traffic(budget: int, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    kept = min(length, budget + spec.max_new_tokens)
    positions = spec.batch * spec.num_kv_heads * kept
    metadata = positions * jnp.dtype(jnp.int32).itemsize
    return Traffic(kv=buffers.kv_bytes(spec, kept), metadata=metadata)
