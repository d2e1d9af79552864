"""Prompt to text: a prefill in chunks, then one jitted loop whose states stay in place.

The loop runs up to `stream_every` steps on the device before the host looks at the
tokens: text streams, and no step waits. A model and a method are arguments here.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import interface
from kvjax.decoding import loop, timing
from kvjax.decoding.checks import (
    check_counts,
    check_model,
    check_options,
    check_prompts,
    token_rows,
)
from kvjax.decoding.detokenize import TextRow
from kvjax.decoding.finite import not_finite
from kvjax.decoding.hidden import last_hidden, newer
from kvjax.decoding.prompt_chunks import bucket, chunks, recent
from kvjax.decoding.sampling import Sampling, active, mentioned, row_keys
from kvjax.interface import DecoderLM, LanguageModel, Method, State, with_layer
from kvjax.registry import as_method
from kvjax.text.stream import CONTEXT

NO_TOKEN = -1  # where a row has none


class Generation(NamedTuple):
    """What one row produced."""

    tokens: list[int]  # generated, with the EOS token if there was one
    text: str  # without the EOS token, cut before a stop string
    finish_reason: str  # "eos", "stop" or "length"


class Prefilled(NamedTuple):
    """A prompt in the caches, ready to decode."""

    states: tuple[State, ...]  # one a layer, `finish` applied
    hidden: Float[Array, "B E"]  # of each row's last prompt token
    recent: Int[Array, "B R"]  # the newest `method.rows` tokens of each row
    # Those whose text the new one follows; `recent` if None.
    before: Int[np.ndarray, "B C"] | None = None


def generate(
    model: LanguageModel,
    method: Method | str,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    chunk_size: int = 512,
    stream_every: int = 16,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continues each prompt under a KV-cache method.

    A row's tokens do not depend on the other rows, only on its prompt, `seed` and its
    index in the batch (which enters the random key).

    Args:
        model: decoder, weights and tokenizer.
        method: any :class:`kvjax.Method`, or its spec, as `quest:budget=128`. Use one
            object, or one spec, for many calls: compiled code is kept per object.
        prompts: texts, or token ids, arrays of them too; of any lengths.
        max_new_tokens: most tokens a row generates, its EOS token included.
        sampling: greedy by default.
        stop: a row ends at the first token whose text completes one of these.
        eos_ids: tokens that end a row; None means the model's.
        seed: of the random keys.
        chunk_size: most prompt tokens processed at once.
        stream_every: decode steps between two looks of the host.
        on_text: called with `(row, new text)` while generating.

    Returns:
        One :class:`Generation` a prompt, in order.

    Raises:
        ValueError: if a prompt is empty, holds an id outside the vocabulary or is too
            long for the model's context (no prompt is, for a method of constant
            memory), if an argument is of another type or out of its range, or once
            logits are not finite: :class:`kvjax.decoding.finite.NotFiniteError`.
    """
    if on_text is not None and not callable(on_text):
        raise ValueError(f"{on_text=} must be a function of a row and its new text.")
    events = _start(
        model,
        as_method(method),
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        eos_ids=eos_ids,
        seed=seed,
        chunk_size=chunk_size,
        stream_every=stream_every,
    )
    while True:
        try:
            row, text = next(events)
        except StopIteration as end:
            return end.value
        if on_text is not None:
            on_text(row, text)


def stream(
    model: LanguageModel,
    method: Method | str,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    chunk_size: int = 512,
    stream_every: int = 16,
) -> Iterator[tuple[int, str]]:
    """:func:`generate` as an iterator of `(row, new text)`.

    What it yields for a row adds up to that row's text: nothing past a stop string, no
    beginning of one, and no part of a character.
    """
    return _start(
        model,
        as_method(method),
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        eos_ids=eos_ids,
        seed=seed,
        chunk_size=chunk_size,
        stream_every=stream_every,
    )


