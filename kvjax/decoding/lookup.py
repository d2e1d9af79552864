"""Drafts from the text itself: what followed the last time that it ended as now.

They cost nothing, and hold where a text repeats itself, as code and summaries do.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.decoding.checks import check_counts
from kvjax.registry import specs

NAME = "lookup"
LONGEST = 64  # tokens of a run: each is a comparison of all the text in every pass


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Drafts the tokens behind the newest place that ends in the longest same run.

    Attributes:
        longest: tokens of a run that are looked at.
        least: tokens that must be the same for a draft.
    """

    longest: int = 8
    least: int = 2

    def __post_init__(self) -> None:
        check_counts(longest=self.longest, least=self.least)
        if self.longest > LONGEST:
            raise ValueError(f"longest={self.longest} must be at most {LONGEST}.")
        if self.least > self.longest:
            raise ValueError(
                f"least={self.least} must be at most longest={self.longest}."
            )


def parse(spec: str) -> Lookup | None:
    """Returns what `lookup:longest=8,least=2` says; None for the spec of a method.

    Raises:
        ValueError: for an option that there is none of, or no whole number.
    """
    name, options = specs.split(spec)
    if name != NAME:
        return None
    known = [field.name for field in dataclasses.fields(Lookup)]
    given = {}
    for option in options:
        key, _, value = option.partition("=")
        if key.strip() not in known or not value.strip().isdigit():
            raise ValueError(
                f"{option!r} in {spec!r} must be one of {', '.join(known)} and a whole "
                "number, as least=2."
            )
        if key.strip() in given:
            raise ValueError(f"option {key.strip()!r} is given twice in {spec!r}.")
        given[key.strip()] = int(value)
    return Lookup(**given)


class Text(NamedTuple):
    """The tokens of each row so far, the newest too."""

    tokens: Int[Array | np.ndarray, "B S"]
    length: Int[Array | np.ndarray, "B"]


def begun(prompts: Sequence[Sequence[int]], capacity: int) -> Text:
    """Returns the text of prompts, with room for what follows."""
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Text(tokens, np.array([len(prompt) for prompt in prompts], np.int32))


def with_first(text: Text, tokens: Int[np.ndarray, "B"]) -> Text:
    """Returns the text with the first token behind each prompt."""
    held, length = np.array(text.tokens), np.asarray(text.length)
    held[np.arange(len(held)), length] = tokens
    return Text(held, length + 1)


def extended(text: Text, tokens: Int[Array, "B T"], numbers: Int[Array, "B"]) -> Text:
    """Returns the text with the first `numbers` of these tokens behind it."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    place = text.length[:, None] + index
    place = jnp.where(index < numbers[:, None], place, text.tokens.shape[1])
    rows = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    held = jnp.asarray(text.tokens).at[rows, place].set(tokens, mode="drop")
    return Text(held, text.length + numbers)


def find(
    lookup: Lookup, text: Text, width: int
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Returns up to `width` tokens that followed, and how many there are."""
    tokens, length = jnp.asarray(text.tokens), jnp.asarray(text.length)
    capacity = tokens.shape[1]
    place = jnp.arange(capacity, dtype=jnp.int32)
    same, run = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    for back in range(lookup.longest):
        # A run ends at each place, and at the text's end: both go back together.
        last = jnp.maximum(length - 1 - back, 0)[:, None]
        there = jnp.roll(tokens, back, axis=1)
        is_there = (place >= back) & (back < length[:, None])
        same &= is_there & (there == jnp.take_along_axis(tokens, last, axis=1))
        run += same.astype(jnp.int32)
    # The text's own end is no place before it.
    run = jnp.where(place < (length - 1)[:, None], run, 0)
    best = jnp.argmax(run * capacity + place, axis=1).astype(jnp.int32)
    found = jnp.take_along_axis(run, best[:, None], axis=1)[:, 0]
    index = best[:, None] + 1 + jnp.arange(width, dtype=jnp.int32)
    behind = jnp.take_along_axis(tokens, jnp.minimum(index, capacity - 1), axis=1)
    count = jnp.minimum(length - 1 - best, width)
    return behind, jnp.where(found >= lookup.least, count, 0)


def certain(tokens: Int[Array, "B T"], vocab_size: int) -> Float[Array, "B T V"]:
    """Returns logits of a draft that nothing was drawn for: it could be no other."""
    chosen = jax.nn.one_hot(tokens, vocab_size, dtype=jnp.bool_)
    return jnp.where(chosen, 0.0, -jnp.inf).astype(jnp.float32)
