"""Intervals against SciPy, against textbook numbers, and against their own promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
    share = statistics.share_interval((some - some[::-1] + 1) / 2)
    expected = [2 * end - 1 for end in share[:3]]
    found = statistics.paired_shares(some, some[::-1])
    assert found == pytest.approx((*expected, 4))


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
    means = statistics.log_prob(log_probs)
    assert interval.mean == pytest.approx(math.exp(-np.mean(log_probs)))
    assert interval.low == pytest.approx(math.exp(-means.high))
    assert interval.high == pytest.approx(math.exp(-means.low))
    assert 1 < interval.low < interval.mean < interval.high
    assert statistics.perplexity([-2.0])[1:3] == (1, math.inf)
    # Of tokens that are certain, to rounding.
    assert statistics.perplexity([1e-7, -1e-7])[0] == pytest.approx(1)


def links(rng, n):
    return rng.choice(np.arange(6) / 5, n, p=[0.1, 0.1, 0.1, 0.1, 0.2, 0.4])


# What is averaged here, and its true mean: shares of a window's 63 tokens, of mass, of
# links; errors and divergences whose logarithms spread by a half.
SHARES = {
    "agreement": (lambda rng, n: rng.binomial(63, rng.beta(12, 4, n)) / 63, 0.75),
    "mass kept": (lambda rng, n: rng.beta(40, 2, n), 40 / 42),
    "links": (links, 0.68),
}
AMOUNTS = {
    "error": (lambda rng, n: rng.lognormal(0, 0.5, n), math.exp(0.125)),
    "divergence": (lambda rng, n: rng.gamma(4, 0.25, n), 1.0),
}


def coverage(interval, draw, true, n, times=1000):
    rng, hits = np.random.default_rng(n), 0
    for _ in range(times):
        found = interval(draw(rng, n))
        hits += found.low <= true <= found.high
    return hits / times


@pytest.mark.parametrize("n", [2, 3, 5, 8, 15])
@pytest.mark.parametrize("what", SHARES)
def test_shares_are_covered_as_often_as_it_says(what, n):
    found = coverage(statistics.share_interval, *SHARES[what], n)
    assert 0.92 <= found <= 0.995  # Student's of four samples of links: 0.88


@pytest.mark.parametrize("n", [2, 3, 5, 8, 15])
@pytest.mark.parametrize("what", AMOUNTS)
def test_amounts_are_covered_as_often_as_it_says(what, n):
    found = coverage(statistics.amount_interval, *AMOUNTS[what], n)
    assert 0.92 <= found <= 0.99


def within(interval, least, most):
    return least <= interval.low <= interval.mean <= interval.high <= most


UNIT = st.floats(0, 1)


@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=12))
def test_no_interval_leaves_its_range(pairs):
    first, second = np.array(pairs).T
    assert within(statistics.share_interval(first), 0, 1)
    assert within(statistics.paired_shares(first, second), -1, 1)
    assert within(statistics.amount_interval(7 * first), 0, math.inf)
    assert within(statistics.ratio_interval(first, second + 0.1), 0, math.inf)
    assert within(statistics.log_prob(-first), -math.inf, 0)
    assert within(statistics.perplexity(-first), 1, math.inf)


def test_means_near_an_end_are_where_students_interval_leaves_the_range():
    agreement, divergence = [1.0, 1.0, 0.62, 1.0], [0.001, 0.02, 0.9, 0.003]
    assert statistics.mean_interval(agreement).high > 1
    assert statistics.mean_interval(divergence).low < 0
    assert within(statistics.share_interval(agreement), 0.3, 1)
    assert within(statistics.amount_interval(divergence), 0, 20)
    better, worse = [1.0, 1.0, 1.0, 0.3], [0.0, 0.1, 0.0, 0.0]
    assert statistics.paired_difference(better, worse).high > 1
    assert within(statistics.paired_shares(better, worse), -0.5, 1)


@pytest.mark.parametrize("n", [3, 8])
def test_the_ends_are_students_distance_away_in_standard_errors_of_their_own(n):
    samples = np.random.default_rng(n).beta(6, 2, n)
    t = stats.t.ppf(0.975, n - 1)
    mean, variance = samples.mean(), samples.var(ddof=1)
    found = statistics.share_interval(samples)
    phi = variance / (mean * (1 - mean))
    for end in found[1:3]:
        error = math.sqrt(phi * end * (1 - end) / n)
        assert abs(end - mean) == pytest.approx(t * error)
    found = statistics.amount_interval(samples)
    for end in found[1:3]:
        error = math.sqrt(variance / mean * end / n)
        assert abs(end - mean) == pytest.approx(t * error)
    assert found.low * found.high == pytest.approx(mean**2)


def test_narrow_samples_far_from_an_end_have_students_interval():
    samples = 0.5 + np.random.default_rng(0).normal(0, 1e-4, 8)
    expected = statistics.mean_interval(samples)
    for interval in (statistics.share_interval, statistics.amount_interval):
        assert interval(samples) == pytest.approx(expected, abs=1e-7)


def test_amounts_that_are_all_alike_say_nothing_of_a_larger_one():
    assert statistics.amount_interval([0.3]) == (0.3, 0, math.inf, 1)
    assert statistics.amount_interval([0.0] * 8) == (0, 0, math.inf, 8)
    other = statistics.wilson(0, 8).high
    found = statistics.amount_interval([0.3] * 8)
    assert found == pytest.approx((0.3, 0.3 * (1 - other), math.inf, 8))


def test_rounding_is_no_spread():
    other = statistics.wilson(0, 3).high
    found = statistics.amount_interval([0.1] * 3)  # whose mean is another number
    assert found == pytest.approx((0.1, 0.1 * (1 - other), math.inf, 3))
    size = np.array([3.0, 7.0, 11.0])
    found = statistics.ratio_interval(0.1 * size, size)
    assert found == pytest.approx((0.1, 0.1 * (1 - other), math.inf, 3))
    share = [0.1 + 0.2, 0.3]
    assert statistics.share_interval(share) == pytest.approx(
        statistics.share_interval([0.3, 0.3])
    )
    found = statistics.paired_shares([0.8, 0.6], [1.0, 0.8])
    assert found == pytest.approx(statistics.paired_shares([0.6, 0.6], [0.8, 0.8]))
    assert found.high > 0


def test_what_is_no_number_has_the_whole_range():
    for interval, most in (
        (statistics.share_interval, 1.0),
        (statistics.amount_interval, math.inf),
    ):
        found = interval([0.5, math.nan])
        assert math.isnan(found.mean)
        assert found[1:] == (0, most, 2)
    assert statistics.amount_interval([1.0, math.inf])[:3] == (math.inf, 0, math.inf)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_scores_that_are_all_alike_still_have_an_interval(share):
    interval = statistics.share_interval([share] * 20)
    assert interval.low <= share <= interval.high
    assert interval.high - interval.low > 0.15
    if share in (0, 1):
        assert interval == statistics.wilson(int(20 * share), 20)


def test_a_ratio_is_an_amount_where_denominators_agree():
    bits = np.array([8.0, 9.0, 12.0, 7.0])
    ratio = statistics.ratio_interval(bits, np.full(4, 4.0))
    assert ratio == pytest.approx(statistics.amount_interval(bits / 4))


def test_ratio_interval_weighs_samples_by_their_denominators():
    bits, size = np.array([10.0, 300.0, 20.0]), np.array([5.0, 100.0, 10.0])
    assert statistics.ratio_interval(bits, size).mean == pytest.approx(330 / 115)
    nearly = statistics.ratio_interval(2.5 * size + [1e-6, 0, -1e-6], size)
    assert nearly[:3] == pytest.approx((2.5, 2.5, 2.5))


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
        (
            lambda: statistics.amount_interval([1.0, -0.5]),
            r"-0.5 to 1.0 must all be in \[0, inf\]",
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
