"""A draft of several tokens checked in one pass: what full attention would have said.

A method that can take tokens back drafts with its small reads; one exact pass over the
draft then costs about as much as one token of full attention. What of a draft holds is
decided here, greedily or by the acceptance rule of speculative sampling.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax import copies, parallel
from kvjax.decoding.finite import is_finite
from kvjax.interface import DecoderLM, Method, Params, State

# A token's random numbers, each from a key of its own: what is drafted for its place,
# whether that holds, and what it is instead.
DRAFT, ACCEPT, CHOOSE = range(3)


class Decided(NamedTuple):
    """The part of a draft that holds, and the token behind it."""

    accepted: Int[Array, "B"]
    next_token: Int[Array, "B"]


class Verified(NamedTuple):
    """The part of a draft that holds."""

    states: tuple[State, ...]  # with the newest token and the accepted ones behind it
    accepted: Int[Array, "B"]  # tokens of the draft that greedy decoding says too
    next_token: Int[Array, "B"]  # what it says after them
    hidden: Float[Array, "B E"]  # of the last accepted token: its logits say that
    finite: Bool[Array, "B"]  # False: some logits are no numbers, and nothing holds


def rewind(
    method: Method, states: tuple[State, ...], count: Int[Array, "B"], most: int
) -> tuple[State, ...]:
    """Takes each row's newest `count` tokens back, at most `most`; under `jit` too.

    Raises:
        ValueError: if the method cannot take tokens back.
    """
    if method.rewind is None:
        raise ValueError(
            "this method cannot take tokens back: it has no `rewind`. Use full, quest, "
            "or retro and dense_layers around them."
        )
    back = [parallel.of_state(method, state).rewind for state in states]
    return tuple(
        one(state, count, most)
        for one, state in zip(back, states, strict=True)
        if one is not None
    )


def verify(
    decoder: DecoderLM,
    method: Method,
    params: Params,
    states: tuple[State, ...],
    tokens: Int[Array, "B T"],
) -> Verified:
    """Checks a draft against greedy decoding under full attention, in one pass.

    All rows of the draft attend to everything before them, as a prompt does, and leave
    exact keys and values; what is not accepted is taken back. Repeated, the tokens are
    those of greedy decoding under :func:`kvjax.full`, whatever the drafts. A method
    that drafted itself is rewound before, by :func:`rewind`.

    Args:
        decoder, params: of the model.
        method: which can rewind.
        states: after `finish`, without `tokens`; there is room for T more.
        tokens: each row's newest token, then T - 1 drafted ones.

    Returns:
        :class:`Verified`; a pure function, for `jax.jit`, that says what is not finite
        and cannot raise (:func:`kvjax.decoding.finite.not_finite` is the error for it).

    Raises:
        ValueError: if the method cannot take tokens back, the model feeds copies of a
            token, or its rope is `dynamic`: its keys depend on how many come at once.
    """
    check_decoder(decoder)
    batch, rows = tokens.shape
    lengths = jnp.full((batch,), rows, jnp.int32)
    states, hidden = decoder.prefill(params, states, tokens, lengths, method)
    logits = decoder.logits(params, hidden)
    accepted, next_token = decide_greedily(logits, tokens, lengths - 1)
    return Verified(
        states=rewind(method, states, rows - 1 - accepted, rows),
        accepted=accepted,
        next_token=next_token,
        hidden=jnp.take_along_axis(hidden, accepted[:, None, None], axis=1)[:, 0],
        finite=is_finite(logits).all(-1),
    )


def check_decoder(decoder: DecoderLM) -> None:
    """Raises ValueError if a chunk is read otherwise than its tokens one by one."""
    copies.refuse(copies.of(decoder), "a draft of several tokens")
    if decoder.rope.static_until < math.inf:
        raise ValueError(
            "the model's rope is 'dynamic', which would rotate a draft's keys as no "
            "single step does: decode token by token."
        )


def decide_greedily(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], drafts: Int[Array, "B"]
) -> Decided:
    """Accepts a draft up to its first token that is not the likeliest.

    Args:
        logits: behind each of `tokens`.
        tokens: each row's newest token, then its draft.
        drafts: tokens of each row's draft, at most T - 1.
    """
    likeliest = logits.argmax(-1).astype(tokens.dtype)
    accepted = _leading(likeliest[:, :-1] == tokens[:, 1:], drafts)
    return Decided(accepted, _at(likeliest, accepted))


def decide_by_chance(
    keys: Key[Array, "B T"],
    logits: Float[Array, "B T V"],
    drafted_by: Float[Array, "B U V"],
    tokens: Int[Array, "B T"],
    drafts: Int[Array, "B"],
) -> Decided:
    """Accepts by the rule of speculative sampling: as if `logits` alone had been drawn.

    Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative
    Decoding", ICML 2023, arXiv:2211.17192, Alg. 1. A draft longer by what chance says
    of its own tokens would break it; one of a length decided before does not.

    Args:
        keys: of the token behind each of `tokens`, from its place in the row alone.
        logits: whose softmax is to be drawn from, behind each of `tokens`.
        drafted_by: whose softmax each token of the draft was drawn from, U = T - 1.
        tokens, drafts: as :func:`decide_greedily`.
    """
    p, q = jax.nn.softmax(logits, axis=-1), jax.nn.softmax(drafted_by, axis=-1)
    drawn = tokens[:, 1:, None]
    p_drawn = jnp.take_along_axis(p[:, :-1], drawn, axis=-1)[..., 0]
    q_drawn = jnp.take_along_axis(q, drawn, axis=-1)[..., 0]
    chance = _uniform(keys[:, :-1], p.dtype)
    accepted = _leading(chance < acceptance(p_drawn, q_drawn), drafts)
    # Behind a whole draft nothing was drawn: all of p is left.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    was_drawn = (accepted < drafts)[:, None]
    left = remainder(_at(p, accepted), jnp.where(was_drawn, _at(q, accepted), 0))
    own = jax.vmap(jax.random.fold_in, (0, None))(_at(keys, accepted), CHOOSE)
    chosen = jax.vmap(jax.random.categorical)(own, jnp.log(left))
    return Decided(accepted, chosen.astype(tokens.dtype))


def acceptance(p: Float[Array, "*B"], q: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns min(1, p/q): the chance that a token drawn by q holds under p.

    It is no number where q is none, and then nothing holds.
    """
    is_likelier = p >= q
    return jnp.where(is_likelier, 1, p / jnp.where(is_likelier, 1, q))


