"""A whole model fed token by token under a method: text, and answers that are decoded.

One shape for everything a claim asks, so that a method compiles two programs: one that
reads a chunk of a prompt, and one that takes up to `PIECE` steps.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.decoding.generate import empty_states, finish, last_hidden, recent
from kvjax.decoding.hidden import no_hidden
from kvjax.decoding.prompt_chunks import PAD
from kvjax.decoding.scoring import POSITIONS
from kvjax.interface import LanguageModel, Method

PIECE = 64


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


Watch = Callable[[tuple, tuple], Any]  # states before and after a step -> arrays


class Shape(NamedTuple):
    """Of every batch: what the compiled programs are made for."""

    batch: int
    prompt: int  # most tokens of one
    steps: int  # most tokens after it
    chunk: int


class Driven(NamedTuple):
    """Of each row: what was said, or how likely what was given is."""

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
        given = np.full((shape.batch, steps), -1, np.int32)
        if wanted is not None:
            rows = [row[:steps] for row in wanted[first : first + shape.batch]]
            given[: len(rows)] = rows
            given[len(rows) :] = given[len(rows) - 1]
        group += [group[-1]] * (shape.batch - kept)
        states, hidden, window, *_ = read(model, method, shape, group)
        parts = []
        for start in range(0, steps, PIECE):
            piece = np.full((shape.batch, PIECE), PAD, np.int32)
            ahead = given[:, start : start + PIECE]
            piece[:, : ahead.shape[1]] = ahead
            limit = min(PIECE, steps - start)
            states, hidden, window, found = _steps(
                model.decoder,
                method,
                watch,
                model.params,
                states,
                hidden,
                window,
                piece,
                np.int32(limit),
            )
            parts.append(jax.tree.map(lambda x, n=limit: np.asarray(x)[:n], found))
        said, likely, watched = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        tokens.append(said.T[:kept])
        log_probs.append(likely.T[:kept])
        progress(min((first + shape.batch) / len(prompts), 1.0))
    return Driven(
        np.concatenate(tokens),
        np.concatenate(log_probs).astype(np.float64),
        states,
        watched,
    )


class Read(NamedTuple):
    """A prompt of each row that was read."""

    states: tuple  # after `finish`
    hidden: jax.Array  # (B, E) of the newest tokens
    window: jax.Array  # (B, R) the newest tokens
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
    decoder, params = model.decoder, model.params
    states = empty_states(decoder, method, shape.batch, shape.prompt, shape.steps)
    hidden = no_hidden(decoder, shape.batch)
    scores = []
    for start in range(0, max(map(len, prompts)), shape.chunk):
        chunk = np.full((shape.batch, shape.chunk), PAD, np.int32)
        pieces = [prompt[start : start + shape.chunk] for prompt in prompts]
        for row, piece in enumerate(pieces):
            chunk[row, : len(piece)] = piece
        lengths = np.array([len(piece) for piece in pieces], np.int32)
        states, hidden, likely = _chunk(
            decoder, method, scored, params, states, chunk, lengths, hidden
        )
        if scored:
            scores.append(jax.tree.map(np.asarray, likely))
    window = jnp.asarray(recent(prompts, method.rows))
    found = None, None
    if scored:
        found = (np.concatenate(x, axis=1)[:, 1:] for x in zip(*scores, strict=True))
    return Read(finish(method, states), hidden, window, *found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _chunk(decoder, method, scored, params, states, tokens, lengths, previous):
    states, hidden = decoder.prefill(params, states, tokens, lengths, method)
    likely = None
    if scored:
        before = jnp.concatenate([previous[:, None], hidden[:, :-1]], axis=1)

        def one_position(args):  # (B, E), (B,): all logits of a chunk may not fit
            hidden, token = args
            logits = decoder.logits(params, hidden)
            chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
            nats = chosen - jax.nn.logsumexp(logits, axis=-1)
            return nats, jnp.argmax(logits, axis=-1) == token

        by_position = before.swapaxes(0, 1), tokens.T
        likely = jax.lax.map(one_position, by_position, batch_size=POSITIONS)
        likely = jax.tree.map(jnp.transpose, likely)
    return states, last_hidden(hidden, lengths, previous), likely


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _steps(decoder, method, watch, params, states, hidden, window, wanted, limit):
    """Up to `limit` of `PIECE` steps; what was found comes step by step."""

    def step(states, hidden, window, given):
        log_probs = jax.nn.log_softmax(decoder.logits(params, hidden), axis=-1)
        likeliest = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
        token = jnp.where(given < 0, likeliest, given)
        chosen = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        after, hidden = decoder.decode_step(params, states, window, method)
        seen = () if watch is None else watch(states, after)
        return after, hidden[:, -1], window, (token, chosen, seen)

    one = jax.eval_shape(step, states, hidden, window, wanted[:, 0])[3]
    found = jax.tree.map(lambda x: jnp.zeros((PIECE, *x.shape), x.dtype), one)

    def body(carry):
        index, states, hidden, window, found = carry
        states, hidden, window, new = step(states, hidden, window, wanted[:, index])
        found = jax.tree.map(lambda x, y: x.at[index].set(y), found, new)
        return index + 1, states, hidden, window, found

    carry = jnp.int32(0), states, hidden, window, found
    done = jax.lax.while_loop(lambda carry: carry[0] < limit, body, carry)
    return done[1:]
