"""Methods run on the inputs of a comparison: retrieval, prediction, and their layers.

Methods of exact prompts read every prompt together (`together`), then each decodes from
what it kept. Batches have equal sizes, so that compiled code serves all of them; the
first batch compiles and is never timed.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kvjax.attention.choices import check_choice
from kvjax.decoding import generate, reader, scoring
from kvjax.decoding.generate import continued
from kvjax.decoding.reader import Prefilled
from kvjax.decoding.scoring import continue_scores
from kvjax.evaluation import asked_after, batches, fidelity, together
from kvjax.evaluation.asked_after import When
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import LanguageModel, Method, with_layer

TIMED = 2  # batches whose decoding is timed

# (place of the method, number of the first example, answers)
OnAnswers = Callable[[int, int, list[str]], None]


class Retrieval(NamedTuple):
    """Answers of a method, and how fast it decoded them."""

    scores: list[float]  # one an example, in [0, 1]
    answers: list[str]
    tokens_per_second: list[float]  # one a timed batch, all rows, after the prompt


class Predicted(NamedTuple):
    """Predictions of decode steps: how likely each token was."""

    log_probs: Float[np.ndarray, "W T"]
    logits: Float[np.ndarray, "W T V"]


def retrieve(
    model: LanguageModel,
    methods: Sequence[Method],
    examples: Sequence[Prompted],
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    longest: int = 0,
    timed: bool = False,
    question: str = "seen",
    on_answers: OnAnswers = lambda place, first, said: None,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Retrieval]:
    """Answers the examples under each method, and times each batch's decoding.

    A batch generates what its longest answer takes, EOS or not; examples of one task
    belong side by side.

    Args:
        methods: which read together; several must all have exact prompts.
        longest: tokens of a prompt to make room for, where none is so long; see
            :func:`kvjax.decoding.reader.prefill`.
        question: `seen` reads it as the end of the prompt; `after` reads the context
            alone, and once it has ended decodes the questions about it, as
            :func:`kvjax.evaluation.asked_after.answers` does.
        on_answers: called with a method's place, the number of a batch's first example,
            and what was answered, batch by batch; of questions asked `after`, one by
            one.
        timed: the last `TIMED` batches generate exactly `new_tokens`, and are timed;
            never the first one, which compiles: if it is the only one, it runs again.
            Of questions that are `seen` alone.

    Raises:
        ValueError: as :func:`kvjax.decoding.generate.generate`; if `question` is
            unknown, an example without a context is to be asked `after`, or that timed.
    """
    check_choice("question", question, When)
    if question == "after":
        if timed:
            raise ValueError(f"{timed=} is of {question=} no figure: time 'seen'.")
        after = asked_after.answers(
            model,
            methods,
            examples,
            new_tokens=new_tokens,
            batch=batch,
            chunk_size=chunk_size,
            longest=longest,
            on_answer=lambda place, index, said: on_answers(place, index, [said]),
            progress=progress,
        )
        return [_scored(examples, said, []) for said in after]
    clocked = batches.ticking(model)
    answers: list[list[str]] = [[] for _ in methods]
    rates: list[list[float]] = [[] for _ in methods]
    groups = list(batches.equal(examples, batch))
    repeats = groups if timed and len(groups) == 1 else []
    first_timed = max(len(groups) + len(repeats) - TIMED, 1)
    for index, group in enumerate([*groups, *repeats]):
        is_timed = timed and index >= first_timed
        batches.release()
        read = together.read(
            model,
            methods,
            [example.prompt for example in group],
            max_new_tokens=new_tokens,
            chunk_size=chunk_size,
            longest=longest,
        )
        batches.release()
        # A few tokens more than the answer's: text may begin with a blank.
        answer = max(example.answer_tokens for example in group) + 2
        steps = new_tokens if is_timed else min(answer, new_tokens)
        for place, method in enumerate(methods):
            events = continued(
                clocked,
                method,
                read.pop(0),
                max_new_tokens=steps,
                eos_ids=(),
                stream_every=new_tokens,
            )
            with batches.told_apart(place):
                generations, rate = _timed(events, batch * (steps - 1))
            if is_timed:
                rates[place].append(rate)
            said = [
                batches.reply(model, example, generation.tokens)
                for example, generation in zip(group, generations, strict=True)
            ]
            answers[place] += said
            # What fills the last batch up, or runs again, has been answered before.
            first = index * batch
            said = said[: max(len(examples) - first, 0)]
            if said:
                on_answers(place, first, said)
            done = index + (place + 1) / len(methods)
            progress(done / (len(groups) + len(repeats)))
    generate.drop_programs(reading=False)
    return [
        _scored(examples, said, rate) for said, rate in zip(answers, rates, strict=True)
    ]


def _scored(
    examples: Sequence[Prompted], said: Sequence[str], rates: list[float]
) -> Retrieval:
    """Scores the answers; those that only fill a batch up do not count."""
    said = list(said[: len(examples)])
    pairs = zip(examples, said, strict=True)
    return Retrieval([example.score(text) for example, text in pairs], said, rates)


def _timed(events, tokens: int):
    """Returns the result of a generator, and its tokens a second after one event."""
    next(events)
    start = time.perf_counter()
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value, tokens / (time.perf_counter() - start)


def seconds_to_read(
    model: LanguageModel,
    method: Method,
    tokens: Sequence[int],
    *,
    new_tokens: int,
    chunk_size: int = 512,
) -> float:
    """Returns the seconds that one row's prompt takes the method alone, compiled."""
    decoder = model.decoder
    begun = reader.begin(decoder, method, 1, len(tokens), new_tokens)
    first = next(reader.chunks(decoder, [tokens], chunk_size))
    read = reader.read(model, method, begun, [first])
    jax.block_until_ready(reader.finish(method, read.states))
    del begun, read
    start = time.perf_counter()
    read = reader.prefill(
        model, method, [tokens], max_new_tokens=new_tokens, chunk_size=chunk_size
    )
    jax.block_until_ready(read)
    return time.perf_counter() - start


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
        ValueError: as :func:`kvjax.decoding.reader.prefill`.
    """
    parts = []
    groups = list(batches.equal(windows, batch))
    for index, group in enumerate(groups):
        prompts, following = _cut(group, new_tokens)
        (read,) = together.read(
            model, [method], prompts, max_new_tokens=new_tokens, chunk_size=chunk_size
        )
        parts.append(_predicted(model, method, read, following))
        progress((index + 1) / len(groups))
    return _joined(parts, len(windows))


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
    """The loss of attention in each layer over the windows' last tokens.

    Raises:
        ValueError: as :func:`kvjax.decoding.reader.prefill` and
            :func:`kvjax.evaluation.fidelity.side_by_side`.
    """
    leader = fidelity.in_steps_of(reference, candidate.rows)
    parts = []
    for group in batches.equal(windows, batch):
        prompts, following = _cut(group, new_tokens)
        first, second = together.read(
            model,
            [leader, candidate],
            prompts,
            max_new_tokens=new_tokens,
            chunk_size=chunk_size,
        )
        steps = _recorded(model, leader, first, following)
        parts.append(_layers(model, leader, candidate, first, second, steps))
    return _layers_of(parts, len(windows))


class Followed(NamedTuple):
    """A method's predictions of the windows, and what its layers lose on them."""

    log_probs: Float[np.ndarray, "W T"]
    agreement: fidelity.Agreement  # with the reference's predictions, (W, T)
    layers: fidelity.LayerFidelity


