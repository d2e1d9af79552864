"""The same inputs decoded under each method, and what it cost: one row a method.

Rows come as they are done. Methods of exact prompts go in groups that read together: as
many as the memory has room for.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from kvjax import accounting
from kvjax.decoding.finite import NotFiniteError
from kvjax.evaluation import (
    answers,
    compare_rows,
    compare_runs,
    continuations,
    fidelity,
    together,
)
from kvjax.evaluation.answers import Answered
from kvjax.evaluation.compare_inputs import Inputs, Settings
from kvjax.evaluation.compare_rows import Results, Row
from kvjax.interface import DecoderLM, LanguageModel, Method, layer_specs

Progress = Callable[[str, float], None]  # (method, fraction of its work that is done)

# Bytes of a group of methods that reads together: its states, and its programs.
ROOM = 1_350_000_000
PROGRAMS = 3_000_000  # bytes a layer, of each of these methods, on a CPU
WORTH = 5  # methods that read together: worth more than a larger batch


def compare(
    model: LanguageModel,
    methods: Mapping[str, Method],
    inputs: Inputs,
    settings: Settings,
    *,
    reference: str = "full",
    known: Collection[str] = (),
    room: int = ROOM,
    on_row: Callable[[Row], None] = lambda row: None,
    on_answer: Answered = answers.ignore,
    progress: Progress = lambda method, fraction: None,
) -> Results:
    """Runs every method on the same inputs.

    On a CPU part of it may run in other threads, which settings made by JAX's context
    managers do not reach: make them by `jax.config.update`.

    Args:
        model: decoder, weights and tokenizer.
        methods: by the name they have in the result, `reference` among them.
        inputs: from :func:`kvjax.evaluation.compare_inputs.make_inputs` with the same
            settings.
        settings: see :class:`kvjax.evaluation.compare_inputs.Settings`.
        reference: what the others are compared with.
        known: names of methods that have a row already, from an earlier call.
        room: bytes of methods that read a prompt together, states and programs.
        on_row: called with each row as it is done, whatever the order.
        on_answer: called with every answer as it comes, before its row is done. The
            tasks of questions that come `after` end in `_after`.
        progress: called while working.

    Returns:
        :class:`Results`: a row a method, without the known; the reference first, then
        in the order of `methods`.

    Raises:
        ValueError: if `reference` is missing, a method cannot hold these shapes, lists
            other heads than the model has, or its logits are not finite; names it.
    """
    if reference not in methods:
        raise ValueError(f"{reference=} is not among {', '.join(methods)}: add it.")
    for method in methods.values():
        accounting.check_diagnostics(method, model.decoder)
    order = [reference, *(name for name in methods if name != reference)]
    sizes = {name: _bytes(model, method, settings) for name, method in methods.items()}
    wanted = {name: methods[name] for name in order if name not in known}
    if not wanted:
        return Results(())
    shapes: dict[str, Any] = {
        "new_tokens": settings.new_tokens,
        "batch": settings.batch,
        "chunk_size": settings.chunk_size,
        "room": _room_behind(inputs, settings),
    }
    with _named([reference]):
        expected = continuations.expect(
            model, methods[reference], inputs.windows, **shapes
        )
    compare_runs.drop_programs()
    prompt = inputs.windows[0][: settings.context - settings.new_tokens]
    rows = {}
    for names in groups(model.decoder, wanted, methods[reference], settings, room):
        group = [methods[name] for name in names]
        threads = _threads(model.decoder, group, settings, room)
        # Where most of the time is compiling, questions are read by the program that
        # reads the windows; elsewhere the reference would only take room.
        beside = ()
        if threads > 1 and all(method.exact_prompt for method in group):
            beside = continuations.read_beside(methods[reference], group)

        def report(fraction, names=names):
            for name in names:
                progress(name, fraction)

        report(0.0)
        compile_reading = functools.partial(
            compare_runs.compile_reading,
            model,
            tokens=prompt,
            new_tokens=settings.new_tokens,
            chunk_size=settings.chunk_size,
        )
        with _named(names):
            with _meanwhile(compile_reading, group if threads > 1 else []):
                answered = _ask(
                    *(model, names, group, beside, inputs, settings, shapes),
                    *(threads, on_answer, report),
                )
            followed = continuations.follow(
                model,
                methods[reference],
                group,
                inputs.windows,
                expected,
                threads=threads,
                progress=lambda done, report=report: report(0.7 + 0.25 * done),
                **shapes,
            )
        if threads == 1:
            compare_runs.drop_programs()
        for place, (name, losses) in enumerate(zip(names, followed, strict=True)):
            if threads == 1:
                compile_reading(methods[name])
            seconds = compare_runs.seconds_to_read(
                model,
                methods[name],
                prompt,
                new_tokens=settings.new_tokens,
                chunk_size=settings.chunk_size,
            )
            if threads == 1 or place == len(names) - 1:
                compare_runs.drop_programs()
            layers = losses.layers
            counted = sizes[name]._replace(
                measured=measured_bytes(model, methods[name], layers, settings),
                moved=float(layers.moved.mean(1).sum()),
            )
            scores = {when: found[place].scores for when, found in answered.items()}
            rows[name] = compare_rows.make_row(
                name,
                counted,
                inputs,
                scores,
                losses,
                expected.continued,
                seconds,
            )
            if name == reference:
                rows[name] = compare_rows.reference_row(rows[name])
            progress(name, 1.0)
            on_row(rows[name])
    return Results(tuple(rows[name] for name in wanted))


def _threads(decoder, group, settings, room) -> int:
    """Threads for what is not timed: two where a group's states take little room.

    With small models most of the time is compiling, which takes one core. A large one
    takes all cores, and its memory is not there twice. An accelerator runs one at a
    time, and its memory is short.
    """
    if jax.default_backend() != "cpu":
        return 1
    held = settings.batch * bytes_together(decoder, group, settings)
    return 2 if 8 * held <= room else 1


@contextlib.contextmanager
def _meanwhile(job: Callable[[Method], None], methods: Sequence[Method]):
    """Does the job with one method after the other, in one thread beside this one.

    It is over behind this.
    """
    pool = ThreadPoolExecutor(1)
    try:
        done = [pool.submit(job, method) for method in methods]
        yield
        for one in done:
            one.result()
    finally:  # after an error, or an interrupt, what waits is not begun
        pool.shutdown(cancel_futures=True)


def _ask(
    model, names, group, beside, inputs, settings, shapes, threads, on_answer, report
) -> dict[str, list[compare_runs.Retrieval]]:
    """The answers of methods that read together, by when the questions come."""
    numbered = [
        (task, index, example)
        for task in compare_rows.TASKS
        for index, example in enumerate(getattr(inputs, task))
    ]
    examples = [example for _, _, example in numbered]
    found = {}
    for part, when in enumerate(settings.questions):

        def tell(place, first, said, suffix=compare_rows.SUFFIX[when]):
            for number, text in enumerate(said, first):
                task, index, example = numbered[number]
                on_answer(names[place], task + suffix, index, example, text)

        def so_far(done, part=part):
            report(0.7 * (part + done) / len(settings.questions))

        found[when] = compare_runs.retrieve(
            model,
            group,
            examples,
            longest=settings.context - settings.new_tokens,
            question=when,
            keep_logits=True,
            beside=beside,
            threads=threads,
            on_answers=tell,
            progress=so_far,
            **shapes,
        )
    return found


def _room_behind(inputs: Inputs, settings: Settings) -> int:
    """Tokens to make room for behind every prompt, so that programs are shared.

    Behind a context come its question and the answer.
    """
    if settings.question == "seen":
        return settings.new_tokens
    examples = [x for task in compare_rows.TASKS for x in getattr(inputs, task)]
    asked = max(len(example.prompt) - example.asked_at for example in examples)
    return settings.new_tokens + asked


@contextlib.contextmanager
def _named(names: Sequence[str]):
    """Names the method whose logits are not finite in the error."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{names[error.place]}: {error}") from error


