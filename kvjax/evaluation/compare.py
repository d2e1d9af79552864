"""The same inputs decoded under each method, and what it cost: one row a method.

Rows come as they are done. Methods of exact prompts go in groups that read together: as
many as the memory has room for.
"""

import contextlib
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kvjax import accounting
from kvjax.decoding.finite import NotFiniteError
from kvjax.evaluation import (
    answers,
    compare_runs,
    continuations,
    fidelity,
    percentiles,
    records,
    statistics,
)
from kvjax.evaluation.answers import Answered
from kvjax.evaluation.compare_inputs import Inputs, Settings
from kvjax.evaluation.statistics import Interval
from kvjax.evaluation.tasks.needles import Example
from kvjax.interface import DecoderLM, LanguageModel, Method
from kvjax.stores import buffers

Progress = Callable[[str, float], None]  # (method, fraction of its work that is done)

# Bytes of the states that a group of methods holds while it reads together.
ROOM = 1_150_000_000
GROUP = 5  # methods that read together at most, and are worth more than a batch

# Fields of `Inputs`, in the order they are answered in.
TASKS = ("own", "passkey", "multikey", "chain")
# What the fields of a row, and tasks in a file of answers, end in.
SUFFIX = {"seen": "", "after": "_after"}


# Intervals of the fields of `LayerFidelity`: an error has no upper bound.
OF_LAYERS: dict[str, Callable[[ArrayLike], Interval]] = {
    "error": statistics.amount_interval,
    "dropped": statistics.share_interval,
    "support": statistics.share_interval,
    "exact": statistics.share_interval,
    "refreshed": statistics.share_interval,
}

ByDepth = tuple[tuple[float, int, int], ...]  # (depth, correct, asked)


class Row(NamedTuple):
    """One method's line of the comparison."""

    method: str
    bytes_read: int  # of cache, per decoded token of one row at the full context: most
    bytes_measured: float  # what was read of it, mean over steps; see `measured_bytes`
    bytes_held: int  # of cache, while decoding, per row
    # Against the reference, on the same tokens; over windows.
    kl: Interval  # KL(reference || method), nats per token
    kl_p99: Interval  # its 99th percentile over tokens; see `percentile_interval`
    top1_agreement: Interval  # same likeliest token as the reference
    # Tokens chosen greedily before the first that the reference does not choose, of
    # `new_tokens` behind each window's prompt.
    tokens_before_difference: Interval
    perplexity: Interval  # of tokens predicted by decode steps; over windows
    nats_lost: Interval  # log-probability given away per token, paired with reference
    # Of the layers, each fed what the reference's is; means over heads, over windows.
    output_error: Interval  # relative L2 error of the attention output
    dropped_mass: Interval  # of the reference's attention, on what was not attended to
    support: Interval  # share of the tokens with weight that was attended to
    proved_exact: Interval  # share of heads and steps: `Diagnostics.exact`
    full_steps: Interval  # share of steps and layers: `Diagnostics.refreshed`
    tokens_per_second: float  # median over batches of windows, all rows together
    prefill_seconds: float  # of one row's prompt, read alone
    chain_links: int  # asked for
    # Questions that end the prompt: seen when a method chooses what to keep.
    passkey: Interval | None = None
    multikey: Interval | None = None
    chain: Interval | None = None  # share of the links before the first mistake
    own: Interval | None = None  # the user's questions
    passkey_by_depth: ByDepth | None = None
    multikey_by_depth: ByDepth | None = None
    # Questions that come after that, to the context that is kept.
    passkey_after: Interval | None = None
    multikey_after: Interval | None = None
    chain_after: Interval | None = None
    own_after: Interval | None = None
    passkey_after_by_depth: ByDepth | None = None
    multikey_after_by_depth: ByDepth | None = None


