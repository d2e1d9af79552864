"""A whole model fed token by token under a method: text, and answers that are decoded.

One shape for everything a claim asks, so that a method compiles two programs: one that
reads a chunk of a prompt, and one that takes up to `PIECE` steps.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from kvjax.decoding import finite, reader
from kvjax.decoding.feeding import CHOOSE, Watch, feed
from kvjax.evaluation import compare_runs
from kvjax.interface import LanguageModel, Method

T = TypeVar("T")


@contextlib.contextmanager
def optimised(wanted: bool = True) -> Iterator[None]:
    """Programs that are compiled within have XLA's optimisations, or few of them.

    Few of them compile in half the time and give the same values: for what runs once.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not wanted)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def filled(rows: Sequence[T], size: int) -> list[T]:
    """The rows, and the last one again until they are as many as programs take."""
    rows = list(rows)
    return rows + [rows[-1]] * (size - len(rows))


def drop_programs() -> None:
    """Frees the programs of the methods that have run."""
    reader.drop_programs(finite.likelihood)
    compare_runs.drop_programs()


class Shape(NamedTuple):
    """The sizes of every batch: what the compiled programs are made for."""

    batch: int
    prompt: int  # most tokens of one
    steps: int  # most tokens after it
    chunk: int


class Driven(NamedTuple):
    """The tokens of each row, said or given, and how likely they are."""

    tokens: np.ndarray  # (N, steps)
    log_probs: np.ndarray  # (N, steps) nats of these tokens
    states: tuple | None  # of the only batch, if there was but one
    watched: Any  # of `watch`, stacked over steps, likewise


def drive(
    model: LanguageModel,
    method: Method,
    shape: Shape,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]] | None,
    steps: int,
    *,
    watch: Watch | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> Driven:
    """Reads the prompts, then feeds what is wanted, or else decodes greedily.

    Token i of a row is predicted before it is fed. The last batch is filled up with
    its last row.

    Args:
        shape: of the programs; no prompt is longer than its `prompt`.
        prompts: of tokens, one a row, any number.
        wanted: `steps` tokens a row that are fed; None decodes greedily.
        steps: at most ``shape.steps``.
        watch: what to keep of each step; one object for many calls.

    Raises:
        ValueError: if a prompt or the steps exceed the shape, or a row that is wanted
            is too short.
    """
    longest = max(map(len, prompts))
    if longest > shape.prompt or not 1 <= steps <= shape.steps:
        raise ValueError(
            f"prompts of up to {longest} tokens and {steps=} exceed {shape}: make it "
            "larger."
        )
    if wanted is not None and min(map(len, wanted)) < steps:
        raise ValueError(f"{steps=} exceeds the tokens that are given.")
    tokens, log_probs, states, watched = [], [], None, None
    for first in range(0, len(prompts), shape.batch):
        group = list(prompts[first : first + shape.batch])
        kept = len(group)
        given = np.full((shape.batch, steps), CHOOSE, np.int32)
        if wanted is not None:
            rows = [row[:steps] for row in wanted[first : first + shape.batch]]
            given[: len(rows)] = rows
            given[len(rows) :] = given[len(rows) - 1]
        group += [group[-1]] * (shape.batch - kept)
        begun = read(model, method, shape, group).prefilled
        fed = feed(model, method, begun, given, watch=watch)
        states, watched = fed.states, fed.watched
        tokens.append(fed.tokens[:kept])
        log_probs.append(fed.log_probs[:kept])
        progress(min((first + shape.batch) / len(prompts), 1.0))
    return Driven(
        np.concatenate(tokens),
        np.concatenate(log_probs).astype(np.float64),
        states,
        watched,
    )


class Read(NamedTuple):
    """A prompt of each row that was read."""

    prefilled: reader.Prefilled
    # Of all prompt tokens but the first, if asked for, (B, longest - 1):
    log_probs: np.ndarray | None  # nats
    likeliest: np.ndarray | None  # whether greedy decoding says the same


def read(
    model: LanguageModel,
    method: Method,
    shape: Shape,
    prompts: Sequence[Sequence[int]],
    *,
    scored: bool = False,
) -> Read:
    """Reads as many prompts as the shape has rows, chunk by chunk.

    Args:
        scored: also says how likely each token of them was; undefined behind a
            prompt's end.
    """
    reading = reader.begin(
        model.decoder, method, shape.batch, shape.prompt, shape.steps
    )
    judge, scores = finite.likelihood if scored else None, []
    parts = reader.cut(prompts, shape.chunk, method.hooks.granule)
    for now, judged in reader.read_and_judge(model, method, reading, parts, judge):
        reading = now
        scores.append(judged)
    found = None, None
    if scored:
        found = (np.concatenate(x, axis=1)[:, 1:] for x in zip(*scores, strict=True))
    return Read(reader.ended(model, method, reading, prompts), *found)
