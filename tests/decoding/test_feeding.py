"""Feeding stops once greedy decoding has ended every row, and not before."""

import jax
import numpy as np
import pytest
from tiny import tiny_model

import kvjax
from kvjax.decoding import feeding, reader
from kvjax.decoding.feeding import CHOOSE, PIECE, feed

MODEL = tiny_model(deviation=0.1)
FULL = kvjax.full()
PROMPTS = [list(b"one of two"), list(b"and another, longer one")]
COUNT = 2 * PIECE + 5


def fed(wanted, eos_ids=(), **options):
    read = reader.prefill(
        MODEL, FULL, PROMPTS, max_new_tokens=COUNT, chunk_size=16, longest=32
    )
    return feed(MODEL._replace(eos_ids=eos_ids), FULL, read, wanted, **options)


@pytest.fixture(scope="module")
def whole():
    """What is said where nothing ends a row."""
    said = fed(np.full((2, COUNT), CHOOSE, np.int32), eos_ids=(0, 0))
    assert said.tokens.shape == (2, COUNT)
    return said


def first_after(rows, start):
    """A token of each row that it says first at `start` or later, and where."""
    found = []
    for row in rows.tolist():
        place = next(i for i in range(start, COUNT) if row[i] not in row[:i])
        found.append((row[place], place))
    return found


def test_it_stops_once_every_row_has_ended(whole):
    (one, first), (two, second) = first_after(whole.tokens, 3)
    size = max(
        min(row.index(token) for token in (one, two) if token in row)
        for row in whole.tokens.tolist()
    )
    assert 0 < size <= max(first, second)
    wanted = np.full((2, COUNT), CHOOSE, np.int32)
    said = fed(wanted, (one, two), until_end=True, watch=lengths)
    np.testing.assert_array_equal(said.tokens, whole.tokens[:, : size + 1])
    np.testing.assert_array_equal(said.log_probs, whole.log_probs[:, : size + 1])
    # The states hold all but the last, which no step followed.
    assert said.watched.shape[0] == size
    # One row that never ends keeps the other going, to the end.
    alone = [x for x in whole.tokens[0].tolist() if x not in whole.tokens[1]]
    assert alone, "the rows say the same: take other prompts"
    said = fed(wanted, (alone[0], alone[0]), until_end=True)
    np.testing.assert_array_equal(said.tokens, whole.tokens)


def lengths(before, after):
    """A watch: the states' length after a step."""
    del before
    return jax.tree.leaves(after)[0].shape[0]


def test_tokens_that_are_given_end_nothing(whole):
    wanted = whole.tokens.copy()
    ends = tuple(wanted[:, 1].tolist())
    said = fed(wanted, ends, until_end=True)
    np.testing.assert_array_equal(said.tokens, wanted)
    # Behind them it may end at once.
    wanted[:, 1:] = CHOOSE
    said = fed(wanted, ends, until_end=True)
    np.testing.assert_array_equal(said.tokens, whole.tokens[:, :2])


def test_one_program_serves_both(whole):
    programs = feeding.loop.steps(feeding._rule(None, False))
    before = programs._cache_size()
    fed(np.full((2, COUNT), CHOOSE, np.int32), (5, 6), until_end=True)
    assert programs._cache_size() == before
