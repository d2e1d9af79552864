"""Log-probabilities of given texts under a method, prefill and decode told apart.

The first tokens go through the prompt's path, the rest are fed one by one as if they
had been generated: only there does a method that forgets show what it forgot.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax import accounting
from kvjax.decoding import finite
from kvjax.decoding.checks import (
    check_counts,
    check_model,
    check_vocabulary,
    token_rows,
)
from kvjax.decoding.generate import (
    Prefilled,
    chunks,
    empty_states,
    finish,
    last_hidden,
    recent,
)
from kvjax.decoding.generate import prefill as read_prompts
from kvjax.decoding.prompt_chunks import PAD
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method

STEPS = 64  # teacher-forced tokens between two looks of the host
POSITIONS = 64  # prompt positions whose logits exist at once


class Scores(NamedTuple):
    """Of a batch of rows whose longest has n tokens."""

    # Natural log-probability of token i + 1 given those before; NaN past a row's end.
    log_probs: Float[np.ndarray, "B n-1"]
    # `logits[:, i]` chose token prefill + i, so `[:, 0]` is the prompt's last and the
    # others are decode steps; None unless asked for. Undefined past a row's end.
    logits: Float[np.ndarray, "B n-prefill V"] | None


def score(
    model: LanguageModel,
    method: Method | str,
    tokens: Sequence[Sequence[int]],
    *,
    prefill: int,
    chunk_size: int = 512,
    prompt_scores: bool = True,
    return_logits: bool = False,
) -> Scores:
    """How likely each token is, with the first `prefill` of every row as the prompt.

    Args:
        tokens: one list or array of token ids a row, each longer than `prefill`.
        prefill: tokens in the prompt.
        chunk_size: most prompt tokens processed at once.
        prompt_scores: False leaves NaN for what the prompt predicts, and reads it by
            the program that generation compiles.
        return_logits: also return the logits of what follows the prompt.

    Raises:
        ValueError: if `prefill` is not in [1, length) of every row, an id is outside
            the vocabulary, a row is too long for the model's context (none is, for a
            method of constant memory), an argument is of another type, or logits are
            not finite.
    """
    method = as_method(method)
    check_model(model)
    check_counts(prefill=prefill, chunk_size=chunk_size)
    tokens = token_rows(tokens)
    lengths = np.array([len(row) for row in tokens], np.int32)
    if not tokens or not 1 <= prefill < lengths.min():
        shortest = lengths.min() if tokens else 0
        raise ValueError(
            f"{prefill=} must be at least 1 and below the length of every row; the "
            f"shortest has {shortest} tokens."
        )
    decoder = model.decoder
    longest = int(lengths.max())
    is_long = longest > decoder.context
    if is_long and not accounting.reads_any_length(method, decoder):
        raise ValueError(
            f"a row has {longest} tokens, more than the model's context of "
            f"{decoder.context}: shorten it."
        )
    check_vocabulary(decoder, tokens)
    padded = np.full((len(tokens), longest + 1), PAD, np.int32)
    for row, line in enumerate(tokens):
        padded[row, : len(line)] = line

    prompts = [row[:prefill] for row in tokens]
    if prompt_scores:
        read = _read_and_score(model, method, padded, prompts, longest, chunk_size)
        states, hidden, window, prompt_log_probs = read
    else:
        states, hidden, window, _ = read_prompts(
            model,
            method,
            prompts,
            max_new_tokens=longest - prefill,
            chunk_size=chunk_size,
        )
        prompt_log_probs = np.full((len(tokens), prefill), np.nan, np.float32)
    decoded = continue_scores(
        model,
        method,
        Prefilled(states, hidden, window),
        padded[:, prefill:longest],
        return_logits=return_logits,
    )
    log_probs = np.concatenate([prompt_log_probs, decoded.log_probs], axis=1)
    log_probs[np.arange(longest - 1) >= lengths[:, None] - 1] = np.nan
    return Scores(log_probs, decoded.logits)


def continue_scores(
    model: LanguageModel,
    method: Method | str,
    prefilled: Prefilled,
    tokens: Int[np.ndarray, "B n"],
    *,
    return_logits: bool = False,
) -> Scores:
    """Scores tokens that are fed one by one after a prompt that was read.

    Args:
        prefilled: the prompts, with room for `n` tokens; used up.
        tokens: what follows them. The last is predicted and never fed.
        return_logits: also return the logits, `(B, n, V)`, of what chose each token.

    Returns:
        :class:`Scores`, of the tokens alone: log-probabilities `(B, n - 1)` of all but
        the first, which the prompt predicts.
    """
    method = as_method(method)
    decoder, params = model.decoder, model.params
    states, hidden, window, _ = prefilled
    log_probs: list[np.ndarray] = [np.zeros((len(tokens), 0), np.float32)]
    logits = []
    if return_logits:
        logits.append(np.asarray(_logits(decoder, params, hidden))[:, None])
    steps = tokens.shape[1] - 1
    for start in range(0, steps, STEPS):
        ahead = np.full((len(tokens), STEPS + 1), PAD, np.int32)
        piece = tokens[:, start : start + STEPS + 1]
        ahead[:, : piece.shape[1]] = piece
        limit = min(STEPS, steps - start)
        states, window, likely, chosen = _score_steps(
            decoder,
            method,
            return_logits,
            params,
            states,
            window,
            ahead,
            np.int32(limit),
        )
        log_probs.append(np.asarray(likely)[:, :limit])
        at = f"at one of the tokens {start + 1} to {start + limit} after the prompt"
        finite.check(decoder, log_probs[-1], at)
        if return_logits:
            logits.append(np.asarray(chosen)[:, :limit])
    return Scores(
        np.concatenate(log_probs, axis=1),
        np.concatenate(logits, axis=1) if return_logits else None,
    )


def drop_programs() -> None:
    """Frees what was compiled to score tokens, of every method."""
    for program in (_logits, _score_chunk, _score_steps):
        program.clear_cache()


def _read_and_score(model, method, padded, prompts, longest, chunk_size):
    """As `read_prompts`, with the log-probabilities of what the prompts predict."""
    decoder, params = model.decoder, model.params
    length = len(prompts[0])
    states = empty_states(decoder, method, len(prompts), length, longest - length)
    hidden, log_probs, start = None, [], 0
    for chunk, fresh in chunks(decoder, prompts, chunk_size):
        targets = np.full_like(chunk, PAD)
        ahead = padded[:, start + 1 : start + 1 + chunk.shape[1]]
        targets[:, : ahead.shape[1]] = ahead
        states, hidden, likely = _score_chunk(
            decoder, method, params, states, chunk, targets, fresh, hidden
        )
        log_probs.append(np.asarray(likely)[:, : int(fresh.max())])
        end = start + int(fresh.max())
        finite.check(decoder, log_probs[-1], f"in tokens {start + 1} to {end}")
        start += chunk.shape[1]
    window = jnp.asarray(recent(prompts, method.rows))
    return finish(method, states), hidden, window, np.concatenate(log_probs, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder, params, hidden):
    return decoder.logits(params, hidden)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _score_chunk(decoder, method, params, states, tokens, targets, lengths, previous):
    states, hidden = decoder.prefill(params, states, tokens, lengths, method)

    def one_position(args):  # (B, E), (B,): all logits of a chunk may not fit
        hidden, targets = args
        return finite.log_prob(decoder.logits(params, hidden), targets)

    by_position = hidden.swapaxes(0, 1), targets.T
    likely = jax.lax.map(one_position, by_position, batch_size=POSITIONS)
    return states, last_hidden(hidden, lengths, previous), likely.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _score_steps(decoder, method, return_logits, params, states, window, tokens, limit):
    """Feeds `tokens[:, :limit]`; log-probabilities `(B, STEPS)` of those one later."""
    batch = tokens.shape[0]

    def running(carry):
        return carry[0] < limit

    def step(carry):
        index, states, window, likely, kept = carry
        window = jnp.concatenate([window[:, 1:], tokens[:, index][:, None]], axis=1)
        states, hidden = decoder.decode_step(params, states, window, method)
        logits = decoder.logits(params, hidden[:, -1])
        likely = likely.at[:, index].set(finite.log_prob(logits, tokens[:, index + 1]))
        if return_logits:
            kept = kept.at[:, index].set(logits)
        return index + 1, states, window, likely, kept

    likely = jnp.zeros((batch, STEPS), jnp.float32)
    kept = None
    if return_logits:
        kept = jnp.zeros((batch, STEPS, decoder.vocab_size), jnp.float32)
    carry = (jnp.int32(0), states, window, likely, kept)
    _, states, window, likely, kept = jax.lax.while_loop(running, step, carry)
    return states, window, likely, kept
