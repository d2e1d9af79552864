"""Long answers that are checked step by step: a search for a sum, and a route.

Every step follows from the prompt and the steps before it, and is a line of the answer;
there is one right next line at a time. What a method forgets while it generates shows.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kvjax.evaluation.tasks import haystack
from kvjax.evaluation.tasks.ruler import facts
from kvjax.evaluation.tasks.ruler.fitting import largest
from kvjax.interface import Tokenizer
from kvjax.text import encoding

MOST = 2048  # tokens of an answer
NUMBERS = 4  # that a search begins with; a shown one with fewer
SHOWN_NUMBERS = 3
_DRAWS = 64  # of numbers, until a search takes more than half of its room
_SIGNS = ("bus", "train", "ferry", "plane")


class Steps(NamedTuple):
    """A prompt, and the lines that answer it."""

    text: str
    prompt: list[int]  # the text as tokens
    answer: str  # the lines, a line end between them
    answer_tokens: int  # tokens the answer takes after the prompt
    asked_at: int  # of the prompt's tokens, those before the question
    steps: tuple[str, ...]  # the lines

    @property
    def asks(self) -> str:
        """The words of a chat's user behind the prompt: it has asked already."""
        return ""

    def score(self, generated: str) -> float:
        """Share of the steps that come right before the first mistake, in [0, 1].

        A step is a line, blanks around it and empty lines left out, and is right if it
        is the line of the answer at its place. Lines beyond the last do not count.
        """
        said = [line.strip() for line in generated.split("\n") if line.strip()]
        right = 0
        for line, step in zip(said, self.steps, strict=False):
            if line != step:
                break
            right += 1
        return right / len(self.steps)


class _Parts(NamedTuple):
    context: str
    question: str
    steps: tuple[str, ...]


def countdown(
    tokenizer: Tokenizer,
    text: str = "",
    *,
    context: int,
    n: int,
    seed: int = 0,
    output: int | None = None,
) -> list[Steps]:
    """A search for a number that four numbers make, written down attempt by attempt.

    Two numbers are joined at a time, in the order of the list, by plus, minus (the
    smaller from the larger), times and divided by (where nothing remains); the result
    goes to the end of the list. When one number is left and is not the target, the last
    choice is changed. A line is an attempt: ``From 3 5 7: 3 + 5 = 8, leaves 7 8.``,
    ``From 7 8: 7 + 8 = 15, not 1.`` or, in the end, ``From 7 8: 8 - 7 = 1, found.``
    The prompt states the rules and shows as many searches over three numbers as fit.

    Args:
        tokenizer: of the model under test.
        text: not used: the prompt is generated.
        context: most tokens of prompt and answer together.
        n: examples.
        seed: of the numbers.
        output: most tokens of an answer, of which it takes more than half; a third of
            the context, at most 2,048, if None.

    Raises:
        ValueError: if `n` < 1, or the context is too short.

    Source:
        After LongProc's Countdown, Ye et al., arXiv:2501.05414.
    Deviations:
        Generated; the order of attempts is fixed, so that one line is right at a time,
        and the score counts lines; there the order is heuristic, and the search is
        shown by examples alone.
    """
    del text

    def example(rng: np.random.Generator, room: int) -> Callable[[int], _Parts]:
        measure = functools.partial(_tokens, tokenizer)
        numbers, target, lines = _fitted_search(rng, measure, room)
        shown = [_shown_search(rng) for _ in range(64)]
        asked = f"Numbers: {_spaced(numbers)}\nTarget: {target}\nSearch:\n"
        return lambda count: _Parts(
            _RULES + "".join(shown[:count]), asked, tuple(lines)
        )

    return _examples(tokenizer, example, "countdown", context, n, seed, output, 1, 64)


