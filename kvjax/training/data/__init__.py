"""Data to train on: a corpus, and named sources that draw samples from it."""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from kvjax.training.batch import Sample
from kvjax.training.data import retrieval
from kvjax.training.data.text import Corpus

_SOURCES = {
    "text": retrieval.text,
    "repeat": retrieval.repeat,
    "recall": retrieval.recall,
    "passkey": retrieval.passkey,
    "keys": retrieval.keys,
    "chain": retrieval.chain,
    "extraction": retrieval.extraction,
    "variables": retrieval.variables,
}


@runtime_checkable
class Source(Protocol):
    """Draws one sample of at most `length` targets, a function of `rng`'s state."""

    def draw(self, rng: np.random.Generator, length: int) -> Sample: ...


class _Drawn(NamedTuple):
    draw: functools.partial


def names() -> tuple[str, ...]:
    """Names of the sources a mixture may hold."""
    return tuple(_SOURCES)


def sources(corpus: Corpus) -> dict[str, Source]:
    """Every source by its name, over one corpus."""

    def drawn(function):
        return _Drawn(lambda rng, length: function(rng, corpus, length))

    return {name: drawn(function) for name, function in _SOURCES.items()}
