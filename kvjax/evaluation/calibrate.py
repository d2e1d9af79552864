"""The cheapest method and budget whose loss on given prompts stays below a bound.

Losses are those of prompts under a method, the bound that of their expectation. What is
run and what it costs is here, the statistics in `calibrate_bounds`.
"""

import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kvjax import accounting
from kvjax.decoding import scoring
from kvjax.decoding.checks import check_model
from kvjax.evaluation import calibrate_bounds, compare_runs, fidelity, together
from kvjax.evaluation.calibrate_bounds import Tested
from kvjax.evaluation.tasks import needles
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import DecoderLM, LanguageModel, Method, Tokenizer
from kvjax.text import encoding

HOLDS, FAILS = "holds", "fails"
NOT_TESTED = "not tested"  # a dearer one of its family fails
NO_CHEAPER = "no cheaper"  # than full attention


class Candidate(NamedTuple):
    """A method of some budget."""

    spec: str
    method: Method
    cost: int  # bytes


# Losses in [0, 1] of every prompt under a candidate, in their order.
Measure = Callable[[Candidate], Float[np.ndarray, "N"]]


class Row(NamedTuple):
    """A candidate, and what was found of it."""

    spec: str
    cost: int  # bytes
    outcome: str
    # Of losses in [0, 1]; None if it was not run.
    mean: float | None = None
    upper: float | None = None  # at the level of its family


class Calibration(NamedTuple):
    """The outcome of a search."""

    rows: list[Row]  # family by family, from the dearest to the cheapest
    choice: str | None  # the cheapest that holds
    level: float  # of the tests of a family


def cost(
    method: Method, decoder: DecoderLM, length: int, new_tokens: int, by: str
) -> int:
    """Returns the bytes of cache of one row, all layers.

    Args:
        method: whose cost it is.
        decoder: of the model.
        length: tokens of the longest prompt, and of what follows it.
        new_tokens: those that follow.
        by: `read` by one decode step, or `held` while decoding.

    Raises:
        ValueError: if `by` is another word.
    """
    if by == "read":
        return accounting.bytes_read(method, decoder, length, new_tokens)
    if by == "held":
        return accounting.bytes_held(method, decoder, length, new_tokens)
    raise ValueError(f"{by=} must be read or held.")


def check_prompts_suffice(
    n: int, at_most: float, confidence: float, families: int
) -> None:
    """Raises ValueError if so few prompts can let nothing pass, whatever it loses.

    Args:
        n: prompts.
        at_most: the bound, as a share of the range of losses.
        confidence: in (0, 1).
        families: of candidates.
    """
    level = calibrate_bounds.level_of(confidence, families)
    needed = calibrate_bounds.prompts_needed(at_most, level)
    if n < needed:
        raise ValueError(
            f"{n} prompts cannot bound a loss by {at_most:g} of its range with "
            f"{confidence=} and {families=} of methods, even if none loses anything: "
            f"give at least {needed}, fewer methods, or a wider bound."
        )


def run(
    families: Sequence[Sequence[Candidate]],
    measure: Measure,
    *,
    at_most: float,
    confidence: float,
    full_cost: int,
    prompts: int,
) -> Calibration:
    """Tests the candidates that are cheaper than full attention.

    A family is tested from its dearest candidate on, until one fails.

    Args:
        families: of candidates that differ in their budget, such as one method's.
        measure: runs a candidate on the prompts; each at most once.
        at_most: the bound of the expected loss, in (0, 1).
        confidence: that all that hold do, in (0, 1).
        full_cost: bytes of full attention.
        prompts: how many losses a method has.

    Raises:
        ValueError: before anything is run, if no candidate is cheaper than full
            attention, or so few prompts can let none pass; and as
            :func:`kvjax.evaluation.calibrate_bounds.find`.
    """
    ordered = [sorted(family, key=lambda one: -one.cost) for family in families]
    cheaper = [[one for one in own if one.cost < full_cost] for own in ordered]
    families_tested = sum(map(bool, cheaper))
    if not families_tested:
        raise ValueError(
            f"no method costs less than full attention, {full_cost:,} bytes: give "
            "smaller budgets."
        )
    check_prompts_suffice(prompts, at_most, confidence, families_tested)
    level = calibrate_bounds.level_of(confidence, families_tested)

    def losses(candidates: Sequence[Candidate]) -> Iterator[Float[np.ndarray, "N"]]:
        for candidate in candidates:
            yield measure(candidate)

    found = calibrate_bounds.find(
        [losses(own) for own in cheaper if own], at_most=at_most, confidence=confidence
    )
    rows, looked_at = [], iter(found)
    for own, tried in zip(ordered, cheaper, strict=True):
        results = iter(next(looked_at) if tried else [])
        for one in own:
            if one.cost >= full_cost:
                rows.append(Row(one.spec, one.cost, NO_CHEAPER))
            elif (result := next(results, None)) is None:
                rows.append(Row(one.spec, one.cost, NOT_TESTED))
            else:
                rows.append(_row(one, result, level))
    held = [row for row in rows if row.outcome == HOLDS]
    choice = min(held, key=lambda row: row.cost).spec if held else None
    return Calibration(rows, choice, level)


def _row(candidate: Candidate, tested: Tested, level: float) -> Row:
    upper = calibrate_bounds.upper_bound(tested.losses, level)
    outcome = HOLDS if tested.passes else FAILS
    return Row(candidate.spec, candidate.cost, outcome, tested.mean, upper)


