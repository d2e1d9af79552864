"""Tasks on any model: answers that it says itself, and right answers that it is fed.

A small model hardly says a long answer right, and a method then has nothing to lose.
How likely the right one is, token by token as it is fed, tells methods apart all the
same.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.decoding.feeding import CHOOSE
from kvjax.evaluation import compare_runs, one_task, statistics
from kvjax.evaluation.claims.claim import Measured, NotMeasuredError, of_interval
from kvjax.evaluation.claims.measure.steps import Shape, drive
from kvjax.evaluation.claims.session import SEED, SOFTMAX, Session
from kvjax.evaluation.tasks import chat, haystack, ruler
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import LanguageModel

CHUNK = 512  # prompt tokens at once
LINKS = 20  # of a chain
NEW_TOKENS = 64  # of an answer that is said: RULER's needles take fewer
# RULER's, of those that a small model answers: a long value, and one key of four.
RETRIEVAL = ("niah_single_3", "niah_multikey_1")
NEEDLES = ("passkey", "multikey")  # that the embedded models were trained on
# Where nothing is said right, nothing can be lost.
LEAST = 0.2


def examples(session: Session, model: str, task: str) -> list[Prompted]:
    """Prompts of a task, in the model's chat template if the session says so.

    Prompt and answer together take no more than the longest input. An example is the
    same whatever their number.
    """
    sizes, tokenizer = session.sizes, session.model(model).tokenizer
    longest = room(session)
    sampled: dict[str, Any] = {"n": sizes.examples, "seed": SEED}

    def made() -> list[Prompted]:
        if task in ruler.TASKS:
            return list(
                ruler.examples(
                    task,
                    tokenizer,
                    context=longest,
                    source=session.source,
                    is_chat=session.is_chat,
                    **sampled,
                )
            )
        options: dict[str, dict[str, int]] = {
            "chain": {"links": LINKS},
            "extraction": {"rows": sizes.rows},
        }

        @functools.cache
        def every(context: int) -> Sequence[Prompted]:
            maker = one_task.RETRIEVAL[task]
            more = options.get(task, {})
            return maker(tokenizer, session.text, context=context, **sampled, **more)

        return [
            chat.fitted(
                tokenizer,
                lambda context, i=index: list(every(context)[i : i + 1]),
                longest,
                is_chat=session.is_chat,
            )[0]
            for index in range(sizes.examples)
        ]

    return session.remember(("examples", model, task), made)


def asked_scores(
    session: Session, model: str, task: str, method: str, *, question: str = "seen"
) -> np.ndarray:
    """Scores of the answers of greedy decoding, one an example.

    Args:
        question: `seen` before the method chooses what to keep, or asked `after`.
    """
    given, sizes = session.model(model), session.sizes

    def make(first: int, last: int) -> list[float]:
        made = examples(session, model, task)[first:last]
        tokens = min(max(one.answer_tokens for one in made), NEW_TOKENS)
        (found,) = compare_runs.retrieve(
            given,
            [session.method(method)],
            made,
            new_tokens=tokens,
            batch=sizes.batch or len(made),
            chunk_size=CHUNK,
            longest=room(session) if question == "seen" else 0,
            room=NEW_TOKENS,
            question=question,
        )
        return found.scores

    key = "scores", model, task, question, session.is_chat, method, room(session)
    return np.array(session.sampled(key, sizes.examples, make))


def room(session: Session) -> int:
    """Tokens of the longest input, all that follows its prompt included."""
    return session.sizes.context + session.sizes.text_steps


def retrieved(
    session: Session, model: str, method: str, *, question: str
) -> np.ndarray:
    """Scores of RULER's tasks of `RETRIEVAL`, one an example, the tasks in turn.

    On the embedded models of `NEEDLES`: RULER's they do not answer.
    """
    return np.concatenate(
        [
            asked_scores(session, model, task, method, question=question)
            for task in (NEEDLES if session.models is None else RETRIEVAL)
        ]
    )


def above(session: Session, ours: str, theirs: str, *, question: str) -> Measured:
    """The needles that a method finds above those that another does."""
    found = {
        spec: retrieved(session, SOFTMAX, spec, question=question)
        for spec in (ours, theirs)
    }
    details = {spec: float(scores.mean()) for spec, scores in found.items()}
    interval = statistics.paired_shares(found[ours], found[theirs])
    return of_interval(interval, details={"found": details})


def above_full(session: Session, ours: str, *, question: str) -> Measured:
    """The needles that a method finds above those of full attention: what it loses.

    Raises:
        NotMeasuredError: if full attention finds too few for any to be lost.
    """
    full = float(retrieved(session, SOFTMAX, "full", question=question).mean())
    if full < LEAST:
        raise NotMeasuredError(
            f"full attention finds {full:.0%} of the needles: a model that finds "
            f"{LEAST:.0%} has something to lose."
        )
    return above(session, ours, "full", question=question)


def nats(session: Session, model: str, task: str, method: str) -> np.ndarray:
    """Nats a token of the right answers, which are fed, one an example."""
    given, sizes = session.model(model), session.sizes

    def make(first: int, last: int) -> list[float]:
        every = examples(session, model, task)
        answers = right_answers(given, every, is_chat=session.is_chat)
        steps = max(map(len, answers))
        shape = Shape(
            sizes.batch or last - first,
            max(len(one.prompt) for one in every),
            steps,
            CHUNK,
        )
        rows = [row + [CHOOSE] * (steps - len(row)) for row in answers[first:last]]
        found = drive(
            given,
            session.method(method),
            shape,
            [one.prompt for one in every[first:last]],
            rows,
            steps,
        )
        sizes_of = map(len, answers[first:last])
        pairs = zip(found.log_probs, sizes_of, strict=True)
        return [-float(row[:count].mean()) for row, count in pairs]

    key = "nats", model, task, session.is_chat, method, room(session)
    return np.array(session.sampled(key, sizes.examples, make))


def right_answers(
    model: LanguageModel, examples: Sequence[Prompted], *, is_chat: bool
) -> list[list[int]]:
    """The tokens of each right answer behind its prompt."""
    if is_chat:
        whole = [
            chat.encode(model.tokenizer, one.text + one.answer) for one in examples
        ]
    else:
        whole = [haystack.whole(model.tokenizer, one) for one in examples]
    return [
        list(row[len(one.prompt) :]) for row, one in zip(whole, examples, strict=True)
    ]
