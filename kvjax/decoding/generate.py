"""Prompt to text: the reader of prompts, then blocks of the loop of decode steps.

With a draft, blocks of passes that check several tokens at once instead.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from kvjax.decoding import drafting, instructions, loop, reader
from kvjax.decoding.checks import check_model, check_prompts, token_rows
from kvjax.decoding.continuing import SAMPLED as SAMPLED
from kvjax.decoding.continuing import Forced as Forced
from kvjax.decoding.continuing import Generation as Generation
from kvjax.decoding.continuing import Tail as Tail
from kvjax.decoding.continuing import go_on as go_on
from kvjax.decoding.options import Options
from kvjax.decoding.reader import PAD as PAD
from kvjax.decoding.reader import Prefilled as Prefilled
from kvjax.decoding.reader import prefill as prefill
from kvjax.decoding.sampling import Sampling, active, mentioned
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method


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
    draft: Method | str | None = None,
    draft_tokens: int = 6,
    draft_model: LanguageModel | None = None,
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
        draft: a method, or its spec, that drafts tokens for `method` to check, several
            in a pass: see :mod:`kvjax.decoding.drafting`. The text is the same, sampled
            text in distribution.
        draft_tokens: most tokens of a draft.
        draft_model: a smaller model of the same vocabulary that drafts, under `draft`
            or `full`.
        on_text: called with `(row, new text)` while generating.

    Returns:
        One :class:`Generation` a prompt, in order.

    Raises:
        ValueError: if a prompt is empty, holds an id outside the vocabulary or is too
            long for the model's context (no prompt is, for a method of constant
            memory; what is read a second time has to fit behind the prompt), if an
            argument is of another type or out of its range, if `method` cannot check a
            draft, or once logits are not finite:
            :class:`kvjax.decoding.finite.NotFiniteError`.
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
        drafting=drafting.wanted(draft, draft_tokens, draft_model),
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
    draft: Method | str | None = None,
    draft_tokens: int = 6,
    draft_model: LanguageModel | None = None,
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
        drafting=drafting.wanted(draft, draft_tokens, draft_model),
    )
    return _start(model, method, prompts, options)


def _start(model, method, prompts, options: Options):
    """Checks every argument now; the work begins with the first `next`."""
    method = as_method(method)
    check_model(model)
    prompts = token_rows(prompts, model.tokenizer)
    if options.drafting is not None:
        other = options.drafting.model
        drafter = drafting.drafter(model, method, options.drafting)
        drafting.check_prompts(model, other, drafter, prompts, options)
        return drafting.events(model, other, drafter, prompts, options)
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


def drop_programs(*, reading: bool = True) -> None:
    """Frees what was compiled to decode, and to read prompts, of every method."""
    loop.drop_programs(SAMPLED)
    drafting.drop_programs()
    if reading:
        reader.drop_programs()
