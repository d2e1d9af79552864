"""Counting as RULER asks it: the words that come most often in a list, or in a text."""

import math
import string
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.evaluation.tasks.ruler import vocabulary
from kvjax.evaluation.tasks.ruler.fitting import Parts, unused

COMMON = 10  # words that are asked for
COMMON_REPLY = 120
FREQUENT_REPLY = 50
LONG = 4096  # tokens of a context from which on words are repeated more often
LEAST_WORDS = COMMON + 1
LEAST_CODED = 100  # coded words: with fewer the ranks are not told apart
ALPHA = 2.0  # rank r comes in proportion to r ** -ALPHA
_LETTERS = np.array(list(string.ascii_lowercase))


def common_words(context: int, key: tuple[int, ...]) -> Callable[[int], Parts]:
    """Returns the function that writes a list of so many different words.

    Ten of them come 30 times and the others 3 times; in a context of less than 4,096
    tokens 6 times and once. A list of 40 (20) other words and its answer come first.

    Args:
        context: tokens.
        key: seeds, and the example's number.
    """
    shown, often = (40, (10, 3)) if context >= LONG else (20, (3, 1))
    times = (30, 3) if context >= LONG else (6, 1)

    def build(count: int) -> Parts:
        rng = np.random.default_rng(key)
        common, example, others = drawn_words(rng, shown, count - COMMON)
        before = numbered(rng, example[:COMMON], example[COMMON:], often)
        told = " ".join(f"{i}. {word}" for i, word in enumerate(example[:COMMON], 1))
        context, question, prefix, _ = before
        asked = numbered(rng, common, others, times)
        return asked._replace(
            context=f"{context}{question}{prefix}{told}\n{asked.context}"
        )

    return build


def drawn_words(
    rng: np.random.Generator, shown: int, others: int
) -> tuple[list[str], list[str], list[str]]:
    """Returns the common words, those of the shown list, and `others` more.

    No other word has a common one in it, so a reply that names it does not score.
    """
    words = vocabulary.words(rng)
    common: list[str] = []
    while len(common) < COMMON:
        word = next(words)
        if not any(one in word or word in one for one in common):
            common.append(word)
    rest: list[str] = []
    while len(rest) < shown + others:
        word = next(words)
        if not any(one in word for one in common):
            rest.append(word)
    return common, rest[:shown], rest[shown:]


def numbered(
    rng: np.random.Generator,
    common: Sequence[str],
    others: Sequence[str],
    times: tuple[int, int],
) -> Parts:
    """Returns a numbered list in which words come so many times, shuffled."""
    words = [*common] * times[0] + [*others] * times[1]
    order = rng.permutation(len(words))
    text = " ".join(f"{place}. {words[i]}" for place, i in enumerate(order, 1))
    return Parts(
        "Below is a numbered list of words. In these words, some appear more often "
        f"than others. Memorize the ones that appear most often.\n{text}\n",
        f"Question: What are the {COMMON} most common words in the above list?",
        f" Answer: The top {COMMON} words that appear most often in the list are:",
        tuple(common),
    )


def frequent_words(context: int, key: tuple[int, ...]) -> Callable[[int], Parts]:
    """Returns the function that writes a coded text of about so many words.

    A word of rank r comes in proportion to ``r ** -2``; the first is dots, the next
    three are asked for. There are as many different words as `context` has times 50
    tokens.

    Args:
        context: tokens.
        key: seeds, and the example's number.
    """
    different = max(context // 50, 5)
    shares = np.arange(1, different + 1) ** -ALPHA / (math.pi**2 / 6)

    def build(count: int) -> Parts:
        rng = np.random.default_rng(key)
        words = unused(lambda: "".join(rng.choice(_LETTERS, 6)), different - 1)
        coded = np.repeat(["...", *words], (shares * count).astype(int))
        text = " ".join(rng.permutation(coded).tolist())
        return Parts(
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {text}\n",
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded "
            "text?",
            " Answer: According to the coded text above, the three most frequently "
            "appeared words are:",
            tuple(words[:3]),
        )

    return build
