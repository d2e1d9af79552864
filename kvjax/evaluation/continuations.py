"""Windows of a text under each method: predicted, continued, and layer by layer.

The last tokens of a window are fed behind its prompt and judged; then the likeliest are
chosen in their place, by the same compiled program. Methods of exact prompts read every
window together (`together`), and what the reference says of it is found out once.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from kvjax.decoding import feeding, finite
from kvjax.decoding.checks import check_prompts
from kvjax.decoding.options import Options
from kvjax.decoding.reader import Prefilled
from kvjax.evaluation import batches, fidelity, together
from kvjax.interface import LanguageModel, Method, with_layer
from kvjax.stores import offloaded


class Predicted(NamedTuple):
    """Predictions of decode steps: how likely each token was."""

    log_probs: Float[np.ndarray, "W T"]
    logits: Float[np.ndarray, "W T V"]


class Continued(NamedTuple):
    """Windows continued by their own tokens, and by the likeliest.

    T is one below the n tokens that were chosen: the first of a window's own is
    predicted by the prompt, as in generation, and is left out.
    """

    predicted: Predicted
    chosen: Int[np.ndarray, "W n"]  # greedily; an end of text is a token like others
    tokens_per_second: list[float]  # one a batch, all rows, while they were chosen


class Expected(NamedTuple):
    """The reference's continuations, and the inputs of its layers."""

    continued: Continued
    steps: list[tuple[fidelity.Steps, ...]]  # of each batch, one a layer


class Followed(NamedTuple):
    """A method's continuations beside the reference's, and what its layers lose."""

    log_probs: Float[np.ndarray, "W T"]
    agreement: fidelity.Agreement  # of predictions, (W, T)
    tokens_before_difference: Int[np.ndarray, "W"]  # of those that were chosen
    tokens_per_second: list[float]
    layers: fidelity.LayerFidelity


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

    Raises:
        ValueError: as :func:`kvjax.decoding.reader.prefill`.
    """
    parts = []
    groups = list(batches.equal(windows, batch))
    for index, group in enumerate(groups):
        prompts, following = _cut(group, new_tokens)
        read = together.read(
            model, [method], prompts, max_new_tokens=new_tokens, chunk_size=chunk_size
        )
        parts.append(_predicted(model, method, read.take(0), following))
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
        read = together.read(
            model,
            [leader, candidate],
            prompts,
            max_new_tokens=new_tokens,
            chunk_size=chunk_size,
        )
        steps = _recorded(model, leader, read.take(0), following)
        taken = read.take(0), read.take(1)
        parts.append(_layers(model, leader, candidate, *taken, steps))
    return _layers_of(parts, len(windows))


def expect(
    model: LanguageModel,
    reference: Method,
    windows: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    room: int = 0,
) -> Expected:
    """Continues the windows under the reference, and records what its layers are given.

    Args:
        room: tokens to make room for behind a prompt, if more than `new_tokens`.

    Raises:
        ValueError: as :func:`kvjax.decoding.reader.prefill`.
    """
    options = _options(model, [reference], windows, new_tokens, chunk_size, room)
    parts, steps = [], []
    for group in batches.equal(windows, batch):
        prompts, following = _cut(group, new_tokens)
        batches.release()
        read = together.read_checked(model, [reference], prompts, options)
        batches.release()
        recorded = _recorded(model, reference, read.take(0), following)
        steps.append(jax.tree.map(np.asarray, recorded))
        taken = functools.partial(read.take, 0)
        parts.append(_continued(model, reference, taken, following))
        read.drop()
    predicted, chosen, rates = zip(*parts, strict=True)
    count = len(windows)
    continued = Continued(
        _joined(predicted, count),
        np.concatenate(chosen)[:count],
        [rate for part in rates for rate in part],
    )
    return Expected(continued, steps)


def follow(
    model: LanguageModel,
    reference: Method,
    methods: Sequence[Method],
    windows: Sequence[Sequence[int]],
    expected: Expected,
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    room: int = 0,
    threads: int = 1,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Followed]:
    """Continues the windows under each method, and looks at each of its layers.

    A method whose prompt is not exact reads the windows once more, on its own.

    Args:
        expected: of :func:`expect`, the reference's, with the same `room`.
        threads: methods whose layers are looked at at the same time; nothing else runs
            while a continuation is timed.

    Raises:
        ValueError: as :func:`kvjax.decoding.reader.prefill` and
            :func:`kvjax.evaluation.fidelity.side_by_side`.
    """
    options = _options(model, methods, windows, new_tokens, chunk_size, room)
    parts: list[list[Followed]] = [[] for _ in methods]
    groups = list(batches.equal(windows, batch))
    for index, group in enumerate(groups):
        followed = _follow(
            model,
            reference,
            methods,
            group,
            _of_batch(expected, index, batch, len(windows)),
            new_tokens,
            options,
            threads,
        )
        for place, part in enumerate(followed):
            parts[place].append(part)
            done = index + (place + 1) / len(methods)
            progress(done / len(groups))
    return [_all_followed(own, len(windows)) for own in parts]


def _options(model, methods, windows, new_tokens, chunk_size, room) -> Options:
    """The options to read prompts with, which are checked without the spare room."""
    prompts, _ = _cut(windows, new_tokens)
    for method in methods:
        check_prompts(model, method, prompts, new_tokens)
    room = max(room, new_tokens)
    return Options(max_new_tokens=room, chunk_size=chunk_size)


def read_beside(reference: Method, methods: Sequence[Method]) -> list[Method]:
    """Returns what reads the windows with the methods, before them, in :func:`follow`.

    That is the reference, in decode steps of as many rows as theirs, where it is none
    of them.
    """
    leaders = [fidelity.in_steps_of(reference, method.rows) for method in methods]
    return [one for one in dict.fromkeys(leaders) if one not in methods]


def _of_batch(expected: Expected, index: int, batch: int, count: int) -> Expected:
    """The part of one batch, filled up from the first window on as batches are."""
    places = np.arange(index * batch, (index + 1) * batch) % count
    predicted, chosen, rates = expected.continued
    rows = Predicted(*(part[places] for part in predicted))
    own = Continued(rows, chosen[places], rates[index : index + 1])
    return Expected(own, expected.steps[index : index + 1])


def _follow(
    model, reference, methods, windows, expected, new_tokens, options, threads
) -> Iterator[Followed]:
    """One batch of windows, method by method; nothing of it outlives the call."""
    prompts, following = _cut(windows, new_tokens)
    leaders = [fidelity.in_steps_of(reference, method.rows) for method in methods]
    readers = [*read_beside(reference, methods), *methods]
    batches.release()
    read = together.read_checked(model, readers, prompts, options)
    batches.release()

    def taken(method: Method) -> Prefilled:
        return read.take(readers.index(method))

    steps = {reference: expected.steps[0]}
    for leader in dict.fromkeys(leaders):
        if leader is not reference:
            steps[leader] = _recorded(model, leader, taken(leader), following)
    truth = expected.continued

    def continued(place: int) -> dict[str, Any]:
        """Fields of what is yielded, without the logits, which are large."""
        method, own = methods[place], truth
        if method is not reference:
            take = functools.partial(taken, method)
            if not method.exact_prompt:
                alone = together.read_checked(model, [method], prompts, options)
                take = functools.partial(alone.take, 0)
            with batches.told_apart(place):
                own = _continued(model, method, take, following)
        return {
            "log_probs": own.predicted.log_probs,
            "agreement": fidelity.agreement(
                truth.predicted.logits, own.predicted.logits
            ),
            "tokens_before_difference": tokens_before_difference(
                truth.chosen, own.chosen
            ),
            "tokens_per_second": own.tokens_per_second,
        }

    def looked_at(place: int) -> fidelity.LayerFidelity:
        leader, method = leaders[place], methods[place]
        both = taken(leader), taken(method)
        layers = _layers(model, leader, method, *both, steps[leader])
        del both
        batches.release()
        return layers

    for start in range(0, len(methods), threads):
        places = range(len(methods))[start : start + threads]
        told = [continued(place) for place in places]
        found = batches.at_once(looked_at, places, threads)
        for fields, layers in zip(told, found, strict=True):
            yield Followed(**fields, layers=layers)


def tokens_before_difference(
    reference: Int[np.ndarray, "W n"], chosen: Int[np.ndarray, "_ _"]
) -> Int[np.ndarray, "W"]:
    """Counts the tokens of each row before the first that is not the reference's."""
    return np.cumprod(reference == chosen, axis=1).sum(1)


