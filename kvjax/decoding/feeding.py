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
    """The tokens of each row that were fed, and how likely each of them was.

    They are n, as many as were wanted; fewer where the rows ended before.
    """

    tokens: Int[np.ndarray, "B n"]
    log_probs: Float[np.ndarray, "B n"]  # nats, NaN where logits are not finite
    logits: Float[np.ndarray, "B n V"] | None  # that chose them; None unless asked for
    states: tuple[State, ...]  # with n of them in, n - 1 where the rows ended before
    watched: Any  # of `watch`, stacked over the n steps


def feed(
    model: LanguageModel,
    method: Method,
    prefilled: Prefilled,
    wanted: Int[np.ndarray, "B n"],
    *,
    watch: Watch | None = None,
    return_logits: bool = False,
    until_end: bool = False,
) -> Fed:
    """Feeds the tokens that are wanted, each after it was predicted.

    Args:
        prefilled: the prompts, with room for n tokens; used up.
        wanted: the tokens; where one is `CHOOSE`, greedy decoding chooses.
        watch: what to keep of each step; one object for many calls.
        return_logits: also return the logits of each token, also of the first.
        until_end: stop once greedy decoding has ended every row, by any of the model's
            `eos_ids`; a row that ends earlier goes on with the others.
    """
    decoder, params = model.decoder, model.params
    rule, (batch, count) = _rule(watch, return_logits), wanted.shape
    ahead = np.full((batch, 1 + -(-count // PIECE) * PIECE), CHOOSE, np.int32)
    ahead[:, :count] = wanted
    # Of one size either way, and no token is CHOOSE: one program serves both.
    ends = np.full(len(model.eos_ids), CHOOSE, np.int32)
    if until_end:
        ends[:] = model.eos_ids
    states, ended = prefilled.states, np.zeros(batch, bool)
    window, ended, chosen = loop.first(rule)(
        decoder,
        params,
        prefilled.hidden,
        prefilled.recent,
        ended,
        (ahead[:, :1], ends),
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
            ended,
            (ahead[:, start + 1 : start + 1 + PIECE], ends),
            np.int32(min(PIECE, count - start)),
        )
        states, window, ended = taken.states, taken.window, taken.memory
        chosen, seen = jax.tree.map(
            lambda x, n=int(taken.taken): np.asarray(x)[:n], taken.kept
        )
        parts.append(chosen)
        watched.append(seen)
        if taken.taken < PIECE:
            break
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
    return loop.Rule(choose, is_over=jnp.all, watch=watch)


def _choose(logits, index, ended, given):
    ahead, ends = given
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    likeliest = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
    wanted = ahead[:, index]
    tokens = jnp.where(wanted < 0, likeliest, wanted)
    ended |= (wanted < 0) & (tokens[:, None] == ends).any(-1)
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    return tokens, ended, (tokens, chosen)


def _choose_and_keep(logits, index, ended, given):
    tokens, ended, kept = _choose(logits, index, ended, given)
    return tokens, ended, (*kept, logits)
