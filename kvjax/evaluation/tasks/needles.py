"""Tasks with known answers, made from any text: seeded, offline, fitted to a context.

A needle is hidden between the lines of a text and asked for at its end; or the text
itself is predicted. Example `i` of a seed is the same whatever the number of examples.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvjax.evaluation.tasks import haystack
from kvjax.evaluation.tasks.haystack import Needles
from kvjax.evaluation.tasks.words import WORDS
from kvjax.interface import Tokenizer
from kvjax.text import encoding

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = WORDS[:40]

_NEEDLE_LIKE = re.compile(r"pass key is|^key \w+ has value", re.IGNORECASE)
_NAMES = frozenset(WORDS)

# (rng, the haystack's lines, depth) -> what to hide and ask for
Build = Callable[[np.random.Generator, list[str], float], Needles]


class Example(NamedTuple):
    """A prompt with one right answer."""

    text: str
    prompt: list[int]  # the text as tokens
    answer: str  # five digits, behind a blank if that is one token with the first
    answer_tokens: int  # tokens the answer takes after the prompt
    depth: float  # where the needle was asked to sit: 0 = first line, 1 = last
    asked_at: int = 0  # tokens of the prompt before anything is asked

    def score(self, generated: str) -> float:
        """1 if the text begins with the answer, leading blanks ignored; else 0."""
        return float(generated.lstrip().startswith(self.answer.lstrip()))


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
        ValueError: if `n` < 1, a depth is outside [0, 1], `context` is too short, or
            the tokenizer cannot say the answer.
    """

    def build(rng, lines, depth):
        (number,) = haystack.new_numbers(rng, "".join(lines), 1)
        needle = f"The pass key is {number}. Remember it.\n"
        return Needles([needle], [depth], "\nThe pass key is ", number)

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
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"{keys=} must be in [1, {len(KEYS)}].")

    def build(rng, lines, depth):
        words = rng.permutation(KEYS)[:keys].tolist()
        numbers = haystack.new_numbers(rng, "".join(lines), keys)
        spread = ((np.arange(keys - 1) + 0.5) / max(keys - 1, 1)).tolist()
        needles = [
            f"key {word} has value {number}.\n"
            for word, number in zip(words, numbers, strict=True)
        ]
        question = f"\nkey {words[0]} has value "
        return Needles(needles, [depth, *spread], question, numbers[0])

    return _examples(tokenizer, text, context, n, seed, depths, build)


def variable_tracking(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int,
    n: int,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    hops: int = 2,
    chains: int = 4,
) -> list[Example]:
    """The value of a variable that was set from another one, `hops` times over.

    A chain is a number and its names: ``apple = 71432``, ``river = apple``, ``stone =
    river``, each a line of its own and in this order, other lines between them. Its
    last name is asked for: ``stone = ``. The number sits at the example's depth, the
    assignments evenly between there and the end; the lines of the other chains, which
    are only there to mislead, sit anywhere.

    Args:
        tokenizer, text, context, n, seed, depths: as :func:`passkey`.
        hops: assignments from name to name; 0 asks for a name that holds a number.
        chains: all of them, the asked one included.

    Raises:
        ValueError: as :func:`passkey`, and if `hops` < 0, `chains` < 1, or they take
            more names than there are words.

    Source:
        Hsieh et al., "RULER", COLM 2024, arXiv:2404.06654, variable tracking.
    Deviations:
        RULER states the value and asks for all names that hold it; here a name is
        given and the value asked for, which has one right answer and no instruction.
        Names are words, the text between the lines is any text, and there are
        misleading chains by default (RULER: one chain of four hops).
    """
    names = chains * (hops + 1)
    if hops < 0 or chains < 1 or names > len(WORDS):
        raise ValueError(
            f"{chains=} of {hops=} take {names} names: at least one chain of 0 hops, "
            f"at most {len(WORDS)} names."
        )

    def build(rng, lines, depth):
        words = rng.permutation(WORDS)[:names].reshape(chains, hops + 1).tolist()
        numbers = haystack.new_numbers(rng, "".join(lines), chains)
        needles, places = [], []
        for index, (chain, number) in enumerate(zip(words, numbers, strict=True)):
            held = [number, *chain[:-1]]
            pairs = zip(chain, held, strict=True)
            needles += [f"{name} = {value}\n" for name, value in pairs]
            evenly = depth + (1 - depth) * np.arange(hops + 1) / (hops + 1)
            anywhere = np.sort(rng.random(hops + 1))
            places += (anywhere if index else evenly).tolist()
        return Needles(needles, places, f"\n{words[0][-1]} = ", numbers[0])

    return _examples(tokenizer, text, context, n, seed, depths, build, _assigns)


def windows(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int,
    n: int,
    seed: int = 0,
    named: str = "n",
) -> list[list[int]]:
    """`n` windows of exactly `context` tokens of the text, disjoint, in seeded order.

    The windows are the same lattice for every seed; the seed picks among them. A
    tokenizer that puts tokens before every text (BOS) has them in every window; none
    has those behind a text (EOS). In errors the number of windows is called `named`.

    Raises:
        ValueError: if the text has fewer than `n` disjoint windows.
    """
    _check(n, (0.0,))
    prefix = list(encoding.added(tokenizer.encode).before)
    body = encoding.inside(tokenizer.encode, text)
    size = context - len(prefix)
    if size < 2:
        raise ValueError(f"{context=} must leave room for 2 tokens after {prefix=}.")
    available = len(body) // size
    if available < n:
        lower = f"lower {named} to {available} or " if available else ""
        raise ValueError(
            f"{named}={n} windows of {context=} tokens need {n * size} tokens of text, "
            f"but it has {len(body)}: {lower}give a longer text."
        )
    picked = np.random.default_rng(seed).permutation(available)[:n]
    return [prefix + body[i * size : (i + 1) * size] for i in picked.tolist()]


def _check(n: int, depths: Sequence[float]) -> None:
    if n < 1:
        raise ValueError(f"{n=} must be at least 1.")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={tuple(depths)} must be one or more within [0, 1].")


def _states_a_fact(line: str) -> bool:
    return _NEEDLE_LIKE.search(line) is not None


def _assigns(line: str) -> bool:
    # Sources are full of assignments, and some of their names are words of ours.
    name, _, value = line.partition("=")
    return bool(value) and name.strip() in _NAMES


def _examples(
    tokenizer: Tokenizer,
    text: str,
    context: int,
    n: int,
    seed: int,
    depths: Sequence[float],
    build: Build,
    is_taken: Callable[[str], bool] = _states_a_fact,
) -> list[Example]:
    _check(n, depths)
    source = haystack.source(tokenizer, text, is_taken)
    examples = []
    for index in range(n):
        rng = np.random.default_rng((seed, index))
        lines = haystack.cut(source, rng, context)
        depth = float(depths[index % len(depths)])
        needles = build(rng, lines, depth)
        asked = haystack.fit(tokenizer, lines, source.sizes, needles, context)
        examples.append(Example(**asked._asdict(), depth=depth))
    return examples
