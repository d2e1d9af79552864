"""Criticality of blocks of keys to a segment of queries: scores, shares and choice.

Queries and keys are rotated. A segment is spoken for by the extremes of its queries, a
block by those of its keys. Everything is float32, and float64 where the queries are.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection

Score = Literal["midrange", "bound"]


class Segment(NamedTuple):
    """The extremes of a segment's queries, element by element; 0 if there are none."""

    low: Float[Array, "B Hq D"]
    high: Float[Array, "B Hq D"]


def extremes(q: Float[Array, "B Hq M D"], valid: Bool[Array, "B M"]) -> Segment:
    """Returns the extremes of the queries that are `valid`."""
    exact = q.astype(wide(q.dtype))
    real = valid[:, None, :, None]
    some = valid.any(1)[:, None, None]
    low = jnp.where(real, exact, jnp.inf).min(2)
    high = jnp.where(real, exact, -jnp.inf).max(2)
    return Segment(*(jnp.where(some, x, 0.0) for x in (low, high)))


def scores(
    segment: Segment,
    block_min: Float[Array, "B Hkv NB D"],
    block_max: Float[Array, "B Hkv NB D"],
    *,
    score: Score = "midrange",
    group_reduce: selection.Reduce = "mean",
) -> Float[Array, "B Hkv NB"]:
    """Scores every block for every KV head, from the scores of its query heads.

    `midrange` is the larger of two products: of the middle between the queries'
    extremes with the largest key and with the smallest. It bounds nothing. `bound` is
    at least every product of a query of the segment and a key of the block.

    Args:
        segment: extremes of queries.
        block_min, block_max: extremes of keys; of a block without keys anything.
        score: what is scored.
        group_reduce: over the query heads of a KV head.
    """
    batch, num_kv_heads, _, head_dim = block_min.shape
    low, high = (x.reshape(batch, num_kv_heads, -1, head_dim) for x in segment)
    least, most = (x.astype(low.dtype) for x in (block_min, block_max))
    if score == "bound":
        by_head = _bound(low, high, least, most)
    else:
        # The mean of the products with both extremes is that with their mean.
        middle = (low + high) / 2
        by_head = jnp.maximum(*(_products(middle, keys) for keys in (most, least)))
    joined = by_head.reshape(batch, -1, by_head.shape[-1])
    return selection.reduce_group(joined, num_kv_heads, group_reduce)


def _products(
    queries: Float[Array, "B Hkv G D"], keys: Float[Array, "B Hkv NB D"]
) -> Float[Array, "B Hkv G NB"]:
    return jnp.einsum(
        "bkgd,bkjd->bkgj",
        queries,
        keys,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=queries.dtype,
    )


def _bound(
    low: Float[Array, "B Hkv G D"],
    high: Float[Array, "B Hkv G D"],
    least: Float[Array, "B Hkv NB D"],
    most: Float[Array, "B Hkv NB D"],
) -> Float[Array, "B Hkv G NB"]:
    """Sums of the largest of four products, element by element."""

    def one_head(inputs: tuple[Array, ...]) -> Float[Array, "B G NB"]:
        low, high, least, most = inputs  # (B, G, D) and (B, NB, D)
        pairs = [
            query[:, :, None] * keys[:, None]
            for query in (low, high)
            for keys in (least, most)
        ]
        largest = jnp.maximum(jnp.maximum(*pairs[:2]), jnp.maximum(*pairs[2:]))
        return largest.sum(-1)

    by_head = (x.swapaxes(0, 1) for x in (low, high, least, most))
    return lax.map(one_head, tuple(by_head)).swapaxes(0, 1)


def shares(
    scores: Float[Array, "B Hkv NB"], valid: Bool[Array, "B NB"], sm_scale: float
) -> Float[Array, "B Hkv NB"]:
    """Returns the softmax of the scores over the `valid` blocks; 0 at all others.

    It gives heads and layers, whose scores differ in size, one scale to be mixed in.
    """
    valid = valid[:, None]
    logits = jnp.where(valid, sm_scale * scores, -jnp.inf)
    top = logits.max(-1, keepdims=True)
    terms = jnp.where(valid, jnp.exp(logits - jnp.where(valid, top, 0.0)), 0.0)
    total = terms.sum(-1, keepdims=True)
    return terms / jnp.where(total == 0, 1.0, total)


def fused(
    own: Float[Array, "B Hkv NB"], below: Float[Array, "B Hkv NB"], fusion: float
) -> Float[Array, "B Hkv NB"]:
    """Mixes in the layer below's shares, KV head by KV head; all 0 are none."""
    is_there = (below > 0).any(-1, keepdims=True)
    below = below.astype(own.dtype)
    return jnp.where(is_there, fusion * below + (1 - fusion) * own, own)


def choose(
    ranking: Float[Array, "B Hkv NB"], valid: Bool[Array, "B NB"], count: int
) -> Int[Array, "B Hkv K"]:
    """Lists the `count` blocks that rank highest, then -1; ties go to the lower one."""
    return selection.top_slots(ranking, count, valid[:, None])


def wide(dtype: jax.typing.DTypeLike) -> Any:
    """Returns the type that sums of a type are in: float32, of float64 that."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
