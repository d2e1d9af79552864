"""A cascade of rings in closed form: which slot takes which token, and who wins.

Ring i takes what ring i - 1 expels, but only at every L_i-th token; at other times what
comes meets the ring's newest entry and the higher score stays. So counts, slots and
positions follow from the number of tokens alone, the same for all heads; only who wins
depends on data. Symbols are those of the closed form: t counts tokens after the sinks,
P_i(n) pushes into ring i among the first n of them, W slots a ring, N rings, C = N W.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

HeadReduce = Literal["mean", "max", "median"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a cascade, and when its rings take what comes.

    Attributes:
        num_sinks: first tokens, which never leave.
        num_rings: N.
        width: W, slots of a ring.
        eager_fill: as long as there is room everything is taken, and nothing meets.
        periods: r_i of each ring, r_0 = 1; none given means 1, 2, 4, 8, ...
    """

    num_sinks: int
    num_rings: int
    width: int
    eager_fill: bool = True
    periods: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_rings", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_sinks < 0:
            raise ValueError(f"num_sinks={self.num_sinks} must be at least 0.")
        if not self.periods:
            doubled = tuple(2**i for i in range(self.num_rings))
            object.__setattr__(self, "periods", doubled)
        if len(self.periods) != self.num_rings or self.periods[0] != 1:
            raise ValueError(
                f"periods={self.periods} must be num_rings={self.num_rings} numbers, "
                "the first of them 1."
            )

    @property
    def window(self) -> int:
        """The number of slots of all rings, C."""
        return self.num_rings * self.width

    @property
    def steps(self) -> tuple[int, ...]:
        """The L_i = lcm(r_0 .. r_i): what comes to ring i enters when L_i divides t."""
        return tuple(math.lcm(*self.periods[: i + 1]) for i in range(self.num_rings))

    @property
    def firsts(self) -> tuple[int, ...]:
        """The tau_i: the t at which ring i gets its first entry, without eager fill."""
        firsts = [0]
        for step in self.steps[:-1]:
            firsts.append((firsts[-1] // step + self.width) * step)
        return tuple(firsts)

    def num_held(self, seen: int) -> int:
        """Tokens held after `seen`, sinks included: as :func:`layout` says."""
        n = max(seen - self.num_sinks, 0)
        if self.eager_fill:
            return seen - n + min(n, self.window)
        pushed = [
            0 if n <= first else 1 + (n - 1) // step - first // step
            for first, step in zip(self.firsts, self.steps, strict=True)
        ]
        return seen - n + sum(min(count, self.width) for count in pushed)


def pushes(
    plan: Plan, ring: int | Int[Array, ""], n: Int[Array, "*B"]
) -> Int[Array, "*B"]:
    """Counts P_i(n), entries pushed into ring i by the first `n` tokens after sinks."""
    step, first, window = _of_ring(plan, ring)
    if plan.eager_fill:
        filling = jnp.maximum(jnp.minimum(n, window + 1) - ring * plan.width, 0)
        steps = lax.div(jnp.maximum(n - 1, window), step)
        return filling + steps - lax.div(window, step)
    later = lax.div(jnp.maximum(n - 1, 0), step)
    return jnp.where(n <= first, 0, 1 + later - lax.div(first, step))


def push_time(
    plan: Plan, ring: int | Int[Array, ""], push: Int[Array, "*B"]
) -> Int[Array, "*B"]:
    """The t that causes push number `push` (from 0) into ring i."""
    step, first, window = _of_ring(plan, ring)
    if plan.eager_fill:
        last = window + 1 - ring * plan.width
        later = (lax.div(window, step) + 1 + push - last) * step
        return jnp.where(push < last, push + ring * plan.width, later)
    return jnp.where(push == 0, first, (lax.div(first, step) + push) * step)


def _of_ring(
    plan: Plan, ring: int | Int[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Returns L_i, tau_i and C, of a ring that may be traced."""
    step, first = (jnp.array(x, jnp.int32)[ring] for x in (plan.steps, plan.firsts))
    return step, first, jnp.int32(plan.window)


class Layout(NamedTuple):
    """The places of everything after a number of tokens: the same for all heads.

    Positions are those inside the cache: sinks, then the last ring's oldest entry, up
    to the first ring's newest; so they follow the order of the stream.
    """

    sinks: Int[Array, "B"]  # held
    stored: Int[Array, "B N"]  # entries of each ring
    start: Int[Array, "B N"]  # slot of each ring's oldest entry
    base: Int[Array, "B N"]  # position of each ring's oldest entry
    next: Int[Array, "B"]  # position of the token that comes next
    positions: Int[Array, "B C"]  # of each slot's entry, -1 = empty


def layout(plan: Plan, seen: Int[Array, "B"]) -> Layout:
    """The layout after `seen` tokens, sinks included."""
    sinks = jnp.minimum(seen, plan.num_sinks)
    n = jnp.maximum(seen - plan.num_sinks, 0)
    pushed = jnp.stack([pushes(plan, i, n) for i in range(plan.num_rings)], axis=1)
    stored = jnp.minimum(pushed, plan.width)
    width = jnp.int32(plan.width)  # of one type with the indices where 64 bits are on
    start = jnp.where(pushed <= width, 0, lax.rem(pushed, width))
    following = sinks + stored.sum(1, dtype=jnp.int32)
    base = following[:, None] - jnp.cumsum(stored, axis=1, dtype=jnp.int32)
    slot = jnp.arange(plan.width, dtype=jnp.int32)
    rank = lax.rem(slot - start[..., None] + width, width)
    held = jnp.where(slot < stored[..., None], base[..., None] + rank, -1)
    positions = held.reshape(seen.shape[0], plan.window)
    return Layout(sinks, stored, start, base, following, positions)


def sources(
    plan: Plan,
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
    scores: Float[Array, "B H C"],
    new_scores: Float[Array, "B H T"],
) -> Int[Array, "B H C"]:
    """Finds what each slot holds once `count` tokens have gone through the cascade.

    The tokens one by one would give the same: pushes and their times are known, and
    between two pushes the last of the highest scores wins.

    Args:
        plan: see :class:`Plan`.
        seen: tokens before, sinks included.
        count: how many of the T new tokens are real, from the first on.
        scores: of what the slots hold, frozen during the insertion.
        new_scores: of the new tokens.

    Returns:
        For each slot the one whose entry it takes (its own if nothing changes), or C
        plus the number of a new token. Of a slot that stays empty: its own.
    """
    one_row = jax.vmap(
        lambda *row: _sources_of_row(plan, *row), in_axes=(0, 0, 0, 0), out_axes=0
    )
    return one_row(seen, count, scores, new_scores)


# Tokens that come to a ring, in order: which are real, when, their scores and indices.
_Candidates = tuple[
    Bool[Array, "T"], Int[Array, "T"], Float[Array, "H T"], Int[Array, "H T"]
]


def _sources_of_row(
    plan: Plan,
    seen: Int[Array, ""],
    count: Int[Array, ""],
    scores: Float[Array, "H C"],
    new_scores: Float[Array, "H T"],
) -> Int[Array, "H C"]:
    width, window = plan.width, plan.window
    period = jnp.int32(width)  # of one type with the indices where 64 bits are on
    fresh = new_scores.shape[-1]
    order = jnp.arange(fresh, dtype=jnp.int32)
    sinks = jnp.clip(plan.num_sinks - seen, 0, fresh)  # new tokens that are sinks
    before = jnp.maximum(seen - plan.num_sinks, 0)
    after = before + jnp.maximum(count - sinks, 0)
    # Candidates of ring 0, in order: all new tokens but the sinks.
    is_real, time = order < after - before, before + order
    row = jnp.minimum(sinks + order, fresh - 1)
    score = new_scores[:, row]
    index = jnp.broadcast_to(window + row, score.shape)

    def one_ring(
        candidates: _Candidates, i: Int[Array, ""]
    ) -> tuple[_Candidates, Int[Array, "H W"]]:
        is_real, time, score, index = candidates
        a, z = pushes(plan, i, before), pushes(plan, i, after)
        # Candidates between two pushes compete for one entry: group 0 is the entry that
        # was the newest before, group u the u-th new one.
        group = jnp.where(is_real, pushes(plan, i, time + 1) - a, fresh + 1)
        group = jnp.concatenate([jnp.zeros(1, jnp.int32), group])
        newest = i * width + lax.rem(a + width - 1, period)
        opener = jnp.where(a > 0, scores[:, newest], -jnp.inf)[:, None]
        runner = jnp.where(is_real, score, -jnp.inf)
        at = jnp.broadcast_to(newest, opener.shape)
        # Groups are runs already. Sorted within by score, and stable, each ends in the
        # youngest of its highest scores.
        _, best_score, best = lax.sort(
            (
                jnp.broadcast_to(group, (scores.shape[0], fresh + 1)),
                jnp.concatenate([opener, runner], axis=1),
                jnp.concatenate([at, index], axis=1),
            ),
            num_keys=2,
        )
        groups = jnp.arange(fresh + 1, dtype=jnp.int32)
        last = jnp.searchsorted(group, groups, side="right").astype(jnp.int32) - 1
        best_score, best = best_score[:, last], best[:, last]

        slot = jnp.arange(width, dtype=jnp.int32)
        push = (
            z - width + lax.rem(slot + width - lax.rem(z, period), period)
        )  # number of the push that a slot holds
        place = push - (a - 1)
        is_new = (push >= 0) & (place >= 0) & ((a > 0) | (push >= a))
        own = jnp.broadcast_to(i * width + slot, (scores.shape[0], width))
        source = jnp.where(is_new, best[:, jnp.clip(place, 0, fresh)], own)

        # What this ring expels comes to the next one. It was final: an entry leaves
        # by a later push, which ended its group.
        gone = jnp.maximum(a - width, 0) + order
        is_real = gone < z - width
        time = push_time(plan, i, gone + width)
        where = i * width + lax.rem(gone, period)
        was_there = gone < a - 1
        place = jnp.clip(gone - (a - 1), 0, fresh)
        score = jnp.where(was_there, scores[:, where], best_score[:, place])
        index = jnp.where(was_there, where, best[:, place])
        return (is_real, time, score, index), source

    # A loop, not N copies: it is the sort that takes long to compile.
    rings = jnp.arange(plan.num_rings, dtype=jnp.int32)
    _, source = lax.scan(one_ring, (is_real, time, score, index), rings)
    return jnp.moveaxis(source, 0, 1).reshape(scores.shape)


# --- scores


def reduce_heads(
    received: Float[Array, "B Hq S"],
    num_kv_heads: int,
    how: HeadReduce,
    homogeneous: bool = False,
) -> Float[Array, "B Hkv S"]:
    """Reduces to one number a KV head: of its query heads, or of all if `homogeneous`.

    The median of an even number is the lower one.
    """
    batch, num_q_heads, slots = received.shape
    lists = 1 if homogeneous else num_kv_heads
    grouped = received.reshape(batch, lists, num_q_heads // lists, slots)
    if how == "mean":
        reduced = grouped.mean(2)
    elif how == "max":
        reduced = grouped.max(2)
    else:
        reduced = jnp.sort(grouped, axis=2)[:, :, (grouped.shape[2] - 1) // 2]
    return jnp.broadcast_to(reduced, (batch, num_kv_heads, slots))


def decay(beta: float, queries: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Computes beta ** queries in float32, without the rounding of beta itself."""
    return jnp.exp(queries.astype(jnp.float32) * jnp.float32(math.log(beta)))


def ema(
    scores: Float[Array, "B H S"],
    received: Float[Array, "B H S"],
    beta: float,
    queries: Int[Array, "B"],
) -> Float[Array, "B H S"]:
    """Scores after `queries` more of them, which gave `received`.

    Of one query: S <- beta S + p, which is 1 / (1 - beta) times the usual average. Only
    comparisons are ever made, and they are the same.
    """
    return decay(beta, queries)[:, None, None] * scores + received
