"""Needles in a haystack, as RULER hides them: eight tasks of one sentence's wording.

A needle gives the value of a key. The haystack is one sentence over and over, prose, or
nothing but needles of other keys.
"""

import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvjax.evaluation.tasks.ruler import vocabulary
from kvjax.evaluation.tasks.ruler.fitting import Parts, unused

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again."
)
REPLY = 128
# Where needles may stand in prose, as shares of its sentences.
DEPTHS = np.round(np.linspace(0, 100, 40)) / 100


class Needle(NamedTuple):
    """A task: the needles it hides, in what, and how many of them it asks for."""

    haystack: str  # noise, prose or needles
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1  # of each key
    asked: int = 1  # keys


TASKS = {
    "niah_single_1": Needle("noise"),
    "niah_single_2": Needle("prose"),
    "niah_single_3": Needle("prose", value="uuids"),
    "niah_multikey_1": Needle("prose", keys=4),
    "niah_multikey_2": Needle("needles"),
    "niah_multikey_3": Needle("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needle("prose", values=4),
    "niah_multiquery": Needle("prose", keys=4, asked=4),
}


def builder(
    about: Needle, prose: Sequence[str], key: tuple[int, ...]
) -> Callable[[int], Parts]:
    """Returns the function that writes an example with so many lines of haystack.

    A longer one of the same seed has the same needles, at the same depths.

    Args:
        about: the task, one of `TASKS`.
        prose: sentences, for the tasks that hide in them.
        key: seeds, and the example's number.
    """

    def build(count: int) -> Parts:
        rng = np.random.default_rng(key)
        first, depths = rng.random(), rng.permutation(DEPTHS)
        place = rng.random()
        lines = [] if about.haystack == "needles" else [NOISE] * count
        if about.haystack == "prose":
            start = int(first * len(prose))
            lines = [prose[(start + i) % len(prose)] for i in range(count)]
        around = " ".join(lines)
        keys = unused(lambda: draw(rng, about.key), about.keys, around)
        taken = " ".join([around, *keys])
        values = unused(
            lambda: draw(rng, about.value), about.keys * about.values, taken
        )
        pairs = [(keys[i // about.values], value) for i, value in enumerate(values)]
        hidden = [said(about.value, *pairs[i]) for i in rng.permutation(len(pairs))]
        asked = rng.permutation(about.keys)[: about.asked].tolist()
        if about.haystack == "needles":
            taken = " ".join([*keys, *values])
            others = unused(lambda: draw(rng, about.key), count, taken)
            worth = unused(lambda: draw(rng, about.value), count, taken)
            lines = [said(about.value, *x) for x in zip(others, worth, strict=True)]
        if about.haystack == "prose":
            places = np.sort(depths[: len(hidden)])
            text = " ".join(inserted(lines, hidden, (places * count).astype(int)))
        else:
            text = "\n".join(inserted(lines, hidden, [int(place * (count + 1))]))
        query = listed([keys[i] for i in asked])
        answers = [value for i in asked for k, value in pairs if k == keys[i]]
        return worded(about, text, query, tuple(answers))

    return build


def said(value: str, key: str, worth: str) -> str:
    """Returns a needle."""
    return f"One of the special magic {value} for {key} is: {worth}."


def draw(rng: np.random.Generator, what: str) -> str:
    """Returns a random key or value: `words`, `numbers` of seven digits, or `uuids`."""
    if what == "numbers":
        return str(rng.integers(10**6, 10**7))
    if what == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return vocabulary.pair(rng)


def inserted(
    lines: Sequence[str], needles: Sequence[str], places: Sequence[int] | np.ndarray
) -> list[str]:
    """Returns the lines with a needle before the line of each place, in order."""
    pieces, last = [], 0
    for needle, place in zip(needles, places, strict=True):
        pieces += [*lines[last:place], needle]
        last = place
    return [*pieces, *lines[last:]]


def listed(keys: Sequence[str]) -> str:
    """Returns `a`, or `a, b, and c`."""
    return ", and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))


def worded(about: Needle, text: str, query: str, answers: tuple[str, ...]) -> Parts:
    """Returns RULER's words around a haystack: of one answer or of several."""
    is_one = about.asked * about.values == 1
    what = about.value[:-1] if is_one else about.value
    some, are, every = ("A", "is", "is") if is_one else ("Some", "are", "are all")
    return Parts(
        f"{some} special magic {what} {are} hidden within the following text. Make "
        f"sure to memorize it. I will quiz you about the {what} afterwards.\n{text}\n",
        f"What {every} the special magic {what} for {query} mentioned in the provided "
        "text?",
        f" The special magic {what} for {query} mentioned in the provided text {are}",
        answers,
    )
