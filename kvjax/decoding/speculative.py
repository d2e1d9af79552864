"""A draft of several tokens checked in one pass: what full attention would have said.

A method that can take tokens back drafts with its small reads; one exact pass over the
draft then costs about as much as one token of full attention.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import parallel
from kvjax.decoding.finite import is_finite
from kvjax.interface import DecoderLM, Method, Params, State


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
        ValueError: if the method cannot take tokens back, or the model's rope is
            `dynamic`: its keys depend on how many come at once.
    """
    if decoder.rope.static_until < math.inf:
        raise ValueError(
            "the model's rope is 'dynamic', which would rotate a draft's keys as no "
            "single step does: decode token by token."
        )
    batch, rows = tokens.shape
    lengths = jnp.full((batch,), rows, jnp.int32)
    states, hidden = decoder.prefill(params, states, tokens, lengths, method)
    logits = decoder.logits(params, hidden)
    said = logits.argmax(-1).astype(tokens.dtype)
    agrees = (said[:, :-1] == tokens[:, 1:]).astype(jnp.int32)
    accepted = agrees.cumprod(axis=1).sum(axis=1, dtype=jnp.int32)
    return Verified(
        states=rewind(method, states, rows - 1 - accepted, rows),
        accepted=accepted,
        next_token=jnp.take_along_axis(said, accepted[:, None], axis=1)[:, 0],
        hidden=jnp.take_along_axis(hidden, accepted[:, None, None], axis=1)[:, 0],
        finite=is_finite(logits).all(-1),
    )
