"""Requests of a harness, answered under a method: likelihoods of texts, and new texts.

A context is the prompt, and ends (`finish`) where it ends; what follows goes through
decode steps, as in :func:`kvjax.decoding.scoring.score`. Contexts may have any lengths:
those of nearby lengths are read together, each of them once, however many requests
have it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import accounting
from kvjax.decoding import generate, reader, scoring
from kvjax.decoding.checks import (
    check_counts,
    check_model,
    check_reach,
    check_seed,
    check_vocabulary,
)
from kvjax.decoding.options import Options
from kvjax.decoding.reader import PAD
from kvjax.decoding.sampling import Sampling
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method

Item = TypeVar("Item")
Tokens = tuple[int, ...]
Progress = Callable[[float], None]  # (fraction that is done)

LEAST = 16  # tokens to make room for: fewer share their compiled code


class Pair(NamedTuple):
    """A context, and a continuation whose likelihood is asked for."""

    context: Tokens
    continuation: Tokens


class Likelihood(NamedTuple):
    """The likelihood of a continuation."""

    log_prob: float  # natural, the sum over its tokens
    is_greedy: bool  # greedy decoding would say it


class Wanted(NamedTuple):
    """A context that is to be continued."""

    context: Tokens
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()


def ignore(done: float) -> None:
    """Takes no notice of progress."""
    del done


def likelihoods(
    model: LanguageModel,
    method: Method | str,
    pairs: Sequence[Pair],
    *,
    batch: int = 8,
    chunk_size: int = 512,
    progress: Progress = ignore,
) -> list[Likelihood]:
    """Says how likely each continuation is behind its context.

    Equal contexts are read once; each continuation then starts from a copy of what the
    method keeps of it.

    Args:
        pairs: of tokens. A continuation without any has a log-probability of 0.
        batch: contexts read and decoded together.
        chunk_size: most tokens of a context processed at once.
        progress: called with the fraction that is done.

    Raises:
        ValueError: if a context is empty, a pair too long for the model, or an id
            outside its vocabulary; it names the request.
    """
    method = as_method(method)
    check_model(model)
    check_counts(batch=batch, chunk_size=chunk_size)
    for place, (context, continuation) in enumerate(pairs):
        _check(model, method, place, context, max(len(continuation) - 1, 0))
    check_vocabulary(model.decoder, [(*c, *following) for c, following in pairs])
    found = [Likelihood(0.0, True)] * len(pairs)
    places: dict[Tokens, list[int]] = {}
    for place, (context, continuation) in enumerate(pairs):
        if continuation:
            places.setdefault(tuple(context), []).append(place)
    for group, done in _batches(list(places), batch):
        # Longest first: the turns of a batch are then of like lengths.
        owned = [
            sorted(places[context], key=lambda place: -len(pairs[place].continuation))
            for context in dict.fromkeys(group)
        ]
        rows = [[pairs[place].continuation for place in own] for own in owned]
        rows += [[]] * (len(group) - len(rows))  # what fills the batch up asks nothing
        said = _behind(model, method, group, rows, chunk_size)
        for own, answers in zip(owned, said, strict=False):
            for place, answer in zip(own, answers, strict=True):
                found[place] = answer
        progress(done)
    return found


def _behind(model, method, contexts, rows, chunk_size) -> list[list[Likelihood]]:
    """Reads contexts, then says of every row how likely its continuations are."""
    longest = max(len(line) for own in rows for line in own)
    room = rounded_up(longest)
    options = _options(model, contexts, room, chunk_size=chunk_size)
    prefilled = reader.read_whole(model, method, contexts, options)
    found: list[list[Likelihood]] = [[] for _ in rows]
    turns = max(map(len, rows))
    for turn in range(turns):
        lines = [own[turn] if turn < len(own) else () for own in rows]
        tokens = np.full((len(lines), max(map(len, lines))), PAD, np.int32)
        for row, line in enumerate(lines):
            tokens[row, : len(line)] = line
        begun = prefilled
        if turn < turns - 1:  # decoding uses its states up
            begun = prefilled._replace(states=jax.tree.map(jnp.copy, prefilled.states))
        judged = scoring.likelihoods(model, method, begun, tokens)
        for row, line in enumerate(lines):
            if line:
                log_prob = float(judged.log_probs[row, : len(line)].sum(dtype=float))
                is_greedy = bool(judged.is_likeliest[row, : len(line)].all())
                found[row].append(Likelihood(log_prob, is_greedy))
    return found


def continuations(
    model: LanguageModel,
    method: Method | str,
    requests: Sequence[Wanted],
    *,
    batch: int = 8,
    seed: int = 0,
    chunk_size: int = 512,
    progress: Progress = ignore,
) -> list[str]:
    """Continues each context, as :func:`kvjax.decoding.generate.generate` does.

    Greedy requests that are equal are answered once. Sampled ones are not: each has
    random numbers of its own, by `seed` and its place in the order of work.

    Args:
        requests: contexts as tokens, and how each is to be continued.
        batch: rows decoded together.
        seed: of the random keys.
        chunk_size: most tokens of a context processed at once.
        progress: called with the fraction that is done.

    Returns:
        The new text of each request, up to a stop string or the end of a text.

    Raises:
        ValueError: if a context is empty or too long for the model, an id outside its
            vocabulary, or an option out of its range; it names the request.
    """
    method = as_method(method)
    check_model(model)
    check_counts(batch=batch, chunk_size=chunk_size)
    check_seed(seed)
    for place, wanted in enumerate(requests):
        check_counts(max_new_tokens=wanted.max_new_tokens)
        _check(model, method, place, wanted.context, wanted.max_new_tokens)
    check_vocabulary(model.decoder, [wanted.context for wanted in requests])
    texts = [""] * len(requests)
    # Only requests of the same options decode together; by (context, sample).
    alike: dict[Wanted, dict[tuple[Tokens, int], list[int]]] = {}
    for place, wanted in enumerate(requests):
        sample = place if wanted.sampling.temperature > 0 else 0
        places = alike.setdefault(wanted._replace(context=()), {})
        places.setdefault((tuple(wanted.context), sample), []).append(place)
    total, answered, number = sum(map(len, alike.values())), 0, 0
    for wanted, places in alike.items():
        before = answered
        for group, done in _batches(list(places), batch, key=lambda key: len(key[0])):
            options = _options(
                model,
                [context for context, _ in group],
                wanted.max_new_tokens,
                sampling=wanted.sampling,
                stop=wanted.stop,
                seed=(seed + number) % (1 << 32),
                chunk_size=chunk_size,
            )
            said = _said(model, method, [context for context, _ in group], options)
            for key, text in zip(group, said, strict=True):
                for place in places[key]:
                    texts[place] = text
            number += 1
            answered = before + round(done * len(places))
            progress(answered / total)
    return texts


def _said(model, method, contexts, options: Options) -> list[str]:
    """The texts that follow contexts."""
    prefilled = reader.read_whole(model, method, contexts, options)
    events = generate.go_on(model, method, prefilled, options)
    while True:
        try:
            next(events)
        except StopIteration as end:
            return [generation.text for generation in end.value]


def _options(model, contexts, new_tokens: int, **others: Any) -> Options:
    """Returns options of so many new tokens, with room for contexts of like lengths."""
    longest = max(map(len, contexts))
    rounded = min(rounded_up(longest), model.decoder.context)
    return Options(max_new_tokens=new_tokens, longest=max(longest, rounded), **others)


def rounded_up(tokens: int) -> int:
    """Returns a length at most half as long again, of two an octave.

    Requests of many lengths then need few programs.
    """
    step = max(LEAST, 1 << max(0, tokens.bit_length() - 2))
    return -(-tokens // step) * step


def _batches(
    items: list[Item], size: int, key: Callable[[Any], int] = len
) -> Iterator[tuple[list[Item], float]]:
    """Cuts items, longest first, into batches, and says what share is done after each.

    All have one size: the last is filled up with its first.
    """
    items = sorted(items, key=key, reverse=True)
    size = min(size, len(items))
    for start in range(0, len(items), max(size, 1)):
        group = items[start : start + size]
        filled = group + group[:1] * (size - len(group))
        yield filled, (start + len(group)) / len(items)


def _check(model, method, place: int, context: Sequence[int], following: int) -> None:
    """Raises ValueError unless a request's tokens that are fed fit the model."""
    if not context:
        raise ValueError(
            f"request {place} has no context: give it the token that begins a text."
        )
    decoder, fed = model.decoder, len(context) + following
    if fed > decoder.context and not accounting.reads_any_length(method, decoder):
        raise ValueError(
            f"request {place} takes {fed} tokens, a context of {len(context)} and what "
            f"follows it, more than the model's context of {decoder.context}: shorten "
            "either."
        )
    behind = "tokens behind the context"
    check_reach(method, decoder, len(context), following, named=behind)


