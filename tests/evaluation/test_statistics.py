"""Intervals against SciPy, against textbook numbers, and against their own promise."""

import math

import numpy as np
import pytest
from scipy import stats

from kvjax.evaluation import statistics


@pytest.mark.parametrize("n", [1, 5, 20, 400])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_is_scipys(n, confidence):
    for successes in {0, 1, n // 3, n - 1, n}:
        ours = statistics.wilson(successes, n, confidence)
        test = stats.binomtest(successes, n)
        theirs = test.proportion_ci(confidence, method="wilson")
        assert ours.mean == successes / n
        assert ours.low == pytest.approx(theirs.low, abs=1e-12)
        assert ours.high == pytest.approx(theirs.high, abs=1e-12)
        assert 0 <= ours.low <= ours.mean <= ours.high <= 1
        assert ours.n == n


def test_mean_interval_has_students_quantile():
    # Textbook: t(0.975, 9 degrees of freedom) = 2.262.
    samples = np.arange(10.0)
    interval = statistics.mean_interval(samples)
    half = 2.262 * samples.std(ddof=1) / math.sqrt(10)
    assert interval.mean == 4.5
    assert interval.high - interval.mean == pytest.approx(half, rel=1e-3)
    assert interval.mean - interval.low == pytest.approx(half, rel=1e-3)


def test_mean_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, (2000, 6))
    hits = 0
    for draw in draws:
        interval = statistics.mean_interval(draw)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.935 <= hits / 2000 <= 0.965  # a normal quantile would cover 0.90


def test_one_sample_has_no_spread():
    assert statistics.mean_interval([2.0]) == (2.0, -math.inf, math.inf, 1)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 10, 12)
    reference = hardness + rng.normal(0, 0.1, 12)
    candidate = reference - 0.5
    paired = statistics.paired_difference(candidate, reference)
    assert paired.mean == pytest.approx(-0.5)
    assert paired.high - paired.low < 1e-9
    alone = statistics.mean_interval(candidate)
    assert alone.high - alone.low > 1


def test_perplexity_is_monotone_and_in_order():
    log_probs = [-1.0, -2.0, -1.5, -1.2]
    interval = statistics.perplexity(log_probs)
    means = statistics.mean_interval(log_probs)
    assert interval.mean == pytest.approx(math.exp(-np.mean(log_probs)))
    assert interval.low == pytest.approx(math.exp(-means.high))
    assert interval.low < interval.mean < interval.high
    assert statistics.perplexity([-2.0]).high == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.wilson(0, 0), "n=0 must be at least 1"),
        (lambda: statistics.wilson(3, 2), r"successes=3 must be in \[0, n=2\]"),
        (lambda: statistics.wilson(1, 2, 1.5), r"confidence=1.5 must be in \(0, 1\)"),
        (lambda: statistics.mean_interval([]), "non-empty"),
        (
            lambda: statistics.paired_difference([1.0], [1.0, 2.0]),
            r"\(1,\) cannot be paired .* \(2,\)",
        ),
    ],
)
def test_errors_name_the_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