def _cut(windows, new_tokens):
    """The prompts of the windows, and what follows them as an array."""
    before = len(windows[0]) - new_tokens
    following = np.array([window[before:] for window in windows], np.int32)
    return [window[:before] for window in windows], following


def _predicted(model, method, read, following) -> Predicted:
    """Judges what follows prompts; what was read is used up."""
    fed = _fed(model, method, read, following)
    logits: Any = fed.logits
    # In C order: sums of float32 depend on it.
    return Predicted(np.ascontiguousarray(fed.log_probs[:, 1:]), logits[:, 1:])


def _fed(model, method, read, wanted) -> feeding.Fed:
    """Feeds tokens by the one program of this module, which keeps logits."""
    fed = feeding.feed(model, method, read, wanted, return_logits=True)
    finite.check_rows(model.decoder, fed.log_probs)
    return fed


def _continued(model, method, take, following) -> Continued:
    """Continues one batch; `take()` gives what was read, to be used up."""
    predicted = _predicted(model, method, take(), following)
    begun = take()
    jax.block_until_ready(begun.states)
    start = time.perf_counter()  # by now the program is compiled
    fed = _fed(model, method, begun, np.full_like(following, feeding.CHOOSE))
    seconds = time.perf_counter() - start
    return Continued(predicted, fed.tokens, [following.size / seconds])


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
        counts = offloaded.crossed(ended.candidate)
        states.append(ended._replace(reference=None, candidate=counts))
    return jax.tree.map(np.asarray, fidelity.layers(tuple(states)))


def _joined(parts: Sequence[Predicted], count: int) -> Predicted:
    return Predicted(*(np.concatenate(x)[:count] for x in zip(*parts, strict=True)))


def _layers_of(parts, count: int) -> fidelity.LayerFidelity:
    return jax.tree.map(lambda *x: np.concatenate(x, 1)[:, :count], *parts)


def _all_followed(parts: Sequence[Followed], count: int) -> Followed:
    log_probs, agreement, same, rates, layers = zip(*parts, strict=True)
    return Followed(
        np.concatenate(log_probs)[:count],
        fidelity.Agreement(
            *(np.concatenate(x)[:count] for x in zip(*agreement, strict=True))
        ),
        np.concatenate(same)[:count],
        [rate for part in rates for rate in part],
        _layers_of(layers, count),
    )