_RULES = (
    "Join two numbers of the list at a time, in the order of the list, by +, - (the "
    "smaller from the larger), * and / (where nothing remains). The result goes to the "
    "end of the list. When one number is left and it is not the target, change the "
    "last choice. Write a line for every attempt, until the target is found.\n\n"
)


def _spaced(numbers) -> str:
    return " ".join(map(str, numbers))


def _results(a: int, b: int) -> Iterator[tuple[str, int]]:
    """Yields what two numbers make, each with how it is written."""
    yield f"{a} + {b}", a + b
    large, small = max(a, b), min(a, b)
    if large > small:
        yield f"{large} - {small}", large - small
    yield f"{a} * {b}", a * b
    if small > 0 and large % small == 0:
        yield f"{large} / {small}", large // small


def search(numbers: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
    """Yields the attempts of a search in their order, and what is left alone.

    An attempt that leaves several numbers is a line that says which, and None; one that
    leaves a single number has to be compared with a target, and comes with the number.
    """
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            rest = [x for place, x in enumerate(numbers) if place not in (i, j)]
            for written, result in _results(numbers[i], numbers[j]):
                line = f"From {_spaced(numbers)}: {written} = {result}"
                if rest:
                    left = (*rest, result)
                    yield f"{line}, leaves {_spaced(left)}.", None
                    yield from search(left)
                else:
                    yield line, result


def _written(numbers: tuple[int, ...], target: int) -> list[str]:
    """The lines of a search up to the target."""
    lines = []
    for line, alone in search(numbers):
        if alone is None:
            lines.append(line)
        elif alone == target:
            return [*lines, f"{line}, found."]
        else:
            lines.append(f"{line}, not {target}.")
    raise ValueError(f"{numbers=} do not make {target=}.")


def _targets(numbers: tuple[int, ...], most: int) -> list[int]:
    """The numbers that a search finds within so many lines, the quickest first."""
    found: dict[int, None] = {}
    for place, (_, alone) in enumerate(search(numbers)):
        if place >= most:
            break
        if alone is not None:
            found[alone] = None
    return list(found)


def _drawn(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(int(x) for x in rng.integers(2, 20, count))


def _fitted_search(
    rng: np.random.Generator, measure: Callable[[str], int], room: int
) -> tuple[tuple[int, ...], int, list[str]]:
    """Draws numbers, and the target that takes the longest search within the room."""
    best: tuple[int, Any] = (0, None)
    for _ in range(_DRAWS):
        numbers = _drawn(rng, NUMBERS)
        targets = _targets(numbers, max(room // 8, 4))
        searches = [_written(numbers, target) for target in targets]

        def size(place: int, searches=searches) -> int:
            return measure("\n".join(searches[place]))

        if size(0) > room:
            continue
        place = largest(size, room, 0, len(targets) - 1)
        if (taken := size(place)) > best[0]:
            best = taken, (numbers, targets[place], searches[place])
        if taken > room // 2:
            break
    if best[1] is None:
        raise ValueError(
            f"an answer of {room} tokens is too short for a search: raise context or "
            "output."
        )
    return best[1]


def _shown_search(rng: np.random.Generator) -> str:
    numbers = _drawn(rng, SHOWN_NUMBERS)
    targets = _targets(numbers, 10)
    target = targets[int(rng.integers(len(targets)))]
    lines = "\n".join(_written(numbers, target))
    return f"Numbers: {_spaced(numbers)}\nTarget: {target}\nSearch:\n{lines}\n\n"


def path_traversal(
    tokenizer: Tokenizer,
    text: str = "",
    *,
    context: int,
    n: int,
    seed: int = 0,
    output: int | None = None,
) -> list[Steps]:
    """A route from town to town, where from every town one line leads on.

    The prompt describes the lines in random order, ``From Oakham, a bus goes to
    Ashby.``, those of the route and as many others as fit; the answer lists those of
    the route in their order, ``From Oakham by bus to Ashby.``

    Args:
        tokenizer, text, context, n, seed, output: as :func:`countdown`.

    Raises:
        ValueError: if `n` < 1, or the context is too short.

    Source:
        After LongProc's Path Traversal, Ye et al., arXiv:2501.05414.
    Deviations:
        Generated, with invented names; other lines lead into the route too; no worked
        example, but the form of a step is stated.
    """
    del text

    def example(rng: np.random.Generator, room: int) -> Callable[[int], _Parts]:
        towns = facts.town_names(rng)
        route = [next(towns) for _ in range(room // 4 + 3)]
        by = [_SIGNS[i] for i in rng.integers(len(_SIGNS), size=len(route))]
        steps = [
            f"From {a} by {sign} to {b}."
            for a, b, sign in zip(route, route[1:], by, strict=False)
        ]

        def size(count: int) -> int:
            return _tokens(tokenizer, "\n".join(steps[:count]))

        if size(2) > room:
            raise ValueError(
                f"an answer of {room} tokens is too short for a route: two steps take "
                f"{size(2)}; raise context or output."
            )
        length = largest(size, room, 2, len(steps))
        route = route[: length + 1]
        key = rng.integers(1 << 31, size=4).tolist()

        def build(count: int) -> _Parts:
            lines = _described(np.random.default_rng(key), route, by, count)
            return _Parts(
                "From every town one line leads to one other town.\n\n"
                + "".join(f"{line}\n" for line in lines),
                f"\nHow does one get from {route[0]} to {route[-1]}? List every step "
                'in order, each on a line of its own, as in "From A by bus to B."\n'
                "Route:\n",
                tuple(steps[:length]),
            )

        return build

    name = "path_traversal"
    return _examples(tokenizer, example, name, context, n, seed, output, 0, 1 << 30)


def _described(rng, route: list[str], by: list[str], others: int) -> list[str]:
    """The lines of a country: those of the route, and of so many other towns."""
    towns = facts.town_names(rng)
    known, extra = set(route), []
    while len(extra) < others:
        if (town := next(towns)) not in known:
            extra.append(town)
    every = [*route, *extra]
    aims = [*route[1:], route[0]]  # from the last town one goes on too
    signs = [*by[: len(route)]]
    for town in extra:
        aim = town
        while aim == town:
            aim = every[int(rng.integers(len(every)))]
        aims.append(aim)
        signs.append(_SIGNS[int(rng.integers(len(_SIGNS)))])
    lines = [
        f"From {town}, a {sign} goes to {aim}."
        for town, sign, aim in zip(every, signs, aims, strict=True)
    ]
    return [lines[i] for i in rng.permutation(len(lines)).tolist()]


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(encoding.inside(tokenizer.encode, text))


def _examples(
    tokenizer, example, task, context, n, seed, output, least, most
) -> list[Steps]:
    """Fits each example's prompt around an answer of at most `output` tokens."""
    if n < 1:
        raise ValueError(f"{n=} must be at least 1.")
    room = min(context // 3, MOST) if output is None else output
    if not 1 <= room < context:
        raise ValueError(f"{output=} must be in [1, {context=}).")
    made = []
    for index in range(n):
        build = example(np.random.default_rng((seed, index)), room)

        def asked(count: int, build=build) -> Steps:
            return _asked(tokenizer, build(count))

        def size(count: int, asked=asked) -> int:
            one = asked(count)
            return len(one.prompt) + one.answer_tokens

        if (shortest := size(least)) > context:
            raise ValueError(
                f"{context=} is too short for {task}: prompt and answer take "
                f"{shortest} tokens."
            )
        made.append(asked(largest(size, context, least, most)))
    return made


def _asked(tokenizer: Tokenizer, parts: _Parts) -> Steps:
    answer = "\n".join(parts.steps)
    whole = parts.context + parts.question
    asked = haystack.ask(tokenizer, whole, answer, context=parts.context)
    return Steps(**asked._asdict(), steps=parts.steps)
