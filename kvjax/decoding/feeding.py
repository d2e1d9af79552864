"""Tokens fed one by one behind a prompt: given ones, or else the likeliest.

Unlike :mod:`kvjax.decoding.scoring`, what a prompt predicts is among the results, and
something of the states may be kept at every step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax.decoding import loop
from kvjax.decoding.reader import Prefilled
from kvjax.interface import LanguageModel, Method, State

PIECE = 64  # steps between two looks of the host
CHOOSE = -1  # in place of a given token: the likeliest one is fed

# States of all layers before and after a step -> arrays to keep.
Watch = Callable[[tuple[State, ...], tuple[State, ...]], Any]


class Fed(NamedTuple):
    """The tokens of each row that were fed, and how likely each of them was."""

    tokens: Int[np.ndarray, "B n"]
    log_probs: Float[np.ndarray, "B n"]  # nats, NaN where logits are not finite
    logits: Float[np.ndarray, "B n V"] | None  # that chose them; None unless asked for
    states: tuple[State, ...]  # with all of them in
    watched: Any  # of `watch`, stacked over the n steps


def feed(
    model: LanguageModel,
    method: Method,
    prefilled: Prefilled,
    wanted: Int[np.ndarray, "B n"],
    *,
    watch: Watch | None = None,
    return_logits: bool = False,
) -> Fed:
    """Feeds the tokens that are wanted, each after it was predicted.

    Args:
        prefilled: the prompts, with room for n tokens; used up.
        wanted: the tokens; where one is `CHOOSE`, greedy decoding chooses.
        watch: what to keep of each step; one object for many calls.
        return_logits: also return the logits of each token, also of the first.
    """
    decoder, params = model.decoder, model.params
    rule, (batch, count) = _rule(watch, return_logits), wanted.shape
    ahead = np.full((batch, 1 + -(-count // PIECE) * PIECE), CHOOSE, np.int32)
    ahead[:, :count] = wanted
    states = prefilled.states
    window, _, chosen = loop.first(rule)(
        decoder, params, prefilled.hidden, prefilled.recent, None, ahead[:, :1]
    )
    parts, watched = [jax.tree.map(lambda x: np.asarray(x)[None], chosen)], []
    for start in range(0, count, PIECE):
        taken = loop.steps(rule)(
            decoder,
            method,
            PIECE,
            params,
            states,
            window,
            None,
            ahead[:, start + 1 : start + 1 + PIECE],
            np.int32(min(PIECE, count - start)),
        )
        states, window = taken.states, taken.window
        chosen, seen = jax.tree.map(
            lambda x, n=int(taken.taken): np.asarray(x)[:n], taken.kept
        )
        parts.append(chosen)
        watched.append(seen)
    tokens, log_probs, *logits = (
        np.concatenate(x)[:count].swapaxes(0, 1) for x in zip(*parts, strict=True)
    )
    watched = jax.tree.map(lambda *x: np.concatenate(x), *watched)
    return Fed(tokens, log_probs, logits[0] if logits else None, states, watched)


def drop_programs(watch: Watch | None = None) -> None:
    """Frees what was compiled to feed tokens under a watch, of every method."""
    for return_logits in (False, True):
        loop.drop_programs(_rule(watch, return_logits))


@functools.cache
def _rule(watch: Watch | None, return_logits: bool) -> loop.Rule:
    choose = _choose_and_keep if return_logits else _choose
    return loop.Rule(choose, watch=watch)


def _choose(logits, index, memory, given):
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    likeliest = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
    wanted = given[:, index]
    tokens = jnp.where(wanted < 0, likeliest, wanted)
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    return tokens, memory, (tokens, chosen)


def _choose_and_keep(logits, index, memory, given):
    tokens, memory, kept = _choose(logits, index, memory, given)
    return tokens, memory, (*kept, logits)
