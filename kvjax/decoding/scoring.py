"""Log-probabilities of given texts under a method, prefill and decode told apart.

The first tokens go through the prompt's path, the rest are fed one by one as if they
had been generated: only there does a method that forgets show what it forgot.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from kvjax import accounting
from kvjax.decoding import finite, loop, reader
from kvjax.decoding.checks import (
    check_counts,
    check_model,
    check_reread,
    check_vocabulary,
    token_rows,
)
from kvjax.decoding.options import Options
from kvjax.decoding.reader import PAD, Prefilled
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method

STEPS = 64  # teacher-forced tokens between two looks of the host


class Scores(NamedTuple):
    """The scores of a batch of rows whose longest has n tokens."""

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
    """Says how likely each token is after the first `prefill` of every row, a prompt.

    Args:
        tokens: one list or array of token ids a row, each longer than `prefill`.
        prefill: tokens in the prompt.
        chunk_size: most prompt tokens processed at once; a second reading takes the
            method's own `chunk`.
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
    check_counts(prefill=prefill)
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
    check_reread(model, method, [prefill] * len(tokens))
    options = Options(max_new_tokens=longest - prefill, chunk_size=chunk_size)
    padded = np.full((len(tokens), longest - prefill), PAD, np.int32)
    for row, line in enumerate(tokens):
        padded[row, : len(line) - prefill] = line[prefill:]
    prompts = [row[:prefill] for row in tokens]
    read_from, where = np.full((len(tokens), prefill), np.nan, np.float32), ""
    if prompt_scores:
        prefilled, where = _read_and_score(model, method, prompts, options, read_from)
    else:
        prefilled = reader.read_whole(model, method, prompts, options)
    decoded, logits = _continue(model, method, prefilled, padded, _rule(return_logits))
    if prompt_scores:
        finite.check(decoder, decoded[:, 0], where)
        read_from[:, -1] = decoded[:, 0]
    log_probs = np.concatenate([read_from, decoded[:, 1:]], axis=1)
    log_probs[np.arange(longest - 1) >= lengths[:, None] - 1] = np.nan
    return Scores(log_probs, logits)


def _read_and_score(model, method, prompts, options, log_probs):
    """Reads prompts and fills in how likely their own tokens are, but for the first.

    Returns them, ready to decode, and where their last chunk was, for messages.
    """
    decoder, (batch, length) = model.decoder, log_probs.shape
    reading = reader.begin(decoder, method, batch, length, options.max_new_tokens)
    granule = method.hooks.granule
    parts = reader.chunks(decoder, prompts, options.chunk_size, granule=granule)
    start, where = 0, ""
    for now, likely in reader.read_and_judge(
        model, method, reading, parts, finite.log_prob
    ):
        reading = now
        end = start + likely.shape[1]
        where = f"in tokens {start + 1} to {end}"
        finite.check(decoder, likely, where)
        # Nothing predicts the first token of all.
        log_probs[:, max(start - 1, 0) : end - 1] = likely[:, int(start == 0) :]
        start = end
    return reader.ended(model, method, reading, prompts), where


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
    log_probs, logits = _continue(
        model, as_method(method), prefilled, tokens, _rule(return_logits)
    )
    return Scores(log_probs[:, 1:], logits)


class Likelihoods(NamedTuple):
    """The likelihood of given tokens, each behind a prompt and those before it."""

    log_probs: Float[np.ndarray, "B n"]  # natural
    is_likeliest: Bool[np.ndarray, "B n"]  # whether greedy decoding would choose it


def likelihoods(
    model: LanguageModel,
    method: Method | str,
    prefilled: Prefilled,
    tokens: Int[np.ndarray, "B n"],
) -> Likelihoods:
    """Says how likely tokens are that follow a prompt, the first of them too.

    They are fed one by one as by :func:`score`; the last is predicted and never fed.

    Args:
        prefilled: the prompts, with room for `n` tokens; used up unless n is 1.
        tokens: what follows them.

    Raises:
        ValueError: if logits are not finite.
    """
    method = as_method(method)
    log_probs, kept = _continue(model, method, prefilled, tokens, _JUDGED)
    finite.check(model.decoder, log_probs[:, 0], "at the end of a prompt")
    likeliest: Any = kept
    return Likelihoods(log_probs, likeliest)


def _continue(model, method, prefilled, tokens, rule):
    """Returns log-probabilities `(B, n)`, and what else a rule keeps of each token."""
    decoder, params = model.decoder, model.params
    batch, count = tokens.shape
    ahead = np.full((batch, count + STEPS), PAD, np.int32)
    ahead[:, :count] = tokens
    states = prefilled.states
    window, _, kept = loop.first(rule)(
        decoder, params, prefilled.hidden, prefilled.recent, None, ahead[:, :1]
    )
    parts = [[np.asarray(x)[None] for x in kept]]
    for start in range(1, count, STEPS):
        taken = loop.steps(rule)(
            decoder,
            method,
            STEPS,
            params,
            states,
            window,
            None,
            ahead[:, start : start + STEPS],
            np.int32(min(STEPS, count - start)),
        )
        states, window, size = taken.states, taken.window, int(taken.taken)
        kept = [np.asarray(x)[:size] for x in taken.kept[0]]
        at = f"at one of the tokens {start} to {start + size - 1} after the prompt"
        finite.check(decoder, kept[0], at)
        parts.append(kept)
    whole = [np.concatenate(x).swapaxes(0, 1) for x in zip(*parts, strict=True)]
    return whole[0], whole[1] if len(whole) > 1 else None


def drop_programs() -> None:
    """Frees what was compiled to score tokens, of every method."""
    reader.drop_programs(finite.log_prob)
    for rule in (_rule(False), _rule(True), _JUDGED):
        loop.drop_programs(rule)


def _judge(logits, index, memory, given):
    """Feeds given tokens; keeps how likely each is, and whether it is the likeliest."""
    tokens = given[:, index]
    return tokens, memory, finite.likelihood(logits, tokens)


_JUDGED = loop.Rule(_judge)


@functools.cache
def _rule(return_logits: bool) -> loop.Rule:
    """Feeds given tokens, and keeps how likely each is, and the logits if wanted."""

    def choose(logits, index, memory, given):
        tokens = given[:, index]
        likely = finite.log_prob(logits, tokens)
        kept = (likely, logits) if return_logits else (likely,)
        return tokens, memory, kept

    return loop.Rule(choose)
