"""Data to train on: a corpus, and named sources that draw samples from it."""

from collections.abc import Callable
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


class _FromCorpus(NamedTuple):
    function: Callable[[np.random.Generator, Corpus, int], Sample]
    corpus: Corpus

    def draw(self, rng: np.random.Generator, length: int) -> Sample:
        return self.function(rng, self.corpus, length)


def names() -> tuple[str, ...]:
    """Names of the sources a mixture may hold."""
    return tuple(_SOURCES)


def sources(corpus: Corpus) -> dict[str, Source]:
    """Every source by its name, over one corpus."""
    return {name: _FromCorpus(function, corpus) for name, function in _SOURCES.items()}
