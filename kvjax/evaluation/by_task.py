"""Tasks scored by string match under one method: each on its own, and their mean."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvjax.evaluation import compare_runs, statistics
from kvjax.evaluation.tasks.ruler.fitting import Kind, Matched
from kvjax.interface import LanguageModel, Method

# (number of the example, the example, what was generated)
OnAnswer = Callable[[int, Matched, str], None]


def run(
    model: LanguageModel,
    method: Method,
    examples: Sequence[Matched],
    asked: Mapping[str, Any],
    on_answer: OnAnswer,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Answers examples of any tasks and returns the scores, ready for JSON.

    Examples of one task that may answer as long are decoded together. The average is
    RULER's: the mean over tasks, each of them the mean of its examples.

    Args:
        examples: of any tasks, in any order.
        asked: `batch`, `chunk_size` and `question` of
            :func:`kvjax.evaluation.compare_runs.retrieve`.
        on_answer: called with an example's number, the example and what was answered.
        progress: called with the fraction that is done.

    Returns:
        `tasks`, of each its string match with an interval; their `average`; and
        `examples`, in order.

    Raises:
        ValueError: as :func:`kvjax.evaluation.compare_runs.retrieve`.
    """
    groups: dict[Kind, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.kind, []).append(index)
    listed: dict[int, dict[str, Any]] = {}
    for kind, indices in groups.items():
        before = len(listed)

        def answered(place, first, said, indices=indices):
            del place  # there is one method
            for index, answer in zip(indices[first:], said, strict=False):
                on_answer(index, examples[index], answer)

        def done(fraction, before=before, count=len(indices)):
            progress((before + fraction * count) / len(examples))

        (replies,) = compare_runs.retrieve(
            model,
            [method],
            [examples[index] for index in indices],
            new_tokens=kind.reply,
            on_answers=answered,
            progress=done,
            **{**asked, "batch": min(asked["batch"], len(indices))},
        )
        for index, answer, score in zip(
            indices, replies.answers, replies.scores, strict=True
        ):
            listed[index] = _entry(examples[index], answer, score)
    entries = [listed[index] for index in range(len(examples))]
    scores: dict[str, list[float]] = {}
    for entry in entries:
        scores.setdefault(entry["task"], []).append(entry["score"])
    tasks = {
        task: statistics.share_interval(values)._asdict()
        for task, values in scores.items()
    }
    average = sum(interval["mean"] for interval in tasks.values()) / len(tasks)
    return {"tasks": tasks, "average": average, "examples": entries}


def _entry(example: Matched, answer: str, score: float) -> dict[str, Any]:
    return {
        "task": example.task,
        "prompt_tokens": len(example.prompt),
        "expected": list(example.answers),
        "answer": answer,
        "score": score,
    }