def prefill(
    model: LanguageModel,
    method: Method | str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    chunk_size: int = 512,
    longest: int = 0,
) -> Prefilled:
    """Runs the prompts through the model, leaving room for `max_new_tokens` each.

    Prompts of up to `longest` tokens then share their compiled code, even in buckets.

    Raises:
        ValueError: as :func:`generate`.
    """
    method = as_method(method)
    check_model(model)
    prompts = token_rows(prompts)
    check_prompts(model.decoder, method, prompts, max_new_tokens, chunk_size)
    longest = max(longest, *map(len, prompts))
    decoder, params = model.decoder, model.params
    with timing.stretch("prompt") as part:
        states = empty_states(decoder, method, len(prompts), longest, max_new_tokens)
        hidden = None
        for tokens, lengths in chunks(decoder, prompts, chunk_size, longest):
            states, newest = prefill_chunk(
                decoder, method, params, states, tokens, lengths
            )
            hidden = newer(timing.settled(newest), lengths, hidden)
        part.tokens = sum(map(len, prompts))
        return ended(method, states, hidden, prompts)


def ended(
    method: Method,
    states: tuple[State, ...],
    hidden: Float[Array, "B E"],
    prompts: Sequence[Sequence[int]],
) -> Prefilled:
    """Ends prompts that were read, up to `states` and `hidden`, which are used up."""
    newest = jnp.asarray(recent(prompts, method.rows))
    before = recent(prompts, CONTEXT, NO_TOKEN)
    states = timing.settled(finish(method, states))
    return Prefilled(states, hidden, newest, before)


def empty_states(
    decoder: DecoderLM, method: Method, batch: int, longest: int, max_new_tokens: int
) -> tuple[State, ...]:
    """States of every layer for prompts up to `longest` tokens, in bucketed sizes."""
    new_tokens = bucket(max_new_tokens)
    capacity = bucket(longest + new_tokens)
    specs = interface.layer_specs(decoder, batch, capacity, new_tokens)
    return _init(method, specs)


def finish(method: Method, states: tuple[State, ...]) -> tuple[State, ...]:
    """Ends the prompt. Layer by layer: at most one layer is held in both shapes."""
    states = list(states)
    for layer in range(len(states)):
        # Without the layer's number one program serves all. Not donated: shapes may
        # change, and a buffer passed through is not copied.
        finished = _finish(method, with_layer(states[layer], 0))
        states[layer] = with_layer(finished, layer)
    return tuple(states)


def drop_programs(*, reading: bool = True) -> None:
    """Frees what was compiled to decode, and to read prompts, of every method."""
    read = (_init, prefill_chunk, _finish) if reading else ()
    for program in (loop.first_token, loop.decode, *read):
        program.clear_cache()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(method, specs):
    return tuple(map(method.init, specs))


@functools.partial(jax.jit, static_argnums=0)
def _finish(method, state):
    return method.finish(state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill_chunk(decoder, method, params, states, tokens, lengths):
    """States with a chunk read, and its newest hidden states; `states` are used up.

    The first chunk and those behind it run the same program: see :func:`newer`.
    """
    states, hidden = decoder.prefill(params, states, tokens, lengths, method)
    return states, last_hidden(hidden, lengths, None)


def _start(model, method, prompts, *, stop, stream_every, sampling, **options):
    """Checks every argument now; the work begins with the first `next`."""
    check_model(model)
    check_options(sampling, stop, stream_every, options["seed"], options["eos_ids"])
    prompts = token_rows(prompts, model.tokenizer)
    check_prompts(
        model.decoder,
        method,
        prompts,
        options["max_new_tokens"],
        options["chunk_size"],
    )
    return _events(
        model,
        method,
        prompts,
        stop=tuple(stop),
        stream_every=stream_every,
        sampling=sampling,
        **options,
    )


def _events(
    model: LanguageModel,
    method: Method,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...],
    eos_ids: Sequence[int] | None,
    seed: int,
    chunk_size: int,
    stream_every: int,
) -> Generator[tuple[int, str], None, list[Generation]]:
    seen = None
    if active(sampling).repetition_penalty is not None:
        seen = mentioned(prompts, model.decoder.vocab_size)
    prefilled = prefill(
        model, method, prompts, max_new_tokens=max_new_tokens, chunk_size=chunk_size
    )
    return (
        yield from continued(
            model,
            method,
            prefilled,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            eos_ids=eos_ids,
            seed=seed,
            stream_every=stream_every,
            seen=seen,
        )
    )


