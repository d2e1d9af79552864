"""Variable tracking as RULER asks it: all names that hold a value, one example shown.

A name is set to a number, the next one to that name, and so on: four hops among lines
of noise.
"""

import functools
import string
from collections.abc import Callable

import numpy as np

from kvjax.evaluation.tasks.ruler.fitting import Parts, largest, unused
from kvjax.evaluation.tasks.ruler.niah import NOISE, inserted
from kvjax.interface import Tokenizer
from kvjax.text import encoding

HOPS = 4
REPLY = 30
LEAST = HOPS + 1  # lines of noise: no two assignments stand side by side before them
SHOWN = 500  # tokens of the example that is shown, at most, its answer's included
_LETTERS = np.array(list(string.ascii_uppercase))


def builder(key: tuple[int, ...], shown: int) -> Callable[[int], Parts]:
    """Returns the function that writes an example among so many lines of noise.

    Args:
        key: seeds, and the example's number.
        shown: lines of noise of the example that is shown, from :func:`shown_lines`.
    """

    def build(count: int) -> Parts:
        rng = np.random.default_rng(key)
        example = chain(rng, shown, letters=3)
        before = f"{whole(example)} {' '.join(example.answers)}\n\n"
        asked = chain(rng, count, letters=5)
        return asked._replace(context=before + asked.context)

    return build


def chain(rng: np.random.Generator, count: int, *, letters: int) -> Parts:
    """Returns one chain among `count` lines of noise; names have so many letters."""
    value = str(rng.integers(10_000, 100_000))
    names = unused(lambda: "".join(rng.choice(_LETTERS, letters)), HOPS + 1, "VAR")
    held = [value, *(f"VAR {name}" for name in names[:-1])]
    lines = [f"VAR {name} = {x}" for name, x in zip(names, held, strict=True)]
    places = np.sort(rng.permutation(count)[: HOPS + 1])
    text = "\n".join(inserted([NOISE] * count, lines, places))
    return Parts(
        "Memorize and track the chain(s) of variable assignment hidden in the "
        f"following text.\n\n{text}\n",
        f"Question: Find all variables that are assigned the value {value} in the text "
        "above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are: ",
        tuple(names),
    )


def whole(parts: Parts) -> str:
    """Returns the prompt of an example as one text."""
    return (parts.context + parts.question + parts.prefix).rstrip(" ")


def shown_lines(tokenizer: Tokenizer) -> int:
    """Returns how many lines of noise the shown example has: `SHOWN` tokens of them."""
    measure = functools.partial(encoding.begin, tokenizer.encode)

    def size(count: int) -> int:
        example = chain(np.random.default_rng(0), count, letters=3)
        return len(measure(whole(example))) + REPLY

    if size(LEAST) >= SHOWN:
        return LEAST
    return largest(size, SHOWN, LEAST, SHOWN)