def batch_that_fits(
    decoder: DecoderLM,
    methods: Mapping[str, Method],
    settings: Settings,
    room: int,
    most: int = 8,
) -> int:
    """Rows to decode together: a power of two, with room for several methods to read.

    No more than there are windows: a batch is filled up with rows that do not count.
    """
    exact = [method for method in methods.values() if _reads_with_others(method)]
    group = exact[:WORTH] or list(methods.values())[:1]
    row = bytes_together(decoder, group, settings)
    room -= _bytes_of_programs(decoder, len(group))
    batch = 1
    while 2 * batch <= min(most, settings.windows) and 2 * batch * row <= room:
        batch *= 2
    return batch


def groups(
    decoder: DecoderLM,
    methods: Mapping[str, Method],
    reference: Method,
    settings: Settings,
    room: int,
) -> list[list[str]]:
    """The names of methods that read a prompt together, with the reference.

    Methods of exact prompts fill `room` bytes with their states and programs; at least
    one goes with the reference, whatever its size. Others are alone, and so is one that
    reads its prompt again, which would have the others wait.
    """
    joined = [name for name, method in methods.items() if _reads_with_others(method)]
    readers = tuple(dict.fromkeys([reference, *(methods[name] for name in joined)]))
    kept = _kept(readers, decoder, settings.context, settings.new_tokens)
    kept_by = dict(zip(readers, kept, strict=True))
    grouped: list[list[str]] = []
    for name in joined:
        wider = [*(grouped[-1] if grouped else ()), name]
        row = _bytes_of([kept[0], *(kept_by[methods[name]] for name in wider)])
        programs = _bytes_of_programs(decoder, len(wider))
        if grouped and settings.batch * row + programs <= room:
            grouped[-1] = wider
        else:
            grouped.append([name])
    return grouped + [[name] for name in methods if name not in joined]