def remainder(p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Returns the distribution max(p - q, 0), normalised, of what takes its place.

    It is p where rounding leaves nothing: then hardly anything was refused.
    """
    left = jnp.maximum(p - q, 0)
    total = left.sum(-1, keepdims=True)
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1), p)


def place_keys(
    keys: Key[Array, "B"], first: Int[Array | np.ndarray, "B"], count: int
) -> Key[Array, "B T"]:
    """Returns the keys of `count` places of each row, from `first` on."""
    places = first[:, None] + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, places)


def draw(keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Draws the token that a draft has in each row's place."""
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, DRAFT)
    return jax.vmap(jax.random.categorical)(own, logits).astype(jnp.int32)


def _leading(holds: Bool[Array, "B U"], drafts: Int[Array, "B"]) -> Int[Array, "B"]:
    """Counts the first tokens of each draft that hold, up to one that does not."""
    is_drafted = jnp.arange(holds.shape[1], dtype=jnp.int32) < drafts[:, None]
    leading = (holds & is_drafted).astype(jnp.int32).cumprod(axis=1)
    return leading.sum(axis=1, dtype=jnp.int32)


def _at(rows: Array, index: Int[Array, "B"]) -> Array:
    """Returns what each row has at its index of the second axis."""
    return rows[jnp.arange(len(index)), index]


def _uniform(keys, dtype):
    """Draws the numbers by which tokens of a draft are accepted."""

    def one(key):
        own = jax.random.fold_in(key, ACCEPT)
        return jax.random.uniform(own, dtype=dtype)

    return jax.vmap(jax.vmap(one))(keys)
