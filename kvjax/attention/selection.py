"""From scores to kept slots: reductions over heads and queries, pooling, top-k."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import choices
from pallas_kernels import topk

Reduce = Literal["mean", "max"]

_REDUCE = {"mean": jnp.mean, "max": jnp.max}


def check_reduce(**options: str) -> None:
    """Raises unless every option is a :data:`Reduce`."""
    for name, value in options.items():
        choices.check_choice(name, value, Reduce)


def reduce_group(scores: Array, num_kv_heads: int, how: Reduce) -> Array:
    """Reduces `(B, Hq, ...)` to `(B, Hkv, ...)`: one score a group of heads."""
    batch, num_q_heads, *rest = scores.shape
    group = num_q_heads // num_kv_heads
    return _REDUCE[how](scores.reshape(batch, num_kv_heads, group, *rest), axis=2)


def top_slots(
    scores: Float[Array, "*B S"], k: int, valid: Bool[Array, "*#B S"]
) -> Int[Array, "*B k"]:
    """Returns the slots of the k highest valid scores, best first, then -1.

    Ties go to the lower slot; a score of -inf is not valid.
    """
    return topk.top_k(scores, min(k, scores.shape[-1]), where=valid)[1]


def cosine(
    query: Float[Array, "*B D"], reference: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """The cosine between two vectors, in float32; 0 where one of them is 0."""
    query, reference = (x.astype(jnp.float32) for x in (query, reference))
    norms = jnp.linalg.norm(query, axis=-1) * jnp.linalg.norm(reference, axis=-1)
    tiny = jnp.finfo(jnp.float32).tiny
    return (query * reference).sum(-1) / jnp.maximum(norms, tiny)


def in_order(positions: Int[Array, "*B N"]) -> Int[Array, "*B N"]:
    """Sorts positions, the empty ones (-1) last."""
    last = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(positions < 0, last, positions), axis=-1)
    return jnp.where(ordered == last, -1, ordered)


def pool(
    scores: Float[Array, "B H S"], kernel: int, how: Reduce, valid: Bool[Array, "B H S"]
) -> Float[Array, "B H S"]:
    """Pools each slot with its neighbours, stride 1, over the valid ones.

    `max` ignores what is not valid; `mean` counts it as 0 and always divides by kernel.
    """
    pad = kernel // 2
    window, strides = (1, 1, kernel), (1, 1, 1)
    padding = ((0, 0), (0, 0), (pad, pad))
    if how == "max":
        scores = jnp.where(valid, scores, -jnp.inf)
        return lax.reduce_window(scores, -jnp.inf, lax.max, window, strides, padding)
    scores = jnp.where(valid, scores, 0.0)
    return lax.reduce_window(scores, 0.0, lax.add, window, strides, padding) / kernel


def lowest(
    scores: Float[Array, "B H N"],
    positions: Int[Array, "B H N"],
    candidates: Bool[Array, "B H N"],
) -> Int[Array, "B H"]:
    """Returns the candidate's slot of lowest score; ties go to the lower position."""
    scores = jnp.where(candidates, scores, jnp.inf)
    is_lowest = candidates & (scores == scores.min(-1, keepdims=True))
    last = jnp.iinfo(jnp.int32).max
    return jnp.where(is_lowest, positions, last).argmin(-1).astype(jnp.int32)


def is_listed(page_ids: Int[Array, "B H K"], num_pages: int) -> Bool[Array, "B H NP"]:
    """Says of every page whether a list has it."""
    listed = jnp.where(page_ids < 0, num_pages, page_ids)

    def mark(listed: Int[Array, "K"]) -> Bool[Array, "NP"]:
        return jnp.zeros(num_pages, bool).at[listed].set(True, mode="drop")

    return jax.vmap(jax.vmap(mark))(listed)