def follow(
    model: LanguageModel,
    reference: Method,
    methods: Sequence[Method],
    windows: Sequence[Sequence[int]],
    expected: Predicted,
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Followed]:
    """:func:`predict` and :func:`layer_fidelity` of each method, from one reading.

    A method whose prompt is not exact reads the windows once more, on its own.

    Args:
        expected: the reference's predictions of the windows, from :func:`predict`.

    Raises:
        ValueError: as the two.
    """
    parts: list[list[Followed]] = [[] for _ in methods]
    groups = list(batches.equal(windows, batch))
    for index, group in enumerate(groups):
        places = np.arange(index * batch, (index + 1) * batch) % len(windows)
        followed = _follow(
            model,
            reference,
            methods,
            group,
            Predicted(*(part[places] for part in expected)),
            {"max_new_tokens": new_tokens, "chunk_size": chunk_size},
        )
        for place, part in enumerate(followed):
            parts[place].append(part)
            done = index + (place + 1) / len(methods)
            progress(done / len(groups))
    count = len(windows)
    return [
        Followed(
            np.concatenate([part.log_probs for part in own])[:count],
            fidelity.Agreement(
                *(
                    np.concatenate(x)[:count]
                    for x in zip(*(part.agreement for part in own), strict=True)
                )
            ),
            _layers_of([part.layers for part in own], count),
        )
        for own in parts
    ]