def newest(context: Sequence[int], following: int, most: int) -> Tokens:
    """Returns the newest tokens of a context that leave room for what follows.

    Args:
        context: tokens.
        following: tokens fed behind it.
        most: tokens that are fed in all.

    Raises:
        ValueError: if no token of the context would be left.
    """
    room = most - following
    if room < 1:
        raise ValueError(
            f"{following} tokens behind a context leave no room for it in {most}: "
            "generate fewer, or raise max_length."
        )
    return tuple(context[-room:])


def windows(tokens: Sequence[int], begin: int, most: int) -> list[Pair]:
    """Cuts a text into pairs that together predict each of its tokens once.

    A window feeds `most` tokens. The first begins with `begin`, and each later one with
    the last token before it: of these the context is one token, and all others are
    decoded. The last window is as long as the others, if the text is: what the one
    before it has predicted already is its context.

    Args:
        tokens: of a whole text.
        begin: the token that a text begins with.
        most: tokens fed in a window.
    """
    if most < 1:
        raise ValueError(f"a window of {most=} tokens must have at least 1.")
    whole = (begin, *tokens)
    pairs = []
    for start in range(1, len(whole), most):
        end = min(start + most, len(whole))
        first = max(min(start - 1, end - most - 1), 0)
        pairs.append(Pair(whole[first:start], whole[start:end]))
    return pairs