class Results(NamedTuple):
    """The rows of a comparison."""

    rows: tuple[Row, ...]  # the reference first

    def columns(self) -> dict[str, list[Any]]:
        """The rows as :func:`kvjax.evaluation.records.columns`: a column a number."""
        return records.columns(self.rows)

    def to_pandas(self) -> Any:
        """The columns as a `pandas.DataFrame`.

        Raises:
            ImportError: if pandas is not installed.
        """
        if importlib.util.find_spec("pandas") is None:
            raise ImportError(
                "to_pandas needs the package pandas: pip install pandas, or use "
                "columns()."
            )
        return importlib.import_module("pandas").DataFrame(self.columns())


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

    Args:
        model: decoder, weights and tokenizer.
        methods: by the name they have in the result, `reference` among them.
        inputs: from :func:`kvjax.evaluation.compare_inputs.make_inputs` with the same
            settings.
        settings: see :class:`kvjax.evaluation.compare_inputs.Settings`.
        reference: what the others are compared with.
        known: names of methods that have a row already, from an earlier call.
        room: bytes of the states of methods that read a prompt together.
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
            with _beside(compile_reading, group if threads > 1 else []):
                answered = _ask(
                    *(model, names, group, inputs, settings, shapes, threads),
                    *(on_answer, report),
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
            read, held = sizes[name]
            layers = losses.layers
            measured = measured_bytes(model, methods[name], layers, settings)
            scores = {when: found[place].scores for when, found in answered.items()}
            rows[name] = _row(
                name,
                (read, measured, held),
                inputs,
                scores,
                losses,
                expected.continued,
                seconds,
            )
            if name == reference:
                rows[name] = _of_itself(rows[name])
            progress(name, 1.0)
            on_row(rows[name])
    return Results(tuple(rows[name] for name in wanted))


def _threads(decoder, group, settings, room) -> int:
    """Threads for what is not timed: two where a group's states take little room.

    With small models most of the time is compiling, which takes one core. A large one
    takes all cores, and its memory is not there twice.
    """
    held = sum(_prompt_bytes(decoder, method, settings) for method in group)
    return 2 if 8 * settings.batch * held <= room else 1


@contextlib.contextmanager
def _beside(job: Callable[[Method], None], methods: Sequence[Method]):
    """Does the job with each method in a thread of its own; it is over behind this."""
    pool = ThreadPoolExecutor(1)
    try:
        done = [pool.submit(job, method) for method in methods]
        yield
        for one in done:
            one.result()
    finally:  # after an error, or an interrupt, what waits is not begun
        pool.shutdown(cancel_futures=True)


def _ask(
    model, names, group, inputs, settings, shapes, threads, on_answer, report
) -> dict[str, list[compare_runs.Retrieval]]:
    """The answers of methods that read together, by when the questions come."""
    numbered = [
        (task, index, example)
        for task in TASKS
        for index, example in enumerate(getattr(inputs, task))
    ]
    examples = [example for _, _, example in numbered]
    found = {}
    for part, when in enumerate(settings.questions):

        def tell(place, first, said, suffix=SUFFIX[when]):
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
    examples = [example for task in TASKS for example in getattr(inputs, task)]
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
    sizes = [_prompt_bytes(decoder, method, settings) for method in methods.values()]
    together = min(GROUP, len(sizes)) * sum(sizes) / len(sizes)
    batch = 1
    while 2 * batch <= min(most, settings.windows) and 2 * batch * together <= room:
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

    Methods of exact prompts fill `room` bytes with their states, at most `GROUP` of
    them; at least one goes with the reference, whatever its size. Others are alone.
    """

    def held(method):
        return settings.batch * _prompt_bytes(decoder, method, settings)

    grouped: list[list[str]] = []
    left = 0
    for name, method in methods.items():
        own = 0 if method is reference else held(method)
        if not method.exact_prompt:
            continue
        if not grouped or own > left or len(grouped[-1]) == GROUP:
            grouped.append([])
            left = room - held(reference)
        grouped[-1].append(name)
        left -= own
    alone = [[name] for name, method in methods.items() if not method.exact_prompt]
    return grouped + alone


def _prompt_bytes(decoder, method, settings) -> int:
    return _bytes_of_prompt(method, decoder, settings.context, settings.new_tokens)


_bytes_of_prompt = functools.cache(accounting.bytes_of_prompt)


def _bytes(model, method, settings) -> tuple[int, int]:
    decoder, new_tokens = model.decoder, settings.new_tokens
    read = accounting.bytes_read(method, decoder, settings.context, new_tokens)
    held = accounting.bytes_held(method, decoder, settings.context, new_tokens)
    return read, held


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
    decoder = model.decoder
    spec = decoder.cache_spec(1, 1)
    token = buffers.kv_bytes(spec, 1) / spec.num_kv_heads
    context, new_tokens = settings.context, settings.new_tokens
    chosen = accounting.traffic(method, decoder, context, new_tokens).metadata
    return float(layers.read.mean(1).sum() * token) + chosen


def of_windows(layers: fidelity.LayerFidelity, name: str) -> Interval:
    """The mean of a field over layers and heads; rows are the independent samples."""
    return OF_LAYERS[name](getattr(layers, name).mean((0, 2)))


def _row(name, num_bytes, inputs, scores, followed, expected, seconds) -> Row:
    layers = followed.layers
    window_means = followed.log_probs.mean(1)
    kl = followed.agreement.kl
    asked: dict[str, Any] = {}
    for when, found in scores.items():
        asked |= _of_tasks(inputs, found, SUFFIX[when])
    return Row(
        method=name,
        bytes_read=num_bytes[0],
        bytes_measured=num_bytes[1],
        bytes_held=num_bytes[2],
        kl=statistics.amount_interval(kl.mean(1)),
        kl_p99=percentiles.percentile_interval(kl),
        top1_agreement=statistics.share_interval(followed.agreement.top1.mean(1)),
        tokens_before_difference=percentiles.count_interval(
            followed.tokens_before_difference, expected.chosen.shape[1]
        ),
        perplexity=statistics.perplexity(window_means),
        nats_lost=statistics.paired_difference(
            expected.predicted.log_probs.mean(1), window_means
        ),
        output_error=of_windows(layers, "error"),
        dropped_mass=of_windows(layers, "dropped"),
        support=of_windows(layers, "support"),
        proved_exact=of_windows(layers, "exact"),
        full_steps=statistics.share_interval(layers.refreshed.mean(0)),
        tokens_per_second=float(np.median(followed.tokens_per_second)),
        prefill_seconds=seconds,
        chain_links=inputs.chain[0].links,
        **asked,
    )


def _of_tasks(inputs: Inputs, scores: Sequence[float], suffix: str) -> dict[str, Any]:
    """The fields of a row that are of answers, to questions that come at one time."""
    rest = iter(scores)
    own, passkey, multikey, links = (
        list(itertools.islice(rest, len(getattr(inputs, task)))) for task in TASKS
    )
    found = {
        "passkey": proportion(passkey),
        "multikey": proportion(multikey),
        "chain": statistics.share_interval(links),
        "own": proportion(own) if own else None,
    }
    depths = {
        "passkey": by_depth(inputs.passkey, passkey),
        "multikey": by_depth(inputs.multikey, multikey),
    }
    found = {name + suffix: value for name, value in found.items()}
    return found | {f"{name}{suffix}_by_depth": x for name, x in depths.items()}


_AGAINST_REFERENCE = ("kl", "kl_p99", "top1_agreement", "tokens_before_difference")
_AGAINST_REFERENCE += ("output_error", "dropped_mass")
_AGAINST_REFERENCE += ("support", "proved_exact", "full_steps")


def _of_itself(row: Row) -> Row:
    """The reference's row: what it is against itself is known, and no sample."""
    means = {name: getattr(row, name) for name in _AGAINST_REFERENCE}
    return row._replace(
        **{name: Interval(x.mean, x.mean, x.mean, x.n) for name, x in means.items()}
    )


def proportion(scores: Sequence[float]) -> Interval:
    """Wilson's interval of scores that are 0 or 1."""
    return statistics.wilson(sum(reached == 1 for reached in scores), len(scores))


def by_depth(examples: Sequence[Example], scores: Sequence[float]) -> ByDepth:
    """`(depth, correct, asked)` of each depth, from the start of the prompt on."""
    counts: dict[float, list[int]] = {}
    for example, reached in zip(examples, scores, strict=True):
        count = counts.setdefault(example.depth, [0, 0])
        count[0] += reached == 1
        count[1] += 1
    return tuple(
        (depth, correct, asked) for depth, (correct, asked) in sorted(counts.items())
    )
