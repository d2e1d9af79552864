"""Percentiles: order statistics where tokens are independent, wider where they are not.

Coverage is counted over draws whose percentile is known in closed form.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kvjax.evaluation.percentiles import count_interval, percentile_interval


def order_statistics(samples, share, confidence=0.95):
    """Textbook ends from independent samples, by sums of binomial probabilities."""
    ordered = sorted(samples)
    n, tail = len(ordered), (1 - confidence) / 2
    chances = [
        math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)
    ]
    sums = np.cumsum(chances)
    low = next(k for k in range(n + 1) if sums[k] >= tail)
    high = next(k for k in range(n + 1) if sums[k] >= 1 - tail) + 1
    return (
        ordered[low - 1] if low else 0.0,
        ordered[high - 1] if high <= n else math.inf,
    )


def test_independent_tokens_have_the_ends_of_order_statistics():
    # Dealt to the windows in turn, but for two: shares vary less than by chance.
    samples = np.arange(1.0, 601.0).reshape(60, 10).T.copy()
    samples[samples == 539.0], samples[samples == 541.0] = 541.5, 539.0
    found = percentile_interval(samples, share=0.9)
    assert found[:1] + found[3:] == (540.0, 10)
    assert found[1:3] == order_statistics(samples.ravel(), 0.9)


def test_the_estimate_is_the_least_that_no_more_exceed():
    samples = np.random.default_rng(0).permutation(np.arange(200.0)).reshape(4, 50)
    assert percentile_interval(samples).mean == 197.0  # 198 of 200 are up to it
    assert percentile_interval([np.arange(50.0)]) == (49.0, 0.0, math.inf, 1)


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_intervals_cover_as_often_as_they_say(alike):
    """Windows of exponential tokens, times what is the window's own if `alike`."""
    rng = np.random.default_rng(1)
    windows, tokens, share = 16, 40, 0.9
    if alike:
        # A window's scale is 0.5 or 2, evenly: the percentile solves for their mean.
        grid = np.linspace(0.0, 20.0, 200_001)
        below = (stats.expon.cdf(grid / 0.5) + stats.expon.cdf(grid / 2.0)) / 2
        truth = grid[np.searchsorted(below, share)]
    else:
        truth = stats.expon.ppf(share)
    hits, naive = 0, 0
    for _ in range(400):
        scales = np.ones(windows)
        if alike:
            scales = rng.choice([0.5, 2.0], windows)
        samples = rng.exponential(size=(windows, tokens)) * scales[:, None]
        found = percentile_interval(samples, share)
        hits += found.low <= truth <= found.high
        low, high = order_statistics(samples.ravel(), share)
        naive += low <= truth <= high
    assert hits / 400 >= 0.93
    if alike:
        assert naive / 400 < 0.88  # as if tokens were independent


def test_too_few_tokens_have_no_upper_end():
    rng = np.random.default_rng(2)
    many = percentile_interval(rng.random((200, 5)))
    assert many.high < math.inf
    few = percentile_interval(rng.random((50, 5)))
    assert few.high == math.inf
    assert 0 < few.low <= few.mean


def test_windows_that_are_alike_count_as_one_sample_each():
    samples = np.repeat(np.arange(20.0)[:, None], 50, axis=1)
    found = percentile_interval(samples, share=0.5)
    expected = order_statistics(range(20), 0.5)
    assert found.low <= expected[0]
    assert found.high >= expected[1]


def test_few_windows_know_little_of_how_much_they_vary():
    """By their variance four of them are 72 independent tokens, by Student's t 27."""
    up_to, others = iter(range(72)), iter(range(100, 108))
    samples = [
        [*itertools.islice(up_to, count), *itertools.islice(others, 20 - count)]
        for count in (16, 18, 19, 19)  # shares of mean .9, of variance .005
    ]
    independent = 0.9 * 0.1 / (0.005 / 4) * (1.959964 / 3.182446) ** 2
    assert int(independent) == 27
    last, end = order_statistics(range(27), 0.9)
    found = percentile_interval(samples, share=0.9)
    assert found.mean == 71
    assert found.low == math.ceil((last + 1) / 27 * 80) - 1
    assert found.high == end == math.inf


def test_counts_stay_in_their_range():
    found = count_interval([64, 64, 60, 64], most=64)
    assert found.mean == 63
    assert 0 < found.low < 63 < found.high <= 64
    assert count_interval([64] * 8, most=64).high == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: percentile_interval([1.0]), r"shape \(1,\) must be windows of tokens"),
        (lambda: percentile_interval([[]]), r"shape \(1, 0\) must be windows"),
        (lambda: percentile_interval([[1.0, -2.0]]), "from -2.0 on must not be neg"),
        (lambda: percentile_interval([[1.0]], share=1.0), r"share=1.0 must be in \(0"),
        (
            lambda: percentile_interval([[1.0]], confidence=0.0),
            "confidence=0.0 must be in",
        ),
        (lambda: count_interval([1], most=0), "most=0 must be at least 1"),
    ],
)
def test_errors_name_the_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
