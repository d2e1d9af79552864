"""Intervals: how sure a number is, given how few times it was measured."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """An estimate, the interval around it, and the number of independent samples."""

    mean: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: honest at 0 and n successes too.

    Raises:
        ValueError: if `successes` is not in [0, n], `n` < 1, or `confidence` is not in
            (0, 1).
    """
    if n < 1:
        raise ValueError(f"{n=} must be at least 1 to estimate a proportion.")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes=} must be in [0, {n=}].")
    return _wilson(successes / n, n, confidence)


def mean_interval(samples: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean. Samples must be independent: windows, not tokens.

    One sample has no spread: its interval is infinite.

    Raises:
        ValueError: if `samples` is empty or `confidence` not in (0, 1).
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or samples.size < 1:
        raise ValueError(
            f"samples of shape {samples.shape} must be a non-empty vector."
        )
    n, mean = samples.size, float(samples.mean())
    quantile = _upper_tail(confidence)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf(quantile, n - 1) * samples.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def share_interval(
    scores: ArrayLike, confidence: float = 0.95, *, resamples: int = 10_000
) -> Interval:
    """Bootstrap interval of the mean of scores in [0, 1], such as valid prefixes.

    The percentile interval over a fixed set of resamples, its tails expanded to
    Student's (Hesterberg 2015, arXiv:1411.5279), since plain percentiles are too narrow
    for few samples. Scores that are all alike have no spread to
    resample; their interval is Wilson's, whose variance no score in [0, 1] exceeds.

    Raises:
        ValueError: if `scores` is empty or not within [0, 1], or `confidence` is not in
            (0, 1).
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or scores.size < 1:
        raise ValueError(f"scores of shape {scores.shape} must be a non-empty vector.")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(
            f"scores from {scores.min()} to {scores.max()} must all be in [0, 1]."
        )
    n, mean = scores.size, float(scores.mean())
    quantile = _upper_tail(confidence)
    if (scores == scores[0]).all():
        return _wilson(mean, n, confidence)
    student = stats.t.ppf(quantile, n - 1)
    tail = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * student))
    # Resampling n of n only counts how often each distinct score is drawn.
    values, counts = np.unique(scores, return_counts=True)
    rng = np.random.default_rng(0)
    means = rng.multinomial(n, counts / n, resamples) @ values / n
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n)


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, confidence: float = 0.95
) -> Interval:
    """Interval of ``sum(numerators) / sum(denominators)`` over independent samples.

    By linearisation: Student's interval of the mean of ``x - ratio * y``, over the mean
    of y. For bits per byte a sample is a window: its bits and its bytes.

    Raises:
        ValueError: if the two differ in length or are empty, or a denominator is not
            positive.
    """
    x = np.asarray(numerators, np.float64)
    y = np.asarray(denominators, np.float64)
    if x.shape != y.shape or (y <= 0).any():
        raise ValueError(
            f"numerators of shape {x.shape} need as many denominators, all positive; "
            f"got shape {y.shape} with a least of {y.min(initial=math.inf)}."
        )
    ratio = float(x.sum() / y.sum())
    _, low, high, n = mean_interval(x - ratio * y, confidence)
    return Interval(ratio, ratio + low / y.mean(), ratio + high / y.mean(), n)


def paired_difference(
    samples: ArrayLike, reference: ArrayLike, confidence: float = 0.95
) -> Interval:
    """Interval of the mean of `samples - reference`, measured on the same inputs.

    Narrower than two separate intervals: what makes an input hard is hard for both.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    samples, reference = np.asarray(samples), np.asarray(reference)
    if samples.shape != reference.shape:
        raise ValueError(
            f"samples of shape {samples.shape} cannot be paired with a reference of "
            f"shape {reference.shape}."
        )
    difference = samples.astype(np.float64) - reference.astype(np.float64)
    return mean_interval(difference, confidence)


def paired_shares(
    scores: ArrayLike, reference: ArrayLike, confidence: float = 0.95
) -> Interval:
    """As :func:`paired_difference`, of scores in [0, 1].

    Differences that are all alike, as where two methods answer every example the same,
    have no spread to estimate from. One more example may still differ from them, with a
    probability of at most Wilson's upper end for none of n, and its difference may then
    be any in [-1, 1].

    Raises:
        ValueError: if the two differ in length, are empty, or not within [0, 1].
    """
    for given in (np.asarray(scores), np.asarray(reference)):
        if given.size and not (given.min() >= 0 and given.max() <= 1):
            raise ValueError(
                f"scores from {given.min()} to {given.max()} must all be in [0, 1]."
            )
    found = paired_difference(scores, reference, confidence)
    difference = np.subtract(scores, reference, dtype=np.float64)
    if np.ptp(difference) > 0:
        return found
    other = _wilson(0.0, found.n, confidence).high
    low = found.mean - other * (1 + found.mean)
    return Interval(found.mean, low, found.mean + other * (1 - found.mean), found.n)


def perplexity(log_probs: ArrayLike, confidence: float = 0.95) -> Interval:
    """Perplexity from the mean log-probability (nats per token) of each window."""
    mean, low, high, n = mean_interval(log_probs, confidence)
    return Interval(_exp(-mean), _exp(-high), _exp(-low), n)


def _wilson(rate: float, n: int, confidence: float) -> Interval:
    z = float(stats.norm.ppf(_upper_tail(confidence)))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    half = spread / (1 + z * z / n)
    # Rounding must not exclude the estimate itself at 0 and at 1.
    low, high = max(min(centre - half, rate), 0.0), min(max(centre + half, rate), 1.0)
    return Interval(rate, low, high, n)


def _upper_tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"{confidence=} must be in (0, 1).")
    return 0.5 + confidence / 2


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
