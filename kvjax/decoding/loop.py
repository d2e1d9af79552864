"""The programs of the decode loop: several steps on the device, states in place.

`kvjax.decoding.generate` is the host's side: it looks at the tokens after every block
of steps.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.decoding.finite import is_finite
from kvjax.decoding.prompt_chunks import PAD
from kvjax.decoding.sampling import sample


class Tail(NamedTuple):
    """Of the loop's carry, all but the states: small."""

    window: Int[Array, "B R"]  # newest tokens of each row, what the next step feeds
    done: Bool[Array, "B"]
    finite: Bool[Array, "B"]  # the logits that chose the newest token were
    seen: Bool[Array, "B V"] | None  # only under a repetition penalty


@functools.partial(jax.jit, static_argnums=0)
def first_token(decoder, params, hidden, tail, keys, sampling, eos_ids):
    """Next tokens `(B,)` after a prompt, and the tail with them in."""
    return _choose(decoder, params, hidden, tail, keys, 0, sampling, eos_ids)


def _choose(decoder, params, hidden, tail, keys, step, sampling, eos_ids):
    """Next tokens `(B,)` from the hidden state `(B, E)`, and the tail with them in."""
    window, done, _, seen = tail
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    logits = decoder.logits(params, hidden)
    tokens = sample(keys, logits, seen, sampling)
    tokens = jnp.where(done, PAD, tokens)
    finite = is_finite(logits) | done
    done = done | (tokens[:, None] == eos_ids).any(-1)
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.size), tokens].set(True)
    window = jnp.concatenate([window[:, 1:], tokens[:, None]], axis=1)
    return tokens, Tail(window, done, finite, seen)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    decoder,
    method,
    size,
    params,
    states,
    tail,
    keys,
    first_step,
    limit,
    sampling,
    eos_ids,
):
    """Up to `limit <= size` steps; ends early once every row is done, or one is broken.

    Returns the states, the tail, tokens `(B, size)` and how many columns are filled.
    """

    def running(carry):
        count, _, tail, _ = carry
        return (count < limit) & ~tail.done.all() & tail.finite.all()

    def step(carry):
        count, states, tail, tokens = carry
        states, hidden = decoder.decode_step(params, states, tail.window, method)
        newest, tail = _choose(
            decoder,
            params,
            hidden[:, -1],
            tail,
            keys,
            first_step + count,
            sampling,
            eos_ids,
        )
        tokens = tokens.at[:, count].set(newest)
        return count + 1, states, tail, tokens

    tokens = jnp.full((tail.done.size, size), PAD, jnp.int32)
    carry = (jnp.int32(0), states, tail, tokens)
    count, states, tail, tokens = jax.lax.while_loop(running, step, carry)
    return states, tail, tokens, count
