"""The same inputs decoded under each method, and what it cost: one row a method.

Every method sees equal shapes, so its compiled code serves retrieval, prediction and
the clock alike; the first batch compiles and is never timed.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from kvjax import accounting, cache
from kvjax.evaluation import chain, fidelity, statistics, tasks
from kvjax.evaluation.chain import Chain
from kvjax.evaluation.haystack import Prompted
from kvjax.evaluation.statistics import Interval
from kvjax.evaluation.tasks import Example
from kvjax.generate import generate, prefill
from kvjax.interface import LanguageModel, Method
from kvjax.scoring import score

Progress = Callable[[str, float], None]  # (method, fraction of its work that is done)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run; the same for every method.

    Attributes:
        context: tokens of every input, what follows the prompt included.
        new_tokens: tokens after the prompt: generated, or fed and predicted.
        examples: of each retrieval task.
        links: of a chain; fewer where `new_tokens` cannot hold so many.
        windows: of held-out text.
        batch: rows decoded together; cache memory grows with it.
        depths: where needles are hidden, 0 = start of the prompt, 1 = end.
        seed: of every input.
        chunk_size: most prompt tokens processed at once.
    """

    context: int = 512
    new_tokens: int = 64
    examples: int = 15
    links: int = chain.LINKS
    windows: int = 8
    batch: int = 8
    depths: tuple[float, ...] = tasks.DEPTHS
    seed: int = 0
    chunk_size: int = 1024

    def __post_init__(self):
        positive = "context", "examples", "links", "windows", "batch", "chunk_size"
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 2 <= self.new_tokens < self.context:
            raise ValueError(
                f"new_tokens={self.new_tokens} must be in [2, context={self.context})."
            )


class Inputs(NamedTuple):
    """What every method is given."""

    passkey: list[Example]
    multikey: list[Example]
    chain: list[Chain]
    windows: list[list[int]]


class Retrieval(NamedTuple):
    """What a method answered, and how long each batch of equal shapes took."""

    scores: list[float]  # one an example, in [0, 1]
    answers: list[str]
    prefill_seconds: list[float]  # one a batch, to the first token
    tokens_per_second: list[float]  # one a batch, all rows together, after it


class Row(NamedTuple):
    """One method's line of the comparison."""

    method: str
    bytes_read: int  # of cache, per decoded token of one row at the full context: most
    bytes_measured: float  # what was read of it, mean over steps; see `measured_bytes`
    bytes_held: int  # of cache, while decoding, per row
    perplexity: Interval  # of tokens predicted by decode steps; over windows
    nats_lost: Interval  # log-probability given away per token, paired with reference
    passkey: Interval
    multikey: Interval
    chain: Interval  # share of the links before the first mistake
    chain_links: int  # asked for
    passkey_by_depth: tuple[tuple[float, int, int], ...]  # (depth, correct, asked)
    multikey_by_depth: tuple[tuple[float, int, int], ...]
    top1_agreement: Interval  # same likeliest token as the reference; over windows
    kl: Interval  # KL(reference || method), nats per token
    # Of the layers, each fed what the reference's is; means over heads, over windows.
    output_error: Interval  # relative L2 error of the attention output
    dropped_mass: Interval  # of the reference's attention, on what was not attended to
    support: Interval  # share of the tokens with weight that was attended to
    proved_exact: Interval  # share of heads and steps: `Diagnostics.exact`
    full_steps: Interval  # share of steps and layers: `Diagnostics.refreshed`
    tokens_per_second: float  # median over batches, all rows together
    prefill_seconds: float  # median over batches


def make_inputs(model: LanguageModel, text: str, settings: Settings) -> Inputs:
    """The inputs of a comparison.

    Raises:
        ValueError: if the context exceeds the model's, or the text is too short.
    """
    check_context(model, settings.context)
    tokenizer, new_tokens = model.tokenizer, settings.new_tokens

    room = settings.context - new_tokens

    def examples(task):
        # The answer begins what is generated: leave all of it room.
        made = task(
            tokenizer,
            text,
            context=room,
            n=settings.examples,
            seed=settings.seed,
            depths=settings.depths,
        )
        if _longest(made) > new_tokens:
            raise ValueError(
                f"{new_tokens=} cannot hold an answer of {_longest(made)} tokens: "
                "raise it."
            )
        return made

    return Inputs(
        examples(tasks.passkey),
        examples(tasks.multikey),
        _chains(tokenizer, text, room, settings),
        tasks.windows(
            tokenizer,
            text,
            context=settings.context,
            n=settings.windows,
            seed=settings.seed,
        ),
    )


def _longest(examples: Sequence[Prompted]) -> int:
    return max(example.answer_tokens for example in examples)


