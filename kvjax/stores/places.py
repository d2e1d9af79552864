"""Tokens whose positions are their places in the cache: 0, 1, 2, ... whatever was cut.

While tokens are still cut, keys are kept un-rotated, and rotated whenever they are
read: turned in place again and again, they would lose a little at every cut.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import heads, selection
from kvjax.attention.partials import Partial
from kvjax.interface import CacheSpec
from kvjax.stores import buffers
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.received_attention import received_attention


class Places(NamedTuple):
    """The tokens of a row in its first slots, in the order of the text."""

    k: Float[Array, "B Hkv N D"]  # un-rotated; the one in slot s is at position s
    v: Float[Array, "B Hkv N D"]
    positions: Int[Array, "B 1 N"]  # in the text, -1 = empty


class Settled(NamedTuple):
    """The same once nothing is cut any more: new tokens go behind the others."""

    spec: CacheSpec
    k: Float[Array, "B Hkv S D"]  # rotated at their slots
    v: Float[Array, "B Hkv S D"]
    positions: Int[Array, "B 1 S"]  # in the text, -1 = empty
    used: Int[Array, "B"]  # slots
    length: Int[Array, "B"]  # tokens of the text so far


class Behind(NamedTuple):
    """The attention of tokens that come behind the places, to these and each other."""

    out: Float[Array, "B Hq T D"]
    lse: Float[Array, "B Hq T"]
    rotated: Float[Array, "B Hq T D"]  # queries
    keys: Float[Array, "B Hkv N D"]  # of the places, rotated
    at: Int[Array, "B T"]  # positions of the queries, -1 = padding


def empty(spec: CacheSpec, slots: int) -> Places:
    """Makes room for so many tokens a row."""
    shape = (spec.batch, spec.num_kv_heads, slots, spec.head_dim)
    return Places(
        buffers.allocate(shape, spec.dtype),
        buffers.allocate(shape, spec.dtype),
        jnp.full((spec.batch, 1, slots), -1, jnp.int32),
    )


def num_held(positions: Int[Array, "B 1 N"]) -> Int[Array, "B"]:
    """Counts the tokens of each row: those of the first slots."""
    return (positions[:, 0] >= 0).sum(-1, dtype=jnp.int32)


def held_slots(positions: Int[Array, "B 1 N"]) -> Int[Array, "B 1 N"]:
    """Returns the number of every slot, which is its token's position; -1 = empty."""
    slots = jnp.arange(positions.shape[-1], dtype=jnp.int32)
    return jnp.where(positions >= 0, slots, -1)


def cut(
    places: Places,
    scores: Float[Array, "B 1 N"],
    most: int,
    is_due: Bool[Array, "B"],
) -> Places:
    """Keeps the `most` highest-scored tokens of each row that is due, in order.

    All heads keep the same; among equal scores the earlier token wins.
    """
    slots = places.positions.shape[-1]
    best = selection.top_slots(scores, min(most, slots), places.positions >= 0)
    free = jnp.full((*best.shape[:2], slots - best.shape[2]), -1, jnp.int32)
    kept = jnp.concatenate([selection.in_order(best), free], axis=2)
    moved = jnp.take_along_axis(places.positions, jnp.maximum(kept, 0), axis=2)
    chosen = Places(
        buffers.gather(places.k, kept),
        buffers.gather(places.v, kept),
        jnp.where(kept < 0, -1, moved),
    )
    return buffers.where(is_due, chosen, places)


