"""The decisions of RefreshKV, in decoding and in training: which tokens, and when."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from kvjax.attention.choices import check_choice

Schedule = Literal["fixed", "qc", "never"]
SelfMode = Literal["paper", "snapkv", "drop"]
QcRope = Literal["post", "pre"]
QcBatch = Literal["any", "per_row"]
Eviction = Literal["exact", "none"]  # in training alone
CHOICES = {
    "schedule": Schedule,
    "self_mode": SelfMode,
    "qc_rope": QcRope,
    "qc_batch": QcBatch,
    "eviction": Eviction,
}


def check(
    budget: int, stride: int, kernel: int, max_gap: int | None, **choices: str
) -> None:
    """Raises ValueError for options out of range.

    Args:
        choices: those options of `CHOICES` that the caller has.
    """
    numbers = {"budget": budget, "stride": stride, "kernel": kernel}
    if max_gap is not None:
        numbers["max_gap"] = max_gap
    for name, value in numbers.items():
        if not isinstance(value, int | np.integer):
            raise ValueError(f"{name}={value!r} must be an integer.")
    if budget < 2:
        raise ValueError(
            f"{budget=} must be at least 2 tokens: the current one and one more."
        )
    if choices.get("self_mode") == "snapkv" and budget < 3:
        raise ValueError(
            f"{budget=} must be at least 3 tokens with self_mode='snapkv'."
        )
    if stride < 1:
        raise ValueError(f"{stride=} must be at least 1 step.")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{kernel=} must be odd and at least 1.")
    if max_gap is not None and max_gap < 1:
        raise ValueError(f"{max_gap=} must be at least 1 step, or None.")
    for name, value in choices.items():
        check_choice(name, value, CHOICES[name])


def select(
    logits: Float[Array, "B Hq S"],
    position: Int[Array, "B"],
    num_kv_heads: int,
    *,
    budget: int,
    kernel: int,
    group_reduce: selection.Reduce,
    self_mode: SelfMode,
) -> Int[Array, "B Hkv {budget}"]:
    """Selects the tokens that a query attends to most, the lowest score first.

    Scores are weights, reduced over the query heads of a KV head, then max-pooled over
    `kernel` neighbours; of ties the lower position is better. Slot 0 is the first that
    another token takes: it holds the query's own token if that is not among the others.

    Args:
        logits: of the query, -inf behind it.
        position: of the query; -1 is none.
        num_kv_heads: Hkv.
        budget: slots, of which budget - 1 are chosen.
        kernel: odd width of the pooling.
        group_reduce: `max` or `mean`.
        self_mode: whether the query's own token competes (`paper`), is best
            (`snapkv`) or is left out (`drop`).

    Returns:
        Positions in the order of eviction, -1 = empty.
    """
    # Of the weights, but in the log domain, where small ones stay apart.
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = logits - jnp.where(lse == -jnp.inf, 0.0, lse)
    if group_reduce == "mean":
        scores = jnp.exp(scores)
    scores = selection.reduce_group(scores, num_kv_heads, group_reduce)
    itself = position[:, None, None]
    place = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    is_candidate = place < itself + int(self_mode == "paper")
    is_candidate = jnp.broadcast_to(is_candidate, scores.shape)
    scores = selection.pool(scores, kernel, "max", is_candidate)
    number = num_ranked(budget, self_mode)
    best = selection.top_slots(scores, number, is_candidate)
    return in_order_of_eviction(best, position, budget=budget, self_mode=self_mode)


def num_ranked(budget: int, self_mode: SelfMode) -> int:
    """Counts the tokens of a selection that are there by their scores."""
    return budget - 1 - (self_mode == "snapkv")


def in_order_of_eviction(
    best: Int[Array, "B Hkv K"],
    position: Int[Array, "B"],
    *,
    budget: int,
    self_mode: SelfMode,
) -> Int[Array, "B Hkv {budget}"]:
    """Returns the selection of the tokens that rank highest, as :func:`select` does.

    Args:
        best: as many as :func:`num_ranked`, or all; best first, -1 = none.
        position, budget, self_mode: as of :func:`select`.
    """
    newest = jnp.broadcast_to(position[:, None, None], (*best.shape[:2], 1))
    if self_mode == "snapkv":
        best = jnp.concatenate([newest, best], axis=-1)
    spare = budget - 1 - best.shape[-1]  # of a cache smaller than the budget
    best = jnp.pad(best, ((0, 0), (0, 0), (0, spare)), constant_values=-1)
    is_new = ~(best == newest).any(-1, keepdims=True)
    best = jnp.concatenate([best, jnp.where(is_new, newest, -1)], axis=-1)
    return jnp.flip(best, axis=-1)


def has_turned(
    query: Float[Array, "*B D"],
    reference: Float[Array, "*B D"],
    since: Int[Array, "*B"],
    *,
    threshold: float,
    stride: int,
    max_gap: int,
) -> Bool[Array, "*B"]:
    """Says whether a step that is due must be full under query comparison.

    Args:
        query: mean over heads, of this step.
        reference: of the last full step.
        since: small steps since then.
        threshold: not if the cosine of the two exceeds it,
        stride: of the due steps,
        max_gap: unless the next of them came after more small steps than that.
    """
    cosine = selection.cosine(query, reference)
    # Rounding may take it past 1, which a threshold of 1 must not be exceeded by.
    return ~(jnp.minimum(cosine, 1.0) > threshold) | (since + stride > max_gap)
