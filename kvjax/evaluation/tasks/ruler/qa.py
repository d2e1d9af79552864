"""Questions over many documents, as RULER asks them: few of them hold the answer."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvjax.evaluation.tasks.ruler.fitting import Parts

REPLY = 32
_ASKS = (
    "Answer the question based on the given documents. Only give me the answer and do "
    "not output any other words.\n\n"
)


class Asked(NamedTuple):
    """A question, its answers, and documents: first those that one must have read."""

    question: str
    answers: tuple[str, ...]  # one is enough
    documents: list[str]


# (random numbers, the question's number, documents) -> a question over so many
Pose = Callable[[np.random.Generator, int, int], Asked]


def builder(pose: Pose, key: tuple[int, ...], index: int) -> Callable[[int], Parts]:
    """Returns the function that writes an example of so many documents, shuffled.

    Args:
        pose: asks.
        key: seeds, and the example's number.
        index: the example's number.
    """

    # One number a seed: examples of it ask different questions.
    first = int(np.random.default_rng(key[:-1]).integers(1 << 31))

    def build(count: int) -> Parts:
        rng = np.random.default_rng(key)
        asked = pose(rng, first + index, count)
        order = rng.permutation(len(asked.documents)).tolist()
        text = "\n\n".join(
            f"Document {place}:\n{asked.documents[i]}"
            for place, i in enumerate(order, 1)
        )
        return Parts(
            f"{_ASKS}The following are given documents.\n\n{text}\n\n",
            f"{_ASKS}Question: {asked.question}",
            " Answer:",
            asked.answers,
        )

    return build