def join(
    places: Places,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    first: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Places:
    """Puts the first `count` of new tokens behind those of each row.

    Args:
        places: with room for them.
        k, v: of the new tokens, keys un-rotated.
        first: position in the text of the first.
        count: of each row.
    """
    held = num_held(places.positions)
    new = first[:, None, None] + jnp.arange(k.shape[2], dtype=jnp.int32)
    return Places(
        buffers.write_run(places.k, k, held, count),
        buffers.write_run(places.v, v, held, count),
        buffers.write_run(places.positions, new, held, count),
    )


def attend(
    spec: CacheSpec,
    places: Places,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv C D"],
    v: Float[Array, "B Hkv C D"],
    before: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Behind:
    """Attends from tokens behind the places, causally, to these and to each other.

    Args:
        spec: of the layer.
        places: as far as they are held.
        q: of the new tokens `before`, `before + 1`, ..., un-rotated.
        k, v: of all new tokens, keys un-rotated; the first is at the position behind
            the last place.
        before: new tokens before the first query.
        count: queries that are real.
    """
    held = num_held(places.positions)
    slots = jnp.arange(places.k.shape[2], dtype=jnp.int32)
    slots = jnp.broadcast_to(slots, (q.shape[0], places.k.shape[2]))
    keys = spec.rope(places.k, slots)
    number = jnp.arange(k.shape[2], dtype=jnp.int32)
    new = held[:, None] + number
    is_there = number < (before + count)[:, None]
    fresh = spec.rope(k.astype(keys.dtype), new)
    row = jnp.arange(q.shape[2], dtype=jnp.int32)
    position = (held + before)[:, None] + row
    rotated, at = (
        spec.rope(q, position),
        jnp.where(row < count[:, None], position, -1),
    )
    key_positions = [held_slots(places.positions)[:, 0], jnp.where(is_there, new, -1)]
    out, lse = decode_attention(
        rotated,
        jnp.concatenate([keys, fresh], axis=2),
        jnp.concatenate([places.v, v.astype(places.v.dtype)], axis=2),
        at,
        jnp.concatenate(key_positions, axis=1)[:, None],
        sm_scale=spec.sm_scale,
    )
    return Behind(out, lse, rotated, keys, at)


def received(spec: CacheSpec, places: Places, behind: Behind) -> Float[Array, "B 1 N"]:
    """Returns the weights of each place, of every real query, averaged over heads."""
    weights = received_attention(
        behind.rotated,
        behind.keys,
        behind.lse,
        behind.at,
        held_slots(places.positions),
        sm_scale=spec.sm_scale,
        group_reduce="mean",
    )
    return heads.mean(spec, weights)[:, None]


def settle(
    spec: CacheSpec, places: Places, length: Int[Array, "B"], slots: int
) -> Settled:
    """Rotates keys at their places, once, with free slots behind up to `slots`."""
    batch, heads, held, size = places.k.shape
    number = jnp.arange(held, dtype=jnp.int32)
    keys = spec.rope(places.k, jnp.broadcast_to(number, (batch, held)))
    spare = buffers.allocate((batch, heads, slots - held, size), places.k.dtype)
    free = jnp.full((batch, 1, slots - held), -1, jnp.int32)
    return Settled(
        spec,
        jnp.concatenate([keys, spare], axis=2),
        jnp.concatenate([places.v, spare], axis=2),
        jnp.concatenate([places.positions, free], axis=2),
        num_held(places.positions),
        length,
    )


def extend(
    settled: Settled,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None = None,
) -> Settled:
    """Writes the next tokens of each row into its free slots; None means all T."""
    at, valid = buffers.chunk_positions(settled.used, lengths, k.shape[2])
    count = valid.sum(-1, dtype=jnp.int32)
    position, _ = buffers.chunk_positions(settled.length, lengths, k.shape[2])
    keys = settled.spec.rope(k, at)
    return settled._replace(
        k=buffers.write_run(settled.k, keys, settled.used, count),
        v=buffers.write_run(settled.v, v, settled.used, count),
        positions=buffers.write_run(
            settled.positions, position[:, None], settled.used, count
        ),
        used=settled.used + count,
        length=settled.length + count,
    )


def attend_settled(
    settled: Settled,
    q: Float[Array, "B Hq T D"],
    lengths: Int[Array, "B"] | None = None,
) -> Partial:
    """Attends causally from the newest tokens, which are in it, to all it holds."""
    spec, rows = settled.spec, q.shape[2]
    fresh = rows if lengths is None else lengths
    first = (settled.used - fresh)[:, None]
    row = jnp.arange(rows, dtype=jnp.int32)
    at = first + row
    if lengths is not None:
        at = jnp.where(row < lengths[:, None], at, -1)
    rotated = spec.rope(q, first + row)
    return Partial(
        *decode_attention(rotated, settled.k, settled.v, at, sm_scale=spec.sm_scale)
    )
