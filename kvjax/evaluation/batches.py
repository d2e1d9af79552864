"""Batches of equal sizes, so that compiled code serves all; what their runs share."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvjax.decoding.finite import NotFiniteError
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import LanguageModel
from kvjax.text.stream import continuation

T = TypeVar("T")
R = TypeVar("R")


class _Ticks:
    """A tokenizer whose text only says that tokens have come: a letter each."""

    def encode(self, text: str) -> list[int]:
        raise TypeError("prompts are tokens here.")

    def decode(self, tokens: list[int]) -> str:
        return "." * len(tokens)


def ticking(model: LanguageModel) -> LanguageModel:
    """Returns the model with a tokenizer that costs nothing: a letter a token."""
    return model._replace(tokenizer=_Ticks())


def equal(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Yields groups of exactly `size`, the last filled up from the first item on."""
    count = -(-len(items) // size) * size
    filled = [items[i % len(items)] for i in range(count)]
    for start in range(0, count, size):
        yield filled[start : start + size]


def at_once(job: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yields what the job makes of each item, in order; so many threads work at it.

    For what is not timed: most of a short run is compiling, which takes one core.
    """
    if threads == 1:
        yield from map(job, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(job, items)


def reply(model: LanguageModel, example: Prompted, tokens: Sequence[int]) -> str:
    """Returns the answer up to a token that ends a text: decoding stops at none."""
    tokens = list(tokens[: example.answer_tokens + 2])
    ends = [index for index, token in enumerate(tokens) if token in model.eos_ids]
    tokens = tokens[: ends[0]] if ends else tokens
    return continuation(model.tokenizer.decode, example.prompt, tokens)


@contextlib.contextmanager
def told_apart(place: int) -> Iterator[Any]:
    """Notes in an error of one method of several at which place it is."""
    try:
        yield
    except NotFiniteError as error:
        error.place = place
        raise


def release() -> None:
    """Gives freed memory back to the system, where the C library would keep it.

    Each thread of XLA has a heap of its own: what one has freed is of no use to the
    others, and adds up to more than the model.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
