"""The parts that most methods share: an exact prefill, and the end of a step."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.partials import Partial, merge
from kvjax.interface import CacheSpec, Diagnostics, State
from kvjax.stores import buffers, contiguous, kept_slots, slots_or_pages
from kvjax.stores.slots_or_pages import AnyStore
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shared.quantized import as_stored


class Chunk(NamedTuple):
    """A chunk of the prompt once it is read: its queries, and what they attended to."""

    rotated: Float[Array, "B Hq T D"]
    positions: Int[Array, "B T"]  # of padding too, behind the last token's
    out: Float[Array, "B Hq T D"]  # attention to every token so far, in q's dtype
    lse: Float[Array, "B Hq T"]


def read_chunk(
    store: AnyStore,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[AnyStore, Chunk]:
    """Writes a chunk of the prompt, then attends from it to every token so far.

    Args:
        store: with the tokens before.
        q, k, v, lengths: as :class:`kvjax.interface.PrefillFn`.
    """
    store = slots_or_pages.extend(store, k, v, lengths)
    rotated, positions = contiguous.rotate_queries(store.spec, q, store.length, lengths)
    out, lse = slots_or_pages.attend_all(store, rotated, positions)
    return store, Chunk(rotated, positions, out.astype(q.dtype), lse)


def prefill(
    state: AnyStore,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[AnyStore, Float[Array, "B Hq T D"]]:
    """The `prefill` of a method whose state is its store: exact attention."""
    state, chunk = read_chunk(state, q, k, v, lengths)
    return state, chunk.out


def read_again(
    store: contiguous.Contiguous,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> Chunk:
    """Attends from a chunk behind the prompt to all of it and to itself, causally.

    The store stays as it is; see :class:`kvjax.interface.Rereading`.

    Returns:
        The chunk, whose `positions` say how much of the store a token sees: that of the
        prompt's last token, and -1 for padding.

    Raises:
        ValueError: for attention that does not merge.
    """
    spec = store.spec
    if spec.alpha != 1:
        raise ValueError(
            f"a prompt is read again under softmax attention, not alpha={spec.alpha}."
        )
    rows = q.shape[2]
    positions, valid = buffers.chunk_positions(store.length, lengths, rows)
    length = store.length + lengths
    rotated = spec.rope(q, positions, length)
    keys = as_stored(store.k, spec.rope(k, positions, length))
    values = as_stored(store.v, v)
    last = jnp.where(valid, store.length[:, None] - 1, -1)
    own = jnp.where(valid, jnp.arange(rows, dtype=jnp.int32), -1)
    out, lse = merge(
        *(
            Partial(*decode_attention(rotated, *kv, at, sm_scale=spec.sm_scale))
            for kv, at in (((store.k, store.v), last), ((keys, values), own))
        )
    )
    return Chunk(rotated, last, out.astype(q.dtype), lse)


def finish_unchanged(state: State) -> State:
    """The `finish` of a method that goes on with what the prompt left."""
    return state


def diagnose(
    attended: Int[Array, "B H N"],
    lse: Float[Array, "B Hq T"],
    length: Int[Array, "B"],
    rotated_anew: CacheSpec | None = None,
) -> Diagnostics:
    """The diagnostics of a step that is exact where it attended to every token.

    For methods with no better proof. `refreshed` are rows where all heads did.

    Args:
        attended: distinct positions, -1 = none; H divides Hq.
        lse: log-sum-exp of their logits.
        length: tokens so far.
        rotated_anew: the layer's spec, from methods that rotate keys when they are
            read: attention over every token is exact only where that gives the keys
            :func:`kvjax.full` keeps; see :func:`kvjax.stores.kept_slots.turns_alike`.
    """
    exact = kept_slots.holds_all(attended, length, lse.shape[1])
    whole = exact.all(-1)
    if rotated_anew is not None:
        exact &= kept_slots.turns_alike(rotated_anew, length)
    return Diagnostics(attended, lse, whole, exact)