def continued(
    model: LanguageModel,
    method: Method | str,
    prefilled: Prefilled,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    stream_every: int = 16,
    seen: Bool[np.ndarray, "B V"] | None = None,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """What :func:`stream` yields and :func:`generate` returns, from a prompt's end.

    `prefilled` is used up; it must have been made with room for `max_new_tokens`.
    `seen` are the tokens of each prompt, which a repetition penalty needs; other
    arguments as there.

    Raises:
        ValueError: as :func:`generate`, at once.
    """
    check_options(sampling, stop, stream_every, seed, eos_ids)
    check_model(model)
    check_counts(max_new_tokens=max_new_tokens)
    return _continued(
        model,
        as_method(method),
        prefilled,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=tuple(stop),
        eos_ids=eos_ids,
        seed=seed,
        stream_every=stream_every,
        seen=seen,
    )


def _continued(
    model,
    method,
    prefilled,
    *,
    max_new_tokens,
    sampling,
    stop,
    eos_ids,
    seed,
    stream_every,
    seen,
):
    decoder, params = model.decoder, model.params
    eos_ids = frozenset(model.eos_ids if eos_ids is None else eos_ids)
    eos_array = np.array(sorted(eos_ids), np.int32)
    sampling = active(sampling)
    states, hidden, window, before = prefilled
    batch = len(window)
    keys = None if sampling.temperature is None else row_keys(seed, batch)
    seen = None if sampling.repetition_penalty is None else seen
    none, all_rows = np.zeros(batch, bool), np.ones(batch, bool)
    tail = loop.Tail(window, none, all_rows, seen)
    with timing.stretch("prompt"):
        newest, tail = loop.first_token(
            decoder, params, hidden, tail, keys, sampling, eos_array
        )
        block, produced = np.asarray(newest)[:, None], 1
    behind = np.asarray(window if before is None else before)
    behind = [[token for token in row if token != NO_TOKEN] for row in behind.tolist()]
    rows = [
        TextRow(model.tokenizer, stop, eos_ids, max_new_tokens, row) for row in behind
    ]
    part = timing.Stretch("decode")  # of the block; the first comes of the prompt
    while True:
        finite = np.asarray(tail.finite)
        taken = sum(len(row.tokens) for row in rows)
        for index, row in enumerate(rows):
            said = block[index] if finite[index] else block[index, :-1]
            if row.finish_reason is not None or not len(said):
                continue
            text = row.push(said.tolist())
            part.tokens = sum(len(row.tokens) for row in rows) - taken
            if text:
                yield index, text
        done = np.array([row.finish_reason is not None for row in rows])
        if not (finite | done).all():
            row = int(np.argmin(finite | done))
            raise not_finite(decoder, f"at token {produced} of row {row}")
        if done.all():
            return [Generation(row.tokens, row.text, row.finish_reason) for row in rows]
        with timing.stretch("decode") as part:
            states, tail, block, count = loop.decode(
                decoder,
                method,
                stream_every,
                params,
                states,
                tail._replace(done=done, finite=all_rows),
                keys,
                np.int32(produced),
                np.int32(min(stream_every, max_new_tokens - produced)),
                sampling,
                eos_array,
            )
            block = np.asarray(block)[:, : int(count)]
        produced += int(count)
