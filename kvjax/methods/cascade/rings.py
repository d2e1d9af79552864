"""The rings of a cascade, one layer: tokens go in, queries attend to them.

`kvjax.methods.cascade.schedule` says where everything is. Keys lie rotated by the
number of their slot in its ring, so that none is rotated again while it stays there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial
from kvjax.interface import CacheSpec
from kvjax.methods.cascade.schedule import Plan, decay, layout, pushes, sources
from kvjax.stores import buffers
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.received_attention import received_attention

Rotation = Callable[..., Array]  # see `kvjax.rope.Rope`


class Rings(NamedTuple):
    """The sinks and rings of each row."""

    sink_k: Float[Array, "B Hkv M D"]  # rotated at 0 .. M - 1
    sink_v: Float[Array, "B Hkv M D"]
    k: Float[Array, "B Hkv C D"]  # rotated by the slot's number in its ring
    v: Float[Array, "B Hkv C D"]
    scores: Float[Array, "B Hkv C"]  # running sum of attention received, float32
    tokens: Int[Array, "B Hkv C"]  # absolute positions, -1 = empty
    seen: Int[Array, "B"]  # tokens that went in, sinks included


def empty(plan: Plan, spec: CacheSpec) -> Rings:
    """Makes rings that hold nothing."""
    heads = (spec.batch, spec.num_kv_heads)

    def allocate(slots: int) -> Float[Array, "B Hkv {slots} D"]:
        return buffers.allocate((*heads, slots, spec.head_dim), spec.dtype)

    slots = (*heads, plan.window)
    return Rings(
        allocate(plan.num_sinks),
        allocate(plan.num_sinks),
        allocate(plan.window),
        allocate(plan.window),
        buffers.allocate(slots, jnp.float32, fill=0.0),
        buffers.allocate(slots, jnp.int32, fill=-1.0),
        buffers.lengths(spec),
    )


def rotate_further(
    rope: Rotation, k: Float[Array, "B H T D"], by: Int[Array, "B T"]
) -> Float[Array, "B H T D"]:
    """Rotates rotated keys further; a scale that the rotation has is not applied again.

    In float32. A key turned by 0 keeps every bit.
    """
    unit = jnp.ones((1, 1, 1, k.shape[3]), jnp.float32)
    scale = rope(unit, jnp.zeros((1, 1), jnp.int32))
    turned = (rope(k.astype(jnp.float32), by) / scale).astype(k.dtype)
    return jnp.where(by[:, None, :, None] == 0, k, turned)


@functools.partial(jax.jit, static_argnums=(0, 1))
def insert(
    plan: Plan,
    rope: Rotation,
    rings: Rings,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    new_scores: Float[Array, "B Hkv T"],
    count: Int[Array, "B"],
) -> Rings:
    """Puts the first `count` of T new tokens, keys un-rotated, through the cascade.

    N stages of index work and one gather, whatever T and W are.
    """
    batch, heads, fresh, head_dim = k.shape
    window = plan.window
    src = sources(plan, rings.seen, count, rings.scores, new_scores)

    def gather(old: Array, new: Array) -> Array:
        return buffers.gather(
            jnp.concatenate([old, new.astype(old.dtype)], axis=2), src
        )

    # A slot's number in its ring is the angle of its key. Heads differ in what moved.
    slot = jnp.arange(window, dtype=jnp.int32)
    was_new = src >= window
    angle = slot % plan.width - jnp.where(
        was_new, 0, lax.rem(src, jnp.int32(plan.width))
    )
    moved = gather(rings.k, k)

    def per_head(x: Float[Array, "B Hkv C D"]) -> Float[Array, "BH 1 C D"]:
        return x.reshape(batch * heads, 1, window, head_dim)

    by = angle.reshape(batch * heads, window)
    turned = rotate_further(rope, per_head(moved), by).reshape(moved.shape)
    placed = rope(per_head(moved), by).reshape(moved.shape)
    moved = jnp.where(was_new[..., None], placed, turned)

    tokens = rings.seen[:, None] + jnp.arange(fresh, dtype=jnp.int32)
    tokens = jnp.broadcast_to(tokens[:, None], (batch, heads, fresh))
    result = rings._replace(
        k=moved,
        v=gather(rings.v, v),
        scores=gather(rings.scores, new_scores),
        tokens=gather(rings.tokens, tokens),
        seen=rings.seen + count,
    )
    if not plan.num_sinks:
        return result
    place = jnp.arange(plan.num_sinks, dtype=jnp.int32)
    row = place - rings.seen[:, None]
    is_due = ((row >= 0) & (row < count[:, None]))[:, None, :, None]
    row = jnp.clip(row, 0, fresh - 1)[:, None]
    at = jnp.broadcast_to(place, (batch, plan.num_sinks))
    sink_k = rope(buffers.gather(k, row), at).astype(rings.k.dtype)
    sink_v = buffers.gather(v, row).astype(rings.v.dtype)
    return result._replace(
        sink_k=jnp.where(is_due, sink_k, rings.sink_k),
        sink_v=jnp.where(is_due, sink_v, rings.sink_v),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def insert_one(
    plan: Plan,
    rope: Rotation,
    rings: Rings,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
    new_scores: Float[Array, "B Hkv 1"],
    is_due: Bool[Array, "B"],
) -> Rings:
    """Inserts one token: at most one row a ring is written, in place."""
    t = rings.seen - plan.num_sinks
    n = jnp.maximum(t, 0)
    slots, enters, pushed = [], [], []
    alive = is_due & (t >= 0)
    for i in range(plan.num_rings):
        a = pushes(plan, i, n)
        push = pushes(plan, i, n + 1) > a
        newest = jnp.where(push, a, a + plan.width - 1)
        slots.append(lax.rem(newest, jnp.int32(plan.width)))
        enters.append(alive)
        pushed.append(push)
        alive = alive & push & (a >= plan.width)  # a full ring expels its oldest
    slot, enters = jnp.stack(slots, 1), jnp.stack(enters, 1)
    pushed = jnp.stack(pushed, 1)[:, None]
    at = slot + jnp.arange(plan.num_rings, dtype=jnp.int32) * plan.width

    # What comes to ring i is what ring i - 1 had there.
    def candidates(new: Array, held: Array) -> Array:
        return jnp.concatenate([new.astype(held.dtype), held[:, :, :-1]], axis=2)

    old_k, old_v, old_scores, old_tokens = (
        buffers.gather(x, at[:, None])
        for x in (rings.k, rings.v, rings.scores, rings.tokens)
    )
    token = jnp.broadcast_to(rings.seen[:, None, None], (*k.shape[:2], 1))
    come_scores = candidates(new_scores, old_scores)
    wins = pushed | (come_scores >= old_scores)
    first = rope(k, slot[:, :1]).astype(rings.k.dtype)
    rest = rotate_further(rope, old_k[:, :, :-1], slot[:, 1:] - slot[:, :-1])
    come_k = jnp.concatenate([first, rest], axis=2)
    rows = (
        jnp.where(wins[..., None], come_k, old_k),
        jnp.where(wins[..., None], candidates(v, old_v), old_v),
        jnp.where(wins, come_scores, old_scores),
        jnp.where(wins, candidates(token, old_tokens), old_tokens),
    )
    held = (rings.k, rings.v, rings.scores, rings.tokens)
    k_, v_, scores, tokens = _write_rows(held, rows, at, enters)
    result = rings._replace(
        k=k_,
        v=v_,
        scores=scores,
        tokens=tokens,
        seen=rings.seen + is_due.astype(jnp.int32),
    )
    if not plan.num_sinks:
        return result
    is_sink = (is_due & (t < 0))[:, None]
    place = rings.seen[:, None]
    return result._replace(
        sink_k=buffers.write(rings.sink_k, rope(k, place), place, is_sink),
        sink_v=buffers.write(rings.sink_v, v, place, is_sink),
    )


def _write_rows(
    held: tuple[Array, ...],
    rows: tuple[Array, ...],
    at: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
) -> tuple[Array, ...]:
    """Writes row `(B, H, N, ...)` i of each buffer at slot `at (B, N)`, in place."""
    batch, count = at.shape
    zero = jnp.int32(0)  # of one type with the indices also where 64 bits are on

    def write(index: Int[Array, ""], held: tuple[Array, ...]) -> tuple[Array, ...]:
        index = jnp.asarray(index, jnp.int32)  # which outside of jit has 64 bits
        b, i = index // count, index % count

        def write_one(buffer: Array, rows: Array) -> Array:
            zeros = (zero,) * (rows.ndim - 3)
            shape = (1, rows.shape[1], 1, *rows.shape[3:])
            row = lax.dynamic_slice(rows, (b, zero, i, *zeros), shape)
            return lax.dynamic_update_slice(buffer, row, (b, zero, at[b, i], *zeros))

        def write_all(held: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(write_one(*pair) for pair in zip(held, rows, strict=True))

        return lax.cond(valid[b, i], write_all, lambda x: x, held)

    def scatter() -> tuple[Array, ...]:
        pairs = zip(held, rows, strict=True)
        where = jnp.broadcast_to(at[:, None], rows[2].shape)
        is_due = jnp.broadcast_to(valid[:, None], rows[2].shape)
        return tuple(buffers.write(x, new, where, is_due) for x, new in pairs)

    # As `buffers.write_run`: on CPU a scatter would copy.
    return lax.platform_dependent(
        cpu=lambda: lax.fori_loop(zero, jnp.int32(batch * count), write, held),
        default=scatter,
    )


# --- attention


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("sm_scale", "beta"))
def attend_chunk(
    plan: Plan,
    rope: Rotation,
    rings: Rings,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv K D"],
    v: Float[Array, "B Hkv K D"],
    first: Int[Array, "B"],
    count: Int[Array, "B"],
    *,
    sm_scale: float,
    beta: float | None = None,
) -> tuple[Partial, Float[Array, "B Hq J"] | None]:
    """Tokens that are not in the rings yet attend to the rings and to each other.

    Args:
        plan, rope, rings: as elsewhere.
        q: un-rotated queries of the new tokens `first`, `first + 1`, ...
        k, v: all new tokens since the rings were filled, keys un-rotated.
        first: new tokens before these queries.
        count: how many of the T queries are real.
        sm_scale: factor on the logits.
        beta: decay of the scores; None if nobody asks what was received.

    Returns:
        Output and log-sum-exp of each query, and what the C slots and the K new tokens
        received: sum over the queries of beta ** (count - 1 - query) times the weight.
    """
    rows, fresh = q.shape[2], k.shape[2]
    now = layout(plan, rings.seen)
    # Once a chunk, not once a token: from the slot's angle to the place in the cache.
    angle = jnp.arange(plan.window, dtype=jnp.int32) % plan.width
    held = rotate_further(
        rope, rings.k, jnp.where(now.positions < 0, 0, now.positions - angle)
    )
    place = now.next[:, None] + jnp.arange(fresh, dtype=jnp.int32)
    keys = [rings.sink_k, held, rope(k, place).astype(rings.k.dtype)]
    values = [rings.sink_v, rings.v, v.astype(rings.v.dtype)]
    keys, values = (jnp.concatenate(x, axis=2) for x in (keys, values))

    sink = jnp.arange(plan.num_sinks, dtype=jnp.int32)
    sink = jnp.where(sink < now.sinks[:, None], sink, -1)
    is_there = jnp.arange(fresh, dtype=jnp.int32) < (first + count)[:, None]
    at = [sink, now.positions, jnp.where(is_there, place, -1)]
    at = jnp.concatenate(at, axis=1)[:, None]
    query = jnp.arange(rows, dtype=jnp.int32)
    position = (now.next + first)[:, None] + query
    is_real = query < count[:, None]
    visible = jnp.where(is_real, position, -1)
    rotated = rope(q, position)
    out, lse = decode_attention(rotated, keys, values, visible, at, sm_scale=sm_scale)
    if beta is None:
        return Partial(out, lse), None
    age = jnp.maximum(count[:, None] - 1 - query, 0)
    received = received_attention(
        rotated,
        keys[:, :, plan.num_sinks :],
        lse,
        visible,
        at[..., plan.num_sinks :],
        jnp.where(is_real, decay(beta, age), 0.0),
        sm_scale=sm_scale,
    )
    return Partial(out, lse), received


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="sm_scale")
def attend_one(
    plan: Plan,
    rope: Rotation,
    rings: Rings,
    q: Float[Array, "B Hq 1 D"],
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
    *,
    sm_scale: float,
) -> tuple[Partial, Float[Array, "B Hq C"], Float[Array, "B Hq 1"]]:
    """Attends from a new token to sinks, rings and itself; rotates no key but its own.

    A key in slot s of a ring is rotated by s, while its position is s plus something:
    one number from the ring's oldest entry on, W more for the slots before. So the
    query is rotated twice a ring instead, and each sees its part.

    Returns:
        Output and log-sum-exp; the weights of the C slots, and of the token itself.
    """
    batch, num_q_heads, _, head_dim = q.shape
    num_kv_heads, width, num_rings = k.shape[1], plan.width, plan.num_rings
    group = num_q_heads // num_kv_heads
    now = layout(plan, rings.seen)
    from_start = now.next[:, None] - now.base + now.start  # (B, N)
    offset = jnp.stack([from_start, from_start - width], axis=-1)
    offset = offset.reshape(batch, 2 * num_rings)
    shape = (batch, num_q_heads, 2 * num_rings, head_dim)
    turned = rope(jnp.broadcast_to(q, shape), offset)
    # A ring of a KV head is a KV head of its own: the buffer only changes its name.
    shape = (batch, num_kv_heads, group, num_rings, 2, head_dim)
    turned = turned.reshape(shape).swapaxes(2, 3)
    turned = turned.reshape(batch, num_kv_heads * num_rings * group, 2, head_dim)
    slot = jnp.arange(width, dtype=jnp.int32)
    part = jnp.where(slot >= now.start[..., None], 0, 1)
    part = jnp.where(slot < now.stored[..., None], part, -1)  # (B, N, W)
    part = jnp.tile(part, (1, num_kv_heads, 1))

    def as_heads(x: Float[Array, "B Hkv C D"]) -> Float[Array, "B HN W D"]:
        return x.reshape(batch, num_kv_heads * num_rings, width, head_dim)

    both = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (batch, 2))
    out, lse, logits = decode_attention(
        turned,
        as_heads(rings.k),
        as_heads(rings.v),
        both,
        part,
        sm_scale=sm_scale,
        window=1,  # each row sees its own part
        with_logits=True,
    )

    def by_query_head(x: Array) -> Array:  # (B, Hkv N G, 2, ...) -> (B, Hq, 2 N, ...)
        rest = x.shape[3:]
        x = x.reshape(batch, num_kv_heads, num_rings, group, 2, *rest)
        return x.swapaxes(2, 3).reshape(batch, num_q_heads, 2 * num_rings, *rest)

    sink = jnp.arange(plan.num_sinks, dtype=jnp.int32)
    sink = jnp.where(sink < now.sinks[:, None], sink, -1)
    place = now.next[:, None]
    own = rope(k, place).astype(rings.k.dtype)
    rest = decode_attention(
        rope(q, place),
        jnp.concatenate([rings.sink_k, own], axis=2),
        jnp.concatenate([rings.sink_v, v.astype(rings.v.dtype)], axis=2),
        place,
        jnp.concatenate([sink, place], axis=1)[:, None],
        sm_scale=sm_scale,
        with_logits=True,
    )
    outs = jnp.concatenate([by_query_head(out), rest[0]], axis=2)
    parts = jnp.concatenate([by_query_head(lse), rest[1]], axis=2)
    total = jax.nn.logsumexp(parts, axis=2, keepdims=True)  # the token sees itself
    out = (jnp.exp(parts - total)[..., None] * outs).sum(2, keepdims=True)
    logits = by_query_head(logits).reshape(batch, num_q_heads, num_rings, 2, width)
    weights = jnp.exp(logits.max(3).reshape(batch, num_q_heads, -1) - total)
    return Partial(out, total), weights, jnp.exp(rest[2][..., -1] - total)
