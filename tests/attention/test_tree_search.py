"""The search that halves groups, over scores that are given."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.attention.tree_search import most_rounds, tree_search

FIRST, MOST = 3, 96


@functools.cache
def compiled(num, representative="centre"):
    """A search of rows `(B, FIRST + MOST)` of scores, and how many there are of each.

    Beyond a row's candidates there are higher scores than any of its own.
    """

    @jax.jit
    def search(scores, count):
        def score(ids):
            return jnp.take_along_axis(scores, ids, axis=-1, mode="fill")

        first = jnp.full_like(count, FIRST)
        return tree_search(score, first, count, num, representative)

    return search


def search(rows, num, representative="centre"):
    """The ids found of each row of scores, as one batch, and the rounds of all."""
    scores = np.full((len(rows), FIRST + MOST), 1e9, np.float32)
    for b, row in enumerate(rows):
        scores[b, FIRST : FIRST + len(row)] = row
    count = np.array([len(row) for row in rows], np.int32)
    found = compiled(num, representative)(scores, count)
    return np.asarray(found.ids), int(found.rounds)


def expected(row, num, representative="centre"):
    return oracles.tree_search(
        lambda page: float(row[page - FIRST]), FIRST, len(row), num, representative
    )


def drawn(seed=0, ties=False):
    """Rows of every number of candidates."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(count) for count in range(MOST + 1)]
    return [row // 4 if ties else row for row in rows]


@pytest.mark.parametrize(
    ("num", "representative"),
    [(1, "centre"), (5, "centre"), (5, "first"), (7, "last"), (40, "centre")],
)
def test_equals_loops(num, representative):
    """In one batch, of which each row ends as if it were alone: its rounds are fewer.

    Equal scores too; what is found is distinct, in order, and of its own candidates.
    """
    for rows in (drawn(), drawn(ties=True)):
        ids, rounds = search(rows, num, representative)
        longest = 0
        for row, listed in zip(rows, ids, strict=True):
            wanted = expected(row, num, representative)
            kept = listed[listed >= 0].tolist()
            assert kept == wanted.found
            assert (listed[len(kept) :] == -1).all()
            assert len(set(kept)) == len(kept) == min(num, len(row))
            assert all(FIRST <= page < FIRST + len(row) for page in kept)
            assert wanted.rounds <= most_rounds(len(row), num)
            longest = max(longest, wanted.rounds)
        assert rounds == longest


def test_rounds_are_logarithmic():
    for count in range(1, 200):
        for num in (1, 3, 8, 200):
            wanted = max(1, math.ceil(math.log2(math.ceil(count / num))))
            assert most_rounds(count, num) == wanted
    assert most_rounds(0, 3) == 1
    assert most_rounds(1 << 20, 1) == 20


@pytest.mark.parametrize("num", [1, 5, 7])
def test_scores_that_fall_or_rise_give_the_best(num):
    """Whatever the number of candidates, and with what stands for a group."""
    falling = [-np.arange(count) for count in range(1, MOST + 1)]
    ids, _ = search([*falling, *(-row for row in falling)], num)
    for row, down, up in zip(falling, *np.split(ids, 2), strict=True):
        kept = min(num, len(row))
        assert down[:kept].tolist() == [FIRST + i for i in range(kept)]
        last = FIRST + len(row) - 1
        assert sorted(up[:kept].tolist()) == [last - i for i in range(kept)][::-1]


def test_scores_constant_on_the_first_groups_give_the_best_values():
    num, rng, rows = 5, np.random.default_rng(3), []
    for power in (0, 1, 2, 3, 4):
        size = 2**power
        rows += [np.repeat(rng.permutation(num), size) for _ in range(20)]
    ids, _ = search(rows, num)
    for row, listed in zip(rows, ids, strict=True):
        values = sorted(row[listed - FIRST])
        assert values == sorted(row)[-num:]


def test_more_candidates_than_32_bits_can_multiply():
    """Edges of groups are products of two large numbers."""
    num, count = 4096, 1_000_003

    def score(ids):
        return -jnp.abs(ids - 700_000).astype(jnp.float32)

    ids = tree_search(
        score, jnp.zeros((1,), jnp.int32), jnp.full((1,), count, jnp.int32), num
    ).ids
    nearest = np.abs(np.asarray(ids) - 700_000)
    assert len(set(ids[0].tolist())) == num
    assert nearest.max() <= num // 2 + 1
