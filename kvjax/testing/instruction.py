"""The promises of a method that is told an instruction before it has read a prompt."""

from typing import Any

import jax
import numpy as np

from kvjax.testing import streams
from kvjax.testing.streams import NothingToCheckError, expect
from kvjax.testing.subject import Subject


def an_instruction_votes_and_is_forgotten(subject: Subject) -> None:
    """Shown twice it is shown once, a row without one stays, and so does one without a
    chunk that waits; what `settle` leaves is what `finish` leaves, and can be read on.

    Padding holds huge numbers, as in a prompt.
    """
    asked = subject.method.hooks.asked
    if asked is None:
        raise NothingToCheckError
    probe, close = jax.jit(asked.probe), jax.jit(asked.close)
    state, _ = subject.prefill()
    lengths = [asked.stride, 0, 1, asked.stride, 1, 0]
    shown = streams.chunk(subject.stream, [0] * 6, lengths, size=asked.stride + 1)
    once, out = probe(state, *shown)
    expect(
        (out.dtype, out.shape) == (shown[0].dtype, shown[0].shape),
        f"a probe returns {out.dtype}{out.shape} for queries {shown[0].shape}.",
    )
    for row in (1, 5):
        _expect_same(_row(once, row), _row(state, row), f"row {row}, which has none")
    _expect_same(probe(once, *shown), (once, out), "what was shown once")
    closed = close(once)
    _expect_same(close(closed), closed, "a context that was closed")
    settled = jax.jit(asked.settle)(closed)
    ended = jax.eval_shape(subject.jitted_finish, state)
    expect(
        _types(settled) == _types(ended),
        "settle leaves another state than finish does.",
    )
    read, _ = subject.jitted_prefill(settled, *shown)
    expect(_types(read) == _types(ended), "what is read on has another state.")
    _expect_same(subject.jitted_finish(read), read, "a state that is settled")


def _types(state: Any) -> Any:
    kinds = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state)
    return jax.tree.structure(state), jax.tree.leaves(kinds)


def _row(state: Any, row: int) -> list[Any]:
    return [leaf[row] for leaf in jax.tree.leaves(state)]


def _expect_same(actual: Any, expected: Any, what: str) -> None:
    """Raises ContractError unless all arrays are equal, bit by bit."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for now, was in pairs:
        same = np.asarray(now).tobytes() == np.asarray(was).tobytes()
        expect(same, f"{what}: changed.")