def divergences(
    model: LanguageModel,
    reference: Method,
    method: Method,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int = 8,
    chunk_size: int = 512,
    progress: Callable[[float], None] = lambda done: None,
) -> Float[np.ndarray, "N"]:
    """Returns KL(reference || method) of each prompt, nats, the mean over its tokens.

    The last `new_tokens` of a prompt go through decode steps; the first of them, which
    what is before it predicts, is left out, as in
    :func:`kvjax.evaluation.compare_runs.predict`.

    Args:
        model: decoder, weights and tokenizer.
        reference: which the method is compared with.
        method: under test.
        prompts: tokens, of any lengths above `new_tokens`.
        new_tokens: of each that are decoded, at least 2.
        batch: rows decoded together.
        chunk_size: most tokens of a prompt processed at once.
        progress: called with the fraction that is done.

    Raises:
        ValueError: as :func:`kvjax.decoding.reader.prefill`.
    """
    check_model(model, on_one_device="calibration")
    size = min(batch, len(prompts))
    longest = max(map(len, prompts)) - new_tokens
    found: list[float] = []
    for start in range(0, len(prompts), size):
        group = [prompts[(start + row) % len(prompts)] for row in range(size)]
        before = [prompt[:-new_tokens] for prompt in group]
        following = np.array([prompt[-new_tokens:] for prompt in group], np.int32)

        def read(methods, before=before):
            return together.read(
                model,
                methods,
                before,
                max_new_tokens=new_tokens,
                chunk_size=chunk_size,
                longest=longest,
            )

        logits = []
        first = read([reference, method] if method.exact_prompt else [reference])
        alone = first if method.exact_prompt else read([method])
        begun = first.take(0), alone.take(-1)
        for one, prefilled in zip((reference, method), begun, strict=True):
            scores = scoring.continue_scores(
                model, one, prefilled, following, return_logits=True
            )
            logits.append(np.asarray(scores.logits)[:, 1:])
        found += fidelity.agreement(*logits).kl.mean(1).tolist()
        progress(min(start + size, len(prompts)) / len(prompts))
    return np.array(found[: len(prompts)])


def wrong_answers(
    model: LanguageModel,
    method: Method,
    examples: Sequence[Prompted],
    *,
    batch: int = 8,
    chunk_size: int = 512,
    progress: Callable[[float], None] = lambda done: None,
) -> Float[np.ndarray, "N"]:
    """Returns 1 - score of each question under a method.

    Arguments as of :func:`kvjax.evaluation.compare_runs.retrieve`.
    """
    (replies,) = compare_runs.retrieve(
        model,
        [method],
        examples,
        new_tokens=max(example.answer_tokens for example in examples),
        batch=min(batch, len(examples)),
        chunk_size=chunk_size,
        progress=progress,
    )
    return 1 - np.array(replies.scores)


def prompts_of_lines(
    model: LanguageModel, text: str, name: str, *, new_tokens: int
) -> list[list[int]]:
    """Reads prompts, a JSON object a line, as tokens.

    A line has `prompt`; or it is a question as :mod:`kvjax.evaluation.tasks.own` has
    them, with `question` and, if there is one, `context`.

    Args:
        model: whose tokenizer and context they must suit.
        text: of the file.
        name: of the file, for messages.
        new_tokens: tokens of a prompt that are decoded.

    Raises:
        ValueError: naming the line, if it is neither, or too short or too long.
    """
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        tokens = encoding.begin(model.tokenizer.encode, _prompt(line, where))
        if len(tokens) <= new_tokens:
            raise ValueError(
                f"{where}: its prompt has {len(tokens)} tokens, of which the last "
                f"{new_tokens=} are decoded behind at least one: lower it, or leave "
                "the line out."
            )
        if len(tokens) > model.decoder.context:
            raise ValueError(
                f"{where}: its prompt has {len(tokens)} tokens, more than the model's "
                f"context of {model.decoder.context}: shorten it."
            )
        prompts.append(tokens)
    if not prompts:
        raise ValueError(f"{name} has no line: give one JSON object a prompt.")
    return prompts


def _prompt(line: str, where: str) -> str:
    """The text of a line."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is no JSON: {error}.") from None
    record = record if isinstance(record, dict) else {}
    key = "prompt" if "prompt" in record else "question"
    if key not in record:
        raise ValueError(
            f"{where}: must be an object with a text `prompt`, or `question` and "
            "perhaps `context`."
        )
    found, context = record[key], record.get("context", "")
    if not isinstance(found, str) or not found.strip():
        raise ValueError(
            f"{where}: {key}={reprlib.repr(found)} must be a text that says something."
        )
    if key == "question" and context != "":
        if not isinstance(context, str):
            raise ValueError(f"{where}: context={context!r} must be a text.")
        found = f"{context}\n\n{found}"
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: prompt holds half of a surrogate pair.") from None
    return found


def windows_of(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int,
    n: int | None,
    most: int,
    seed: int = 0,
) -> list[list[int]]:
    """Cuts a text into prompts: disjoint windows, chosen and ordered by chance.

    Args:
        tokenizer: of the model.
        text: that is cut.
        context: tokens of a window.
        n: windows; all that there are, up to `most`, if None.
        most: windows where `n` does not say.
        seed: of the choice.

    Raises:
        ValueError: as :func:`kvjax.evaluation.tasks.needles.windows`.
    """
    if n is None:
        size = context - len(encoding.added(tokenizer.encode).before)
        available = len(encoding.inside(tokenizer.encode, text)) // max(size, 1)
        n = max(min(available, most), 1)
    return needles.windows(tokenizer, text, context=context, n=n, seed=seed)
