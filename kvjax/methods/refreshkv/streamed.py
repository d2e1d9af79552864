"""A step of `refreshkv` whose full cache lies in the host's memory.

A full step brings all of it in blocks, in a loop that other steps take no turn of: no
branch holds a cache. On the device are the small cache, the logits of one chunk of the
text and the tokens that rank highest so far: nothing that grows with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import ranking as ranks
from kvjax.attention import selection
from kvjax.attention.partials import Partial, merge
from kvjax.attention.ranking import Best
from kvjax.methods.refreshkv import policy
from kvjax.stores import counting, hosted
from kvjax.stores.offloaded import Streamed
from pallas_kernels.decode_attention import decode_attention, decode_logits
from pallas_kernels.decode_attention.reference import BLOCK
from pallas_kernels.shared.quantized import Rows

CHUNK = 16 * BLOCK  # tokens whose logits are there at once


class Ranking(NamedTuple):
    """The selection of a full step: as :func:`policy.select` makes it of all logits."""

    budget: int
    kernel: int
    group_reduce: selection.Reduce
    self_mode: policy.SelfMode

    def none_yet(self, batch: int, rows: int, slots: int) -> Best:
        """Makes the best of no scores, of so many rows."""
        most = min(policy.num_ranked(self.budget, self.self_mode), slots)
        return ranks.none_yet(batch, rows, most, self.kernel)


class Whole(NamedTuple):
    """Attention of a step to every token, as far as it is full."""

    part: Partial  # of nothing, unless values were read
    lse: Float[Array, "B Hq"]  # of the logits
    best: Best | None  # tokens by each query head's logits, if they are to be selected


def over_parts(
    unit: int,
    slots: int,
    tokens: Int[Array, ""],
    take: Callable[[Any, int, Any], Any],
    carry: Any,
) -> Any:
    """Calls `carry = take(start, size, carry)` for parts of a buffer, in turn.

    Args:
        unit: slots of a part; what is left of the buffer is one too.
        slots: of the buffer.
        tokens: parts that begin behind so many are passed over.
    """
    size = min(unit, slots)
    number = jnp.minimum((tokens + size - 1) // size, slots // size)
    carry = lax.fori_loop(
        jnp.int32(0), number, lambda i, found: take(i * size, size, found), carry
    )
    if rest := slots % size:
        start = jnp.int32(slots - rest)
        turns = (tokens > start).astype(jnp.int32)
        carry = lax.fori_loop(
            jnp.int32(0), turns, lambda _, found: take(start, rest, found), carry
        )
    return carry


def attend(
    k: Streamed,
    v: Streamed,
    q: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    is_full: Bool[Array, ""],
    *,
    sm_scale: float,
    with_values: bool,
    ranking: Ranking | None,
) -> tuple[Streamed, Streamed, Whole]:
    """Attends from rotated queries to all tokens, if the step is full, by blocks.

    Args:
        with_values: False reads keys alone, for their logits.
        ranking: ranks tokens for it, where that goes by the highest of a group.

    Returns:
        Keys and values with what was moved counted; the attention.
    """
    slots, (batch, heads) = k.shape[2], q.shape[:2]
    wide = jnp.float32
    best = None
    if ranking is not None and ranking.group_reduce == "max":
        best = ranking.none_yet(batch, heads, slots)
    nothing = jnp.full((batch, heads), -jnp.inf, wide)
    part = Partial(jnp.zeros(q.shape, wide), nothing[..., None])
    tokens = jnp.where(is_full, positions.max() + 1, 0)

    def chunk(start: Int[Array, ""], size: int, whole: Whole) -> Whole:
        def block(
            first: Int[Array, ""], size: int, carry: tuple[Partial, Array]
        ) -> tuple[Partial, Array]:
            part, logits = carry
            held = (start + first + jnp.arange(size, dtype=jnp.int32))[None, None]
            keys = hosted.block(k.host, start + first, size)
            if with_values:
                values = hosted.block(v.host, start + first, size)
                out, lse, found = decode_attention(
                    *(q, keys, values, positions, held),
                    sm_scale=sm_scale,
                    with_logits=True,
                )
                part = merge(part, Partial(out, lse))
            else:
                found = decode_logits(q, keys, positions, held, sm_scale=sm_scale)
            where = hosted.at(0, 0, first, 3)
            return part, lax.dynamic_update_slice(logits, found[:, :, 0], where)

        logits = jnp.full((batch, heads, size), -jnp.inf, wide)
        part, logits = over_parts(
            BLOCK, size, tokens - start, block, (whole.part, logits)
        )
        lse = jnp.logaddexp(whole.lse, jax.nn.logsumexp(logits, axis=-1))
        best = whole.best
        if best is not None and ranking is not None:
            end = end_of_candidates(ranking, positions)
            candidates = only_candidates(logits, start, end)
            best = ranks.add(best, candidates, start, end)
        return Whole(part, lse, best)

    whole = over_parts(CHUNK, slots, tokens, chunk, Whole(part, nothing, best))
    moved = reach(BLOCK, tokens, slots)
    k = counted(k, moved)
    v = counted(v, moved if with_values else jnp.zeros_like(moved))
    return k, v, whole


def reach(unit: int, tokens: Int[Array, ""], slots: int) -> Int[Array, ""]:
    """Returns where the parts end that the first `tokens` of a buffer lie in."""
    size = min(unit, slots)
    return jnp.minimum((tokens + size - 1) // size * size, slots)


def end_of_candidates(
    ranking: Ranking, positions: Int[Array, "B 1"]
) -> Int[Array, "B"]:
    """Returns the position from which on no token can be selected."""
    return positions[:, 0] + int(ranking.self_mode == "paper")


def only_candidates(
    scores: Float[Array, "B H N"], start: int | Int[Array, ""], end: Int[Array, "B"]
) -> Float[Array, "B H N"]:
    """Returns scores from position `start` on, -inf from `end` on."""
    place = start + jnp.arange(scores.shape[-1], dtype=jnp.int32)
    return jnp.where(place < end[:, None, None], scores, -jnp.inf)


def select(
    k: Streamed,
    q: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    is_full: Bool[Array, ""],
    whole: Whole,
    kept: Int[Array, "B Hkv N"],
    *,
    ranking: Ranking,
    sm_scale: float,
) -> tuple[Streamed, Int[Array, "B Hkv N"]]:
    """Selects the tokens of a full step, as :func:`policy.select` does of all logits.

    The highest of a group's scores rank as the logits of its heads do, which were
    ranked while they were there: a tie that only rounding makes may fall otherwise. For
    the mean of weights keys come once more, when their sums are known.

    Args:
        kept: what is selected if the step is not full.

    Returns:
        Keys with what was moved counted; positions in the order of eviction.
    """
    slots, heads = k.shape[2], k.shape[1]
    tokens = jnp.where(is_full, positions.max() + 1, 0)
    end = end_of_candidates(ranking, positions)
    offset = jnp.where(whole.lse == -jnp.inf, 0.0, whole.lse)[..., None]

    def block(start: Int[Array, ""], size: int, best: Best) -> Best:
        held = (start + jnp.arange(size, dtype=jnp.int32))[None, None]
        keys = hosted.block(k.host, start, size)
        logits = decode_logits(q, keys, positions, held, sm_scale=sm_scale)
        weights = jnp.exp(logits[:, :, 0] - offset)
        scores = selection.reduce_group(weights, heads, ranking.group_reduce)
        return ranks.add(best, only_candidates(scores, start, end), start, end)

    unit, best = CHUNK, whole.best
    if best is None:
        unit, best = BLOCK, ranking.none_yet(k.shape[0], heads, slots)
        best = over_parts(unit, slots, tokens, block, best)
        k = counted(k, reach(unit, tokens, slots))
    by_head = whole.best is not None

    def select_best() -> Int[Array, "B Hkv N"]:
        found = ranks.ended(best, reach(unit, tokens, slots), end)
        chosen = found.positions
        if by_head:
            chosen = ranks.of_groups(found.scores - offset, chosen, heads)
        return policy.in_order_of_eviction(
            chosen,
            positions[:, 0],
            budget=ranking.budget,
            self_mode=ranking.self_mode,
        )

    return k, lax.cond(is_full, select_best, lambda: kept)


def counted(rows: Streamed, tokens: Int[Array, "*B"]) -> Streamed:
    """Returns rows of which so many tokens of each row were moved."""
    asked, moved = (counting.add(x, tokens) for x in (rows.asked, rows.moved))
    return rows._replace(asked=asked, moved=moved)


def refill(
    rows: Streamed,
    ring: Float[Rows, "B Hkv N D"],
    chosen: Int[Array, "B Hkv N"],
    full: Bool[Array, "B"],
) -> tuple[Streamed, Any]:
    """Brings chosen tokens into the small cache of `full` rows, each with its page.

    Of an empty place, -1, the first token comes, which nothing attends to there.

    Returns:
        The rows with these counted, and the small cache.
    """
    heads, size, page_size = *chosen.shape[1:], rows.page_size
    position = jnp.maximum(chosen, 0).reshape(-1)
    is_moved = jnp.broadcast_to(full[:, None, None], chosen.shape).reshape(-1)
    which, count = hosted.which(is_moved)

    def one(i: Int[Array, ""], ring: Rows) -> Any:
        entry = which[i]
        b, h, n = entry // (heads * size), entry // size % heads, entry % size

        def move(ring: Array, host: Array) -> Array:
            page, place = jnp.divmod(position[entry], page_size)
            found = hosted.take_pages(host, b, h, page, page_size, heads=1)
            row = lax.dynamic_slice_in_dim(hosted.to_device(found), place, 1, 2)
            return lax.dynamic_update_slice(ring, row, hosted.at(b, h, n, ring.ndim))

        return jax.tree.map(move, ring, rows.host.rows)

    filled = lax.fori_loop(jnp.int32(0), count, one, ring)
    return counted(rows, jnp.where(full, jnp.int32(size * page_size), 0)), filled


# Of a rotated query, as `small_step` of the method: output, log-sum-exp, positions.
Attended = tuple[
    Float[Array, "B Hq 1 D"], Float[Array, "B Hq 1"], Int[Array, "B Hkv N"]
]


def step(
    state: Any,
    rotated: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    full: Bool[Array, "B"],
    *,
    ranking: Ranking | None,
    small_step: Callable[..., Attended],
    full_attend: bool,
) -> tuple[Any, Attended]:
    """Takes a step: `full` rows read everything, and refill their small cache.

    Args:
        state: a `RefreshKVState`.
        ranking: the selection; None leaves the small cache as it is.
        small_step: attends to the small cache of a state.
        full_attend: False attends to the refilled small cache in full rows.

    Returns:
        The state, and what was attended to; its positions are of the small cache.
    """
    store, by_row = state.store, full[:, None, None]
    inputs = rotated, positions, full.any()
    small = small_step(state, rotated, positions)
    k, v, whole = attend(
        store.k,
        store.v,
        *inputs,
        sm_scale=store.spec.sm_scale,
        with_values=full_attend,
        ranking=ranking,
    )
    chosen = state.positions
    if ranking is not None:
        k, found = select(
            *(k, *inputs, whole, chosen),
            ranking=ranking,
            sm_scale=store.spec.sm_scale,
        )
        chosen = jnp.where(by_row, found, chosen)
        k, ring_k = refill(k, state.k, chosen, full)
        v, ring_v = refill(v, state.v, chosen, full)
        state = state._replace(
            k=ring_k,
            v=ring_v,
            positions=chosen,
            since=jnp.where(full, 0, state.since),
        )
    state = state._replace(store=store._replace(k=k, v=v))
    out, lse = whole.part
    if not full_attend:
        out, lse, _ = small_step(state, rotated, positions)
    out = jnp.where(by_row[..., None], out, small[0])
    return state, (out, jnp.where(by_row, lse, small[1]), chosen)
