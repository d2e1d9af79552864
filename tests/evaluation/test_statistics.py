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


def test_ties_leave_room_for_an_example_that_differs():
    """Wilson's upper end for none of n is z^2 / (n + z^2)."""
    z = 1.959964
    for n in (8, 24):
        other = z * z / (n + z * z)
        scores = np.linspace(0, 1, n)
        found = statistics.paired_shares(scores, scores)
        assert found == pytest.approx((0, -other, other, n), rel=1e-5)
        # A method that is always right beside one that never is can only get worse.
        found = statistics.paired_shares(np.ones(n), np.zeros(n))
        assert found == pytest.approx((1, 1 - 2 * other, 1, n), rel=1e-5)
    some = np.array([1.0, 0.5, 0.0, 1.0])
    expected = statistics.paired_difference(some, some[::-1])
    assert statistics.paired_shares(some, some[::-1]) == expected


def test_rare_differences_are_covered():
    rng = np.random.default_rng(5)
    rate, hits = 0.02, 0
    for _ in range(2000):
        reference = (rng.random(24) > 0.5).astype(float)
        better = np.where(rng.random(24) < 2 * rate, 1.0, reference)
        found = statistics.paired_shares(better, reference)
        hits += found.low <= rate <= found.high
    assert hits / 2000 > 0.95  # where ties count as proof: 0.35


def test_perplexity_is_monotone_and_in_order():
    log_probs = [-1.0, -2.0, -1.5, -1.2]
    interval = statistics.perplexity(log_probs)
    means = statistics.mean_interval(log_probs)
    assert interval.mean == pytest.approx(math.exp(-np.mean(log_probs)))
    assert interval.low == pytest.approx(math.exp(-means.high))
    assert interval.low < interval.mean < interval.high
    assert statistics.perplexity([-2.0]).high == math.inf


@pytest.mark.parametrize("n", [10, 40])
def test_share_interval_covers_as_often_as_it_says(n):
    values, weights = np.arange(6) / 5, [0.1, 0.1, 0.1, 0.1, 0.2, 0.4]
    true, rng, hits = np.dot(values, weights), np.random.default_rng(n), 0
    for _ in range(1000):
        scores = rng.choice(values, n, p=weights)
        interval = statistics.share_interval(scores, resamples=2000)
        hits += interval.low <= true <= interval.high
    assert 0.925 <= hits / 1000 <= 0.975  # plain percentiles: 0.90 at n = 10


def test_share_interval_is_scipys_bootstrap_but_for_the_tails():
    scores = np.random.default_rng(0).random(60)
    ours = statistics.share_interval(scores)
    theirs = stats.bootstrap(
        (scores,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.mean == pytest.approx(scores.mean())
    assert ours.n == 60
    # Student's tail at n = 60, against a normal's, and sqrt(n / (n - 1)).
    wider = 2.001 / 1.960 * math.sqrt(60 / 59)
    width = (ours.high - ours.low) / (theirs.high - theirs.low)
    assert width == pytest.approx(wider, abs=0.015)
    assert statistics.share_interval(scores) == ours  # the same every time


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_scores_that_are_all_alike_still_have_an_interval(share):
    interval = statistics.share_interval([share] * 20)
    assert interval.low <= share <= interval.high
    assert interval.high - interval.low > 0.15
    if share in (0, 1):
        assert interval == statistics.wilson(int(20 * share), 20)


def test_ratio_interval_is_students_where_denominators_agree():
    bits = np.array([8.0, 9.0, 12.0, 7.0])
    ratio = statistics.ratio_interval(bits, np.full(4, 4.0))
    assert ratio == pytest.approx(statistics.mean_interval(bits / 4))


def test_ratio_interval_weighs_samples_by_their_denominators():
    bits, size = np.array([10.0, 300.0, 20.0]), np.array([5.0, 100.0, 10.0])
    ratio = statistics.ratio_interval(bits, size)
    assert ratio.mean == pytest.approx(330 / 115)
    exact = statistics.ratio_interval(2.5 * size, size)
    assert exact[:3] == pytest.approx((2.5, 2.5, 2.5))


def test_ratio_interval_covers_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        size = rng.integers(50, 150, 20)
        bits = size * 2.0 + rng.normal(0, 10, 20)
        interval = statistics.ratio_interval(bits, size)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.93 <= hits / 1000 <= 0.97


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
        (
            lambda: statistics.paired_shares([1.0, 1.0], [0.0, 1.5]),
            r"0.0 to 1.5 must all be in \[0, 1\]",
        ),
        (lambda: statistics.share_interval([]), "non-empty"),
        (
            lambda: statistics.share_interval([0.5, 1.5]),
            r"0.5 to 1.5 must all be in \[0, 1\]",
        ),
        (
            lambda: statistics.ratio_interval([1.0], [1.0, 2.0]),
            r"\(1,\) need as many denominators, .* \(2,\)",
        ),
        (
            lambda: statistics.ratio_interval([1.0, 1.0], [1.0, 0.0]),
            "a least of 0.0",
        ),
    ],
)
def test_errors_name_the_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
