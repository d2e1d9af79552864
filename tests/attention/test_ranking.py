"""Ranking of scores that come in parts, against loops over all of them."""

import functools

import jax
import numpy as np
import pytest

from kvjax.attention import ranking

TOKENS = 61


def drawn(rows, seed):
    """Scores with many ties, and some that are none."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-6, 6, (2, rows, TOKENS)).astype(np.float32) / 4
    return np.where(rng.random(scores.shape) < 0.1, -np.inf, scores)


def ranked(scores, kernel, most, end):
    """Positions of the highest pooled scores before `end`, one row."""
    pooled = []
    for p in range(end):
        around = range(max(p - kernel // 2, 0), min(p + kernel // 2 + 1, TOKENS))
        pooled.append(max(scores[i] for i in around))
    order = sorted(range(end), key=lambda p: (-pooled[p], p))
    found = [p for p in order if pooled[p] > -np.inf][:most]
    return found + [-1] * (most - len(found))


def by_parts(scores, kernel, most, end, sizes):
    best = ranking.none_yet(*scores.shape[:2], most, kernel)
    start, add = 0, jax.jit(ranking.add)
    for size in sizes:
        part = jax.device_put(scores[:, :, start : start + size])
        best = add(best, part, np.int32(start), end)
        start += size
    return jax.jit(ranking.ended)(best, np.int32(start), end)


@pytest.mark.parametrize(
    ("kernel", "most", "sizes"),
    [
        (1, 9, [20, 20, 21]),
        # A part is narrower than the pooling; and than the list.
        (7, 9, [2] * 30 + [1]),
        (5, 40, [61]),
        # Nothing came behind token 40, where rows end.
        (7, 24, [20, 20]),
    ],
)
def test_is_the_ranking_of_all_scores(kernel, most, sizes):
    """Token by token; of equals the lower position, none past a row's end."""
    scores, ends = drawn(3, kernel), np.asarray([min(sum(sizes), 60), 33], np.int32)
    scores[:, :, sum(sizes) :] = -np.inf
    found = by_parts(scores, kernel, most, ends, sizes)
    for b, r in np.ndindex(2, 3):
        expected = ranked(scores[b, r], kernel, most, int(ends[b]))
        np.testing.assert_array_equal(found.positions[b, r], expected)


def test_the_best_of_rows_are_the_best_of_their_maxima():
    """Each row less a number of its own, as weights are."""
    scores, ends = drawn(6, 3), np.asarray([61, 33], np.int32)
    less = np.arange(12, dtype=np.float32).reshape(2, 6, 1) / 4
    best = by_parts(scores, 3, 8, ends, [30, 31])
    merge = jax.jit(functools.partial(ranking.of_groups, groups=2))
    found = merge(best.scores - less, best.positions)
    for b, h in np.ndindex(2, 2):
        rows = slice(3 * h, 3 * h + 3)
        highest = (scores[b, rows] - less[b, rows]).max(0)
        expected = ranked(highest, 3, 8, int(ends[b]))
        np.testing.assert_array_equal(found[b, h], expected)
