"""Methods run on the inputs of a comparison: questions, and how fast a prompt is read.

Methods of exact prompts read every prompt together (`together`), then each decodes from
what it kept. Batches have equal sizes, so that compiled code serves all of them.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from kvjax.attention.choices import check_choice
from kvjax.decoding import feeding, finite, generate, instructions, reader
from kvjax.decoding.checks import check_prompts
from kvjax.decoding.options import Options
from kvjax.evaluation import asked_after, batches, fidelity, together
from kvjax.evaluation.asked_after import When
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import LanguageModel, Method

# (place of the method, number of the first example, answers)
OnAnswers = Callable[[int, int, list[str]], None]


class Retrieval(NamedTuple):
    """Answers of a method."""

    scores: list[float]  # one an example, in [0, 1]
    answers: list[str]


def retrieve(
    model: LanguageModel,
    methods: Sequence[Method],
    examples: Sequence[Prompted],
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    longest: int = 0,
    room: int = 0,
    question: str = "seen",
    keep_logits: bool = False,
    beside: Sequence[Method] = (),
    threads: int = 1,
    on_answers: OnAnswers = lambda place, first, said: None,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Retrieval]:
    """Answers the examples under each method, greedily.

    A batch generates until its last answer ends, or what its longest one may take;
    examples of one task belong side by side.

    Args:
        methods: which read together; several must all have exact prompts.
        longest: tokens of a prompt to make room for, where none is so long; see
            :func:`kvjax.decoding.reader.prefill`.
        room: tokens to make room for behind a prompt, if more than these take.
        question: `seen` reads it as the end of the prompt, and tells methods that
            select by it where it begins; `after` reads the context alone, and once it
            has ended decodes the questions about it, as
            :func:`kvjax.evaluation.asked_after.answers` does.
        keep_logits: decode by the program of :mod:`kvjax.evaluation.continuations`,
            which keeps them: with as much room it is compiled once for both.
        beside: methods of exact prompts that read along and answer nothing: what reads
            for the same methods later is then compiled.
        threads: methods that answer at the same time.
        on_answers: called with a method's place, the number of a batch's first example,
            and what was answered, batch by batch; of questions asked `after`, one by
            one, or with several threads a method's at a time.

    Raises:
        ValueError: as :func:`kvjax.decoding.generate.generate`; if `question` is
            unknown, or an example without a context is to be asked `after`.
    """
    check_choice("question", question, When)
    if question == "after":
        after = asked_after.answers(
            model,
            methods,
            examples,
            new_tokens=new_tokens,
            batch=batch,
            chunk_size=chunk_size,
            longest=longest,
            room=room,
            keep_logits=keep_logits,
            beside=beside,
            threads=threads,
            on_answer=lambda place, index, said: on_answers(place, index, [said]),
            progress=progress,
        )
        return [_scored(examples, said) for said in after]
    prompts = [example.prompt for example in examples]
    check_prompts(model, together.as_one(methods), prompts, new_tokens)
    room = max(room, new_tokens)
    options = Options(max_new_tokens=room, chunk_size=chunk_size, longest=longest)
    answers: list[list[str]] = [[] for _ in methods]
    groups = list(batches.equal(examples, batch))
    for index, group in enumerate(groups):
        batches.release()
        prompts = [example.prompt for example in group]
        told = dataclasses.replace(options, instruction=_instructions(methods, group))
        read = together.read_checked(model, [*beside, *methods], prompts, told)
        batches.release()
        # A few tokens more than the answer's: text may begin with a blank.
        answer = max(example.answer_tokens for example in group) + 2
        wanted = np.full((batch, min(answer, new_tokens)), feeding.CHOOSE, np.int32)

        def answered(place, read=read, wanted=wanted, group=group):
            with batches.told_apart(place):
                fed = feeding.feed(
                    model,
                    methods[place],
                    read.take(len(beside) + place),
                    wanted,
                    return_logits=keep_logits,
                    until_end=True,
                )
                finite.check_rows(model.decoder, fed.log_probs)
            return fed.tokens.tolist()

        places = range(len(methods))
        for place, found in enumerate(batches.at_once(answered, places, threads)):
            # Here, where one thread runs: a tokenizer may bear no more.
            pairs = zip(group, found, strict=True)
            said = [batches.reply(model, *pair) for pair in pairs]
            answers[place] += said
            # What fills the last batch up has been answered before.
            first = index * batch
            on_answers(place, first, said[: len(examples) - first])
            progress((index + (place + 1) / len(methods)) / len(groups))
        read.drop()
    return [_scored(examples, said) for said in answers]


def _instructions(
    methods: Sequence[Method], examples: Sequence[Prompted]
) -> tuple[int, ...] | None:
    """Returns the tokens of each question, for a method that wants to be told."""
    asked = methods[0].hooks.asked
    if asked is None:
        return None
    prompts = [example.prompt for example in examples]
    starts = [example.asked_at for example in examples]
    return instructions.of_questions(asked, prompts, starts)


def _scored(examples: Sequence[Prompted], said: Sequence[str]) -> Retrieval:
    """Scores the answers; those that only fill a batch up do not count."""
    said = list(said[: len(examples)])
    pairs = zip(examples, said, strict=True)
    return Retrieval([example.score(text) for example, text in pairs], said)


def compile_reading(
    model: LanguageModel,
    method: Method,
    tokens: Sequence[int],
    *,
    new_tokens: int,
    chunk_size: int = 512,
) -> None:
    """Compiles what :func:`seconds_to_read` times, by reading a chunk of the prompt."""
    decoder = model.decoder
    if asked := method.hooks.asked:  # two chunks, and all that is done between them
        few = tokens[-(2 * asked.stride + asked.tokens) :]
        options = {"new_tokens": new_tokens, "chunk_size": chunk_size}
        seconds_to_read(model, method, few, longest=len(tokens), **options)
        return
    begun = reader.begin(decoder, method, 1, len(tokens), new_tokens)
    granule = method.hooks.granule
    first = next(reader.chunks(decoder, [tokens], chunk_size, granule=granule))
    read = reader.read(model, method, begun, [first])
    jax.block_until_ready(reader.finish(model, method, read, [tokens]))


def seconds_to_read(
    model: LanguageModel,
    method: Method,
    tokens: Sequence[int],
    *,
    new_tokens: int,
    chunk_size: int = 512,
    longest: int = 0,
) -> float:
    """Returns the seconds that one row's prompt takes the method alone.

    Those of compiling are among them, unless :func:`compile_reading` came before, or
    another prompt of the same `longest`.
    """
    start = time.perf_counter()
    read = reader.prefill(
        model,
        method,
        [tokens],
        max_new_tokens=new_tokens,
        chunk_size=chunk_size,
        longest=longest,
    )
    jax.block_until_ready(read)
    return time.perf_counter() - start


def drop_programs() -> None:
    """Frees the programs of the methods that have run: 30 layers are 100 MB each."""
    generate.drop_programs()
    feeding.drop_programs()
    fidelity.drop_programs()
    gc.collect()
    batches.release()
