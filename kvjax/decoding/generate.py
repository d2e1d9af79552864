"""Prompt to text: the reader of prompts, then blocks of the loop of decode steps.

The loop runs up to `stream_every` steps on the device before the host looks at the
tokens: text streams, and no step waits. A model and a method are arguments here.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.decoding import instructions, loop, reader, timing
from kvjax.decoding.checks import check_model, check_prompts, token_rows
from kvjax.decoding.detokenize import TextRow
from kvjax.decoding.finite import is_finite, not_finite
from kvjax.decoding.options import Options
from kvjax.decoding.reader import NO_TOKEN, PAD, Prefilled
from kvjax.decoding.reader import prefill as prefill
from kvjax.decoding.sampling import Sampling, active, mentioned, row_keys, sample
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method


class Generation(NamedTuple):
    """The tokens and the text that one row produced."""

    tokens: list[int]  # generated, with the EOS token if there was one
    text: str  # without the EOS token, cut before a stop string
    finish_reason: str  # "eos", "stop" or "length"


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
    instruction: int | Sequence[int] | None = None,
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
        chunk_size: most prompt tokens processed at once; a second reading takes the
            method's own `chunk`.
        stream_every: decode steps between two looks of the host.
        instruction: tokens at the end of every prompt, or a list with a number for
            each, that say what is wanted of the rest: for methods that select by them,
            such as `citrus`. None is as many as the method takes by itself.
        on_text: called with `(row, new text)` while generating.

    Returns:
        One :class:`Generation` a prompt, in order.

    Raises:
        ValueError: if a prompt is empty, holds an id outside the vocabulary or is too
            long for the model's context (no prompt is, for a method of constant
            memory; what is read a second time has to fit behind the prompt), if an
            argument is of another type or out of its range, or once logits are not
            finite: :class:`kvjax.decoding.finite.NotFiniteError`.
    """
    if on_text is not None and not callable(on_text):
        raise ValueError(f"{on_text=} must be a function of a row and its new text.")
    options = Options(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        eos_ids=eos_ids,
        seed=seed,
        chunk_size=chunk_size,
        stream_every=stream_every,
        instruction=instruction,
    )
    events = _start(model, method, prompts, options)
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
    instruction: int | Sequence[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yields `(row, new text)` while it continues the prompts as :func:`generate` does.

    What it yields for a row adds up to that row's text: nothing past a stop string, no
    beginning of one, and no part of a character.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        eos_ids=eos_ids,
        seed=seed,
        chunk_size=chunk_size,
        stream_every=stream_every,
        instruction=instruction,
    )
    return _start(model, method, prompts, options)


def _start(model, method, prompts, options: Options):
    """Checks every argument now; the work begins with the first `next`."""
    method = as_method(method)
    check_model(model)
    prompts = token_rows(prompts, model.tokenizer)
    check_prompts(model, method, prompts, options.max_new_tokens)
    instructions.counts(method, prompts, options.instruction)
    return _events(model, method, prompts, options)


def _events(
    model: LanguageModel, method: Method, prompts: list[list[int]], options: Options
) -> Generator[tuple[int, str], None, list[Generation]]:
    seen = None
    if active(options.sampling).repetition_penalty is not None:
        seen = mentioned(prompts, model.decoder.vocab_size)
    prefilled = reader.read_whole(model, method, prompts, options)
    return (yield from go_on(model, method, prefilled, options, seen))


