"""The promises of a second reading: what it may change, and what it leaves alone."""

import functools
from typing import Any

import jax
import numpy as np

from kvjax.stores.contiguous import Contiguous
from kvjax.stores.paged import Paged
from kvjax.testing import streams
from kvjax.testing.streams import NothingToCheckError, expect
from kvjax.testing.subject import Subject


def a_second_reading_changes_only_what_it_learns(subject: Subject) -> None:
    """The prompt's own keys and values stay, and so does all of a row without tokens.

    Padding holds huge numbers, as in the first reading.
    """
    method, stream = subject.method, subject.stream
    prefill = subject.jitted_reread
    if prefill is None:
        raise NothingToCheckError
    before, _ = streams.prefill(method, subject.spec, stream)
    for start, lengths in streams.reread_chunks(stream):
        inputs = streams.chunk(stream, start, lengths, size=streams.REREAD)
        state, _ = prefill(before, *inputs)
        expect(
            jax.tree.structure(state) == jax.tree.structure(before),
            "the second reading returns another state than it is given.",
        )
        _expect_same(_stores(state), _stores(before), "the prompt's keys and values")
        for row in np.flatnonzero(lengths == 0):
            own = functools.partial(_row, row=int(row), batch=len(lengths))
            _expect_same(own(state), own(before), f"row {row}, which has no tokens")
        before = state


def _stores(state: Any) -> list[Any]:
    """The stores in a state, of all that a prompt has left."""
    kinds = Contiguous, Paged
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _row(state: Any, row: int, batch: int) -> list[np.ndarray]:
    """The part of each array that is the row's; all of what rows share."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [x[row : row + 1] if x.shape[:1] == (batch,) else x for x in leaves]


def _expect_same(actual: Any, expected: Any, what: str) -> None:
    """Raises ContractError unless all arrays are equal, bit by bit."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for now, was in pairs:
        expect(
            (now.dtype, now.shape) == (was.dtype, was.shape)
            and np.asarray(now).tobytes() == np.asarray(was).tobytes(),
            f"{what}: changed by the second reading.",
        )