def _follow(model, reference, methods, windows, expected, options):
    """One batch of windows, method by method; nothing of it outlives the call."""
    prompts, following = _cut(windows, options["max_new_tokens"])
    leaders = [fidelity.in_steps_of(reference, method.rows) for method in methods]
    readers = list(dict.fromkeys([*leaders, *methods]))
    batches.release()
    read = together.read(model, readers, prompts, **options)
    kept = dict(zip(readers, read, strict=True))
    del read
    batches.release()
    steps = {
        leader: _recorded(model, leader, kept[leader], following)
        for leader in dict.fromkeys(leaders)
    }
    for place, (leader, method) in enumerate(zip(leaders, methods, strict=True)):
        predicted = expected
        if method is not reference:
            # What decodes uses its states up.
            if method.exact_prompt:
                own = _copied(kept[method])
            else:
                (own,) = together.read(model, [method], prompts, **options)
            with batches.told_apart(place):
                predicted = _predicted(model, method, own, following)
            del own
        second = _copied(kept[method]) if method in leaders else kept.pop(method)
        first = _copied(kept[leader])
        layers = _layers(model, leader, method, first, second, steps[leader])
        del first, second
        agreement = fidelity.agreement(expected.logits, predicted.logits)
        batches.release()
        yield Followed(predicted.log_probs, agreement, layers)


def drop_programs() -> None:
    """Frees the programs of the methods that have run: 30 layers are 100 MB each."""
    generate.drop_programs()
    scoring.drop_programs()
    fidelity.drop_programs()
    gc.collect()
    batches.release()


def _cut(windows, new_tokens):
    """The prompts of the windows, and what follows them as an array."""
    before = len(windows[0]) - new_tokens
    following = np.array([window[before:] for window in windows], np.int32)
    return [window[:before] for window in windows], following


def _copied(prefilled: Prefilled) -> Prefilled:
    return prefilled._replace(states=jax.tree.map(jnp.copy, prefilled.states))


def _predicted(model, method, read, following) -> Predicted:
    scores = continue_scores(model, method, read, following, return_logits=True)
    logits: Any = scores.logits
    return Predicted(scores.log_probs, logits[:, 1:])


def _recorded(model, leader, read, following) -> tuple[fidelity.Steps, ...]:
    return fidelity.record_steps(
        model.decoder, leader, model.params, read.states, following[:, :-1], read.recent
    )


def _layers(model, leader, method, first, second, steps) -> fidelity.LayerFidelity:
    """Runs each layer on the leader's inputs; the states are used up, one by one."""
    both = fidelity.side_by_side(leader, method)
    num_q_heads = model.decoder.cache_spec(1, 1).num_q_heads
    references, candidates = list(first.states), list(second.states)
    states = []
    for layer, given in enumerate(steps):
        pair = references[layer], candidates[layer]
        references[layer] = candidates[layer] = None
        batch = given.q.shape[1]
        reference, candidate = with_layer(pair, 0)
        state = fidelity.joined(reference, candidate, batch, num_q_heads)
        del pair, reference, candidate
        ended = fidelity.run_layer(both, state, given)
        states.append(ended._replace(reference=None, candidate=None))
    return jax.tree.map(np.asarray, fidelity.layers(tuple(states)))


def _joined(parts: Sequence[Predicted], count: int) -> Predicted:
    return Predicted(*(np.concatenate(x)[:count] for x in zip(*parts, strict=True)))


def _layers_of(parts, count: int) -> fidelity.LayerFidelity:
    return jax.tree.map(lambda *x: np.concatenate(x, 1)[:, :count], *parts)