def continued(
    model: LanguageModel,
    method: Method | str,
    prefilled: Prefilled,
    *,
    max_new_tokens: int,
    seen: Bool[np.ndarray, "B V"] | None = None,
    **options: Any,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Continues prompts that were read: yields as :func:`stream`.

    The generator returns what :func:`generate` does.

    Args:
        prefilled: the prompts, read with room for `max_new_tokens`; used up.
        max_new_tokens: most tokens a row generates.
        seen: tokens of each prompt, which a repetition penalty needs.
        **options: others of :func:`generate`: `sampling`, `stop`, `eos_ids`, `seed`,
            `stream_every`.

    Raises:
        ValueError: as :func:`generate`, at once.
    """
    checked = Options(max_new_tokens=max_new_tokens, **options)
    check_model(model)
    return go_on(model, as_method(method), prefilled, checked, seen)


class Forced(NamedTuple):
    """The tokens that rows are fed before they choose their own: questions, say."""

    tokens: Int[np.ndarray, "B Q"]  # right-padded
    lengths: Int[np.ndarray, "B"]


def go_on(
    model: LanguageModel,
    method: Method,
    prefilled: Prefilled,
    options: Options,
    seen: Bool[np.ndarray, "B V"] | None = None,
    forced: Forced | None = None,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Runs :func:`continued` with options that were checked.

    Args:
        forced: what each row is fed first, by the same steps, and what its text comes
            behind. A row whose tokens end sooner chooses while others are still fed.
    """
    decoder, params, eos_ids = model.decoder, model.params, options.ends(model)
    eos_array = np.array(sorted(eos_ids), np.int32)
    sampling = active(options.sampling)
    states, hidden, window, before, _ = prefilled
    batch = len(window)
    keys = None if sampling.temperature is None else row_keys(options.seed, batch)
    seen = None if sampling.repetition_penalty is None else seen
    given = keys, sampling, eos_array
    # Of each row's tokens, how many it did not choose.
    fed = np.zeros(batch, np.int32)
    if forced is not None:
        given, fed = (*given, *forced), forced.lengths
    most = options.max_new_tokens + int(fed.max())
    none, all_rows = np.zeros(batch, bool), np.ones(batch, bool)
    with timing.stretch("prompt"):
        tail = Tail(np.zeros(batch, np.int32), none, all_rows, np.int32(batch), seen)
        newest, tail, tokens = loop.first(SAMPLED)(
            decoder, params, hidden, window, tail, given
        )
        block, produced = np.asarray(tokens)[:, None], 1
    stop = tuple(options.stop)
    rows = [
        TextRow(model.tokenizer, stop, eos_ids, options.max_new_tokens, row)
        for row in _behind(window if before is None else before, forced)
    ]
    part = timing.Stretch("decode")  # of the block; the first comes of the prompt
    while True:
        finite = np.asarray(tail.finite)
        had = sum(len(row.tokens) for row in rows)
        skipped = np.maximum(fed - (produced - block.shape[1]), 0)
        for index, row in enumerate(rows):
            new = block[index] if finite[index] else block[index, :-1]
            new = new[skipped[index] :]
            if row.finish_reason is not None or not len(new):
                continue
            text = row.push(new.tolist())
            part.tokens = sum(len(row.tokens) for row in rows) - had
            if text:
                yield index, text
        done = np.array([row.finish_reason is not None for row in rows])
        if not (finite | done).all():
            row = int(np.argmin(finite | done))
            raise not_finite(decoder, f"at token {produced} of row {row}")
        if done.all():
            return [
                Generation(row.tokens, row.text, str(row.finish_reason)) for row in rows
            ]
        with timing.stretch("decode") as part:
            left = most - produced
            taken = loop.steps(SAMPLED)(
                decoder,
                method,
                options.stream_every,
                params,
                states,
                newest,
                tail._replace(done=done, finite=all_rows),
                given,
                np.int32(min(options.stream_every, left)),
            )
            states, newest, tail = taken.states, taken.window, taken.memory
            count = int(taken.taken)
            block = np.asarray(taken.kept[0])[:count].T
        produced += count


def _behind(window: Array | np.ndarray, forced: Forced | None) -> list[list[int]]:
    """Returns the tokens that each row's text comes behind, or the last of them."""
    behind = [
        [token for token in row if token != NO_TOKEN]
        for row in np.asarray(window).tolist()
    ]
    if forced is None:
        return behind
    pairs = zip(forced.tokens.tolist(), forced.lengths.tolist(), strict=True)
    questions = [tokens[:length] for tokens, length in pairs]
    return [[*a, *b] for a, b in zip(behind, questions, strict=True)]


class Tail(NamedTuple):
    """The facts that a step remembers of each row, beside states and window."""

    chosen: Int[Array | np.ndarray, "B"]  # tokens, forced ones too
    done: Bool[Array | np.ndarray, "B"]
    finite: Bool[Array | np.ndarray, "B"]  # the logits that chose the newest token were
    enough: Int[Array | np.int32, ""]  # rows that are done for the steps to end
    seen: Bool[Array | np.ndarray, "B V"] | None  # only under a repetition penalty


def _sampled(logits, index, tail, given):
    """Returns the next tokens twice, the tail with them in between.

    Where tokens are forced, a row samples its first with the key that it has alone.
    """
    del index
    keys, sampling, eos_ids, *forced = given
    number = jnp.maximum(tail.chosen - forced[1], 0) if forced else tail.chosen
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, number)
    tokens = sample(keys, logits, tail.seen, sampling)
    ends = (tokens[:, None] == eos_ids).any(-1)
    if forced:
        index = tail.chosen[:, None]
        told = jnp.take_along_axis(forced[0], index, axis=1, mode="clip")[:, 0]
        is_told = tail.chosen < forced[1]
        tokens, ends = jnp.where(is_told, told, tokens), ends & ~is_told
    tokens = jnp.where(tail.done, PAD, tokens)
    finite = is_finite(logits) | tail.done
    seen = tail.seen
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.size), tokens].set(True)
    tail = Tail(tail.chosen + 1, tail.done | ends, finite, tail.enough, seen)
    return tokens, tail, tokens


def _is_over(tail: Tail) -> Bool[Array, ""]:
    """Says whether enough rows are done, or one is broken."""
    return (tail.done.sum() >= tail.enough) | ~tail.finite.all()


SAMPLED = loop.Rule(_sampled, _is_over)


def drop_programs(*, reading: bool = True) -> None:
    """Frees what was compiled to decode, and to read prompts, of every method."""
    loop.drop_programs(SAMPLED)
    if reading:
        reader.drop_programs()
