"""Tasks with known answers, made from any text: seeded, offline, fitted to a context.

A needle is hidden between the lines of a text and asked for at its end; or the text
itself is predicted. Example `i` of a seed is the same whatever the number of examples.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvjax.interface import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = tuple(
    re.findall(
        r"\w+",
        "apple river stone cloud tiger piano lemon chair ocean maple horse candle "
        "window bridge garden silver rocket pepper island button mirror basket castle "
        "dragon engine forest guitar hammer jacket ladder magnet needle orange pencil "
        "rabbit saddle ticket valley walnut yellow",
    )
)

_NEEDLE_LIKE = re.compile(r"pass key is|^key \w+ has value", re.IGNORECASE)


class Example(NamedTuple):
    """A prompt with one right answer."""

    text: str
    prompt: list[int]  # the text as tokens
    answer: str  # five digits
    answer_tokens: int  # tokens the answer takes after the prompt
    depth: float  # where the needle was asked to sit: 0 = first line, 1 = last


def passkey(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int,
    n: int,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
) -> list[Example]:
    """One number hidden at a depth of a text, asked for at its end.

    Args:
        tokenizer: of the model under test.
        text: the haystack's lines, used from a random line on and again from the first
            where the text ends.
        context: most tokens of prompt and answer together.
        n: examples; example i has depth ``depths[i % len(depths)]``.
        seed: of the numbers and of the first line.
        depths: in [0, 1].

    Raises:
        ValueError: if `n` < 1, a depth is outside [0, 1] or `context` is too short.
    """
    _check(n, depths)

    def build(rng, lines, depth):
        (number,) = _numbers(rng, lines, 1)
        needles = [f"The pass key is {number}. Remember it.\n"]
        return needles, [depth], "\nThe pass key is ", number

    return _examples(tokenizer, text, context, n, seed, depths, build)


def multikey(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int,
    n: int,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    keys: int = 8,
) -> list[Example]:
    """Several keys with a value each, one of them asked for at the end.

    The key that is asked for sits at the example's depth, the others evenly apart.
    Arguments as :func:`passkey`; `keys` counts all keys, the asked one included.

    Raises:
        ValueError: as :func:`passkey`, and if `keys` is not in [1, 40].
    """
    _check(n, depths)
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"{keys=} must be in [1, {len(KEYS)}].")

    def build(rng, lines, depth):
        words = rng.permutation(KEYS)[:keys].tolist()
        numbers = _numbers(rng, lines, keys)
        spread = ((np.arange(keys - 1) + 0.5) / max(keys - 1, 1)).tolist()
        needles = [
            f"key {word} has value {number}.\n"
            for word, number in zip(words, numbers, strict=True)
        ]
        question = f"\nkey {words[0]} has value "
        return needles, [depth, *spread], question, numbers[0]

    return _examples(tokenizer, text, context, n, seed, depths, build)


def windows(
    tokenizer: Tokenizer, text: str, *, context: int, n: int, seed: int = 0
) -> list[list[int]]:
    """`n` windows of exactly `context` tokens of the text, disjoint, in seeded order.

    The windows are the same lattice for every seed; the seed picks among them. A
    tokenizer that puts tokens before every text (BOS) has them in every window.

    Raises:
        ValueError: if the text has fewer than `n` disjoint windows.
    """
    _check(n, (0.0,))
    prefix = tokenizer.encode("")
    body = tokenizer.encode(text)[len(prefix) :]
    size = context - len(prefix)
    if size < 2:
        raise ValueError(f"{context=} must leave room for 2 tokens after {prefix=}.")
    available = len(body) // size
    if available < n:
        raise ValueError(
            f"{n=} windows of {context=} tokens need {n * size} tokens of text, but it "
            f"has {len(body)}: lower n to {available} or give a longer text."
        )
    picked = np.random.default_rng(seed).permutation(available)[:n]
    return [prefix + body[i * size : (i + 1) * size] for i in picked.tolist()]


def is_correct(example: Example, generated: str) -> bool:
    """Whether the generated text begins with the answer (leading blanks ignored)."""
    return generated.lstrip().startswith(example.answer)


def _check(n: int, depths: Sequence[float]) -> None:
    if n < 1:
        raise ValueError(f"{n=} must be at least 1.")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={tuple(depths)} must be one or more within [0, 1].")


def _numbers(rng: np.random.Generator, lines: list[str], count: int) -> list[str]:
    # Five digits that the haystack does not contain anywhere, not even inside a number.
    haystack, numbers = "".join(lines), []
    while len(numbers) < count:
        number = str(rng.integers(10_000, 100_000))
        if number not in haystack and number not in numbers:
            numbers.append(number)
    return numbers


def _examples(tokenizer, text, context, n, seed, depths, build) -> list[Example]:
    source = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    source = [line for line in source if not _NEEDLE_LIKE.search(line)]
    if not text.strip() or not source:
        raise ValueError("the haystack's text has no line that is not itself a needle.")
    prefix = len(tokenizer.encode(""))
    # At least 1, so that the lines of a haystack are finite whatever the tokenizer.
    sizes = {x: max(len(tokenizer.encode(x)) - prefix, 1) for x in set(source)}
    examples = []
    for index in range(n):
        rng = np.random.default_rng((seed, index))
        first = int(rng.integers(len(source)))
        lines, used = [], 0
        while used <= context:
            lines.append(source[(first + len(lines)) % len(source)])
            used += sizes[lines[-1]]
        depth = float(depths[index % len(depths)])
        needles, places, question, answer = build(rng, lines, depth)
        while True:  # lines go from the end until the prompt and its answer fit
            body = _insert(lines, [sizes[line] for line in lines], needles, places)
            prompt = tokenizer.encode(body + question)
            whole = len(tokenizer.encode(body + question + answer))
            if whole <= context:
                break
            if not lines:
                raise ValueError(
                    f"{context=} is too short: the needle, its question and its "
                    f"answer take {whole} tokens."
                )
            while lines and whole > context:
                whole -= sizes[lines.pop()]
        answer_tokens = max(whole - len(prompt), 1)
        examples.append(Example(body + question, prompt, answer, answer_tokens, depth))
    return examples


def _insert(
    lines: list[str], sizes: list[int], needles: list[str], places: Sequence[float]
) -> str:
    # Each needle goes to the line boundary nearest to its place, measured in tokens.
    ends = np.cumsum([0, *sizes])
    boundaries = [int(np.abs(ends - place * ends[-1]).argmin()) for place in places]
    pieces = []
    for index in range(len(lines) + 1):
        here = zip(needles, boundaries, strict=True)
        pieces += [needle for needle, boundary in here if boundary == index]
        pieces += lines[index : index + 1]
    return "".join(pieces)