def _chains(tokenizer, text, room, settings) -> list[Chain]:
    links = settings.links
    while True:
        made = chain.chain_of_key(
            tokenizer,
            text,
            context=room,
            n=settings.examples,
            seed=settings.seed,
            links=links,
        )
        longest = _longest(made)
        if longest <= settings.new_tokens:
            return made
        if links == 1:
            raise ValueError(
                f"new_tokens={settings.new_tokens} cannot hold one link of {longest} "
                "tokens: raise it."
            )
        links = max(min(links - 1, links * settings.new_tokens // longest), 1)


def check_context(model: LanguageModel, context: int) -> None:
    """Raises ValueError if `context` exceeds the model's."""
    if context > model.decoder.context:
        raise ValueError(
            f"{context=} exceeds the {model.decoder.context} tokens the model was made "
            "for: lower it or use another model."
        )


def compare(
    model: LanguageModel,
    methods: Mapping[str, Method],
    inputs: Inputs,
    settings: Settings,
    *,
    reference: str = "full",
    progress: Progress = lambda method, fraction: None,
) -> list[Row]:
    """Runs every method on the same inputs.

    Args:
        model: decoder, weights and tokenizer.
        methods: by the name they have in the result, `reference` among them.
        inputs: from :func:`make_inputs` with the same settings.
        settings: see :class:`Settings`.
        reference: what the others are compared with.
        progress: called while working.

    Returns:
        A row a method: the reference first, then in the order of `methods`.

    Raises:
        ValueError: if `reference` is missing, or a method cannot hold these shapes.
    """
    if reference not in methods:
        raise ValueError(f"{reference=} is not among {', '.join(methods)}: add it.")
    sizes = {name: _bytes(model, method, settings) for name, method in methods.items()}
    rows, expected = [], None
    for name in (reference, *(name for name in methods if name != reference)):
        method = methods[name]

        def report(fraction, name=name):
            progress(name, fraction)

        report(0.0)
        # In turn, so that every batch has prompts of all kinds, and so one length.
        in_turn = zip(inputs.passkey, inputs.multikey, inputs.chain, strict=True)
        examples = list(itertools.chain.from_iterable(in_turn))
        answered = retrieve(
            model,
            method,
            examples,
            new_tokens=settings.new_tokens,
            batch=settings.batch,
            chunk_size=settings.chunk_size,
            progress=lambda done: report(0.5 * done),
        )
        predicted = predict(
            model,
            method,
            inputs.windows,
            new_tokens=settings.new_tokens,
            batch=settings.batch,
            chunk_size=settings.chunk_size,
            progress=lambda done: report(0.5 + 0.3 * done),
        )
        layers = layer_fidelity(
            model,
            methods[reference],
            method,
            inputs.windows,
            new_tokens=settings.new_tokens,
            batch=settings.batch,
            chunk_size=settings.chunk_size,
        )
        expected = predicted if expected is None else expected
        read, held = sizes[name]
        measured = measured_bytes(model, method, layers, settings)
        num_bytes = read, measured, held
        found = answered, predicted, expected, layers
        rows.append(_row(name, num_bytes, inputs, *found))
        report(1.0)
    return rows


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
    token = cache.kv_bytes(spec, 1) / spec.num_kv_heads
    context, new_tokens = settings.context, settings.new_tokens
    chosen = accounting.traffic(method, decoder, context, new_tokens).metadata
    return float(layers.read.mean(1).sum() * token) + chosen


def of_windows(values: Float[np.ndarray, "L B Hq"]) -> Interval:
    """The mean over layers and heads; rows are the independent samples."""
    return statistics.mean_interval(values.mean((0, 2)))


def _row(name, num_bytes, inputs, answered, predicted, expected, layers) -> Row:
    passkey, multikey, links = (answered.scores[task::3] for task in range(3))
    window_means = predicted.log_probs.mean(1)
    agreement = fidelity.agreement(expected.logits, predicted.logits)
    return Row(
        method=name,
        bytes_read=num_bytes[0],
        bytes_measured=num_bytes[1],
        bytes_held=num_bytes[2],
        perplexity=statistics.perplexity(window_means),
        nats_lost=statistics.paired_difference(
            expected.log_probs.mean(1), window_means
        ),
        passkey=proportion(passkey),
        multikey=proportion(multikey),
        chain=statistics.share_interval(links),
        chain_links=inputs.chain[0].links,
        passkey_by_depth=by_depth(inputs.passkey, passkey),
        multikey_by_depth=by_depth(inputs.multikey, multikey),
        top1_agreement=statistics.mean_interval(agreement.top1.mean(1)),
        kl=statistics.mean_interval(agreement.kl.mean(1)),
        output_error=of_windows(layers.error),
        dropped_mass=of_windows(layers.dropped),
        support=of_windows(layers.support),
        proved_exact=of_windows(layers.exact),
        full_steps=statistics.mean_interval(layers.refreshed.mean(0)),
        tokens_per_second=float(np.median(answered.tokens_per_second)),
        prefill_seconds=float(np.median(answered.prefill_seconds)),
    )


def proportion(scores: Sequence[float]) -> Interval:
    """Wilson's interval of scores that are 0 or 1."""
    return statistics.wilson(sum(reached == 1 for reached in scores), len(scores))


def by_depth(
    examples: Sequence[Example], scores: Sequence[float]
) -> tuple[tuple[float, int, int], ...]:
    """`(depth, correct, asked)` of each depth, from the start of the prompt on."""
    counts: dict[float, list[int]] = {}
    for example, reached in zip(examples, scores, strict=True):
        count = counts.setdefault(example.depth, [0, 0])
        count[0] += reached == 1
        count[1] += 1
    return tuple((depth, *counts[depth]) for depth in sorted(counts))


class _Ticks:
    """A tokenizer whose text only says that tokens have come: a letter each."""

    def encode(self, text: str) -> list[int]:
        raise TypeError("prompts are tokens here.")

    def decode(self, tokens: list[int]) -> str:
        return "." * len(tokens)


def retrieve(
    model: LanguageModel,
    method: Method,
    examples: Sequence[Prompted],
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    progress: Callable[[float], None] = lambda done: None,
) -> Retrieval:
    """Answers the examples, and times each batch.

    Every row generates exactly `new_tokens`, EOS or not, so that batches compare. The
    first one compiles and is not timed; if it is the only one, it runs again.

    Raises:
        ValueError: as :func:`kvjax.generate.generate`.
    """
    clocked = model._replace(tokenizer=_Ticks())
    answers, prefill_seconds, rates = [], [], []
    groups = list(_batches(examples, batch))
    repeats = groups if len(groups) == 1 else []
    for index, group in enumerate([*groups, *repeats]):
        prompts = [example.prompt for example in group]
        first_text = []

        def on_text(row, text, first_text=first_text):
            if not first_text:
                first_text.append(time.perf_counter())

        start = time.perf_counter()
        generations = generate(
            clocked,
            method,
            prompts,
            max_new_tokens=new_tokens,
            eos_ids=(),
            chunk_size=chunk_size,
            stream_every=new_tokens,
            on_text=on_text,
        )
        end = time.perf_counter()
        progress((index + 1) / (len(groups) + len(repeats)))
        if index > 0:
            prefill_seconds.append(first_text[0] - start)
            rates.append(batch * (new_tokens - 1) / (end - first_text[0]))
        for example, generation in zip(group, generations, strict=True):
            # A few tokens more than the answer's: text may begin with a blank.
            tokens = generation.tokens[: example.answer_tokens + 2]
            answers.append(model.tokenizer.decode(tokens))
    answers = answers[: len(examples)]
    pairs = zip(examples, answers, strict=True)
    scores = [example.score(answer) for example, answer in pairs]
    return Retrieval(scores, answers, prefill_seconds, rates)


class Predicted(NamedTuple):
    """How likely each token was that a decode step predicted."""

    log_probs: Float[np.ndarray, "W T"]
    logits: Float[np.ndarray, "W T V"]


def predict(
    model: LanguageModel,
    method: Method,
    windows: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    progress: Callable[[float], None] = lambda done: None,
) -> Predicted:
    """Feeds the last `new_tokens` of each window through the decode path.

    The first of them is predicted by the prompt, as in generation, and is left out: T
    is ``new_tokens - 1``.

    Raises:
        ValueError: as :func:`kvjax.scoring.score`.
    """
    log_probs, logits = [], []
    groups = list(_batches(windows, batch))
    for index, group in enumerate(groups):
        before = len(group[0]) - new_tokens
        scores = score(
            model,
            method,
            group,
            prefill=before,
            chunk_size=chunk_size,
            prompt_scores=False,
            return_logits=True,
        )
        log_probs.append(scores.log_probs[:, before:])
        logits.append(scores.logits[:, 1:])
        progress((index + 1) / len(groups))
    kept = slice(len(windows))
    return Predicted(np.concatenate(log_probs)[kept], np.concatenate(logits)[kept])


def layer_fidelity(
    model: LanguageModel,
    reference: Method,
    candidate: Method,
    windows: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
) -> fidelity.LayerFidelity:
    """What attention loses in each layer over the windows' last tokens.

    Raises:
        ValueError: as :func:`kvjax.generate.prefill` and
            :func:`kvjax.evaluation.fidelity.side_by_side`.
    """
    both = fidelity.side_by_side(reference, candidate)
    parts = []
    for group in _batches(windows, batch):
        before = len(group[0]) - new_tokens
        states, _, recent = prefill(
            model,
            both,
            [window[:before] for window in group],
            max_new_tokens=new_tokens,
            chunk_size=chunk_size,
        )
        tokens = np.array([window[before:-1] for window in group], np.int32)
        states = fidelity.teacher_forced(
            model.decoder, both, model.params, states, tokens, recent
        )
        parts.append(jax.tree.map(np.asarray, fidelity.layers(states)))
    return jax.tree.map(lambda *x: np.concatenate(x, 1)[:, : len(windows)], *parts)


def _batches(items: Sequence, size: int):
    """Groups of exactly `size`, the last filled up again from the first item on."""
    count = -(-len(items) // size) * size
    filled = [items[i % len(items)] for i in range(count)]
    for start in range(0, count, size):
        yield filled[start : start + size]