def _reads_with_others(method: Method) -> bool:
    return method.exact_prompt and method.reread is None


def _bytes_of_programs(decoder: DecoderLM, count: int) -> int:
    """Returns what the programs of so many methods take where the states are."""
    is_there = jax.default_backend() == "cpu"
    return is_there * count * PROGRAMS * decoder.num_layers


def bytes_together(
    decoder: DecoderLM, methods: Iterable[Method], settings: Settings
) -> int:
    """Returns the bytes of a row's states while methods read it together, and decode.

    Each array that several of them keep is there once. What decodes uses its states up,
    so it is given a copy, beside one of the reference's.
    """
    sizes = settings.context, settings.new_tokens
    return _bytes_of(_kept(tuple(dict.fromkeys(methods)), decoder, *sizes))


def _bytes_of(kept: Sequence[Mapping[Any, int]]) -> int:
    arrays = {name: size for own in kept for name, size in own.items()}
    return sum(arrays.values()) + 2 * max(sum(own.values()) for own in kept)


@functools.cache
def _kept(methods, decoder, context, new_tokens) -> list[dict[Any, int]]:
    specs = layer_specs(decoder, 1, context, new_tokens)
    return together.kept(methods, specs)


def _bytes(model, method, settings) -> compare_rows.Bytes:
    decoder, new_tokens = model.decoder, settings.new_tokens
    read = accounting.bytes_read(method, decoder, settings.context, new_tokens)
    specs = layer_specs(decoder, 1, settings.context, new_tokens)
    held = [kept for _, kept in accounting.held(method, specs)]
    device, host = (sum(x) for x in zip(*held, strict=True))
    prompt = settings.context - new_tokens
    share = accounting.prompt_share(method, decoder, prompt)
    return compare_rows.Bytes(read, device=device, host=host, prompt_share=share)


def measured_bytes(
    model: LanguageModel,
    method: Method,
    layers: fidelity.LayerFidelity,
    settings: Settings,
) -> float:
    """Bytes of cache a decode step of one row read, all layers.

    Keys and values of the tokens that were attended to, counted, and what is read only
    to choose, taken for the same at every step: where a method chooses at some of them
    (`refreshed`) it reads less. One that chooses by the very keys it then attends to
    has these counted twice.
    """
    decoder, context, new_tokens = model.decoder, settings.context, settings.new_tokens
    specs = layer_specs(decoder, 1, context, new_tokens)
    tokens = [accounting.token_bytes(method, x) / x.num_kv_heads for x in specs]
    chosen = accounting.traffic(method, decoder, context, new_tokens).metadata
    return float(layers.read.mean(1) @ np.asarray(tokens)) + chosen
