"""Intervals: how sure a number is, given how few times it was measured.

Each stays in the range of what it is about, by the way it is made: shares in [0, 1],
errors and divergences above 0, perplexities above 1. Samples must be independent:
windows, not tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

ROUNDING = 1e-5  # of float32 means; samples so far beyond their range are at its end
ALIKE = 1e-9  # of their scale: what differs by less differs by rounding


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


def proportion(scores: Sequence[float]) -> Interval:
    """Wilson's interval of scores that are 0 or 1."""
    return wilson(sum(reached == 1 for reached in scores), len(scores))


def mean_interval(samples: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean that may be any number, such as a difference.

    One sample has no spread: its interval is infinite. What is bounded has a function
    of its own below.

    Raises:
        ValueError: if `samples` is empty or `confidence` not in (0, 1).
    """
    samples = _vector(samples)
    n, mean = samples.size, float(samples.mean())
    if n == 1:
        _upper_tail(confidence)
        return Interval(mean, -math.inf, math.inf, 1)
    half = _student(n, confidence) * float(samples.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def share_interval(samples: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of the mean of samples in [0, 1]: scores, shares of each window.

    Student's, inverted as Wilson inverts the normal one: the means mu from which the
    sample's is at most t standard errors away, where these go with mu as a proportion's
    do, ``phi * mu * (1 - mu)``, and phi is estimated. Both ends are in [0, 1] by
    themselves. Samples that are all alike, such as one alone, say nothing of phi; their
    interval is Wilson's, as if phi were 1, which none within [0, 1] exceeds.

    Raises:
        ValueError: if `samples` is empty or not within [0, 1], or `confidence` is not
            in (0, 1).
    """
    samples = _vector(samples, most=1.0)
    n, mean = samples.size, float(samples.mean())
    if not math.isfinite(mean):
        return Interval(mean, 0.0, 1.0, n)
    if _alike(samples, samples.max()) or not 0 < mean < 1:
        return _wilson(mean, n, confidence)
    phi = float(samples.var(ddof=1)) / (mean * (1 - mean))
    distance = _student(n, confidence) ** 2 * phi / n
    return Interval(mean, *_score_ends(mean, distance, most=1.0), n)


def amount_interval(samples: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of the mean of samples that are never negative: errors, divergences.

    As :func:`share_interval`, where a mean's variance goes with it as a count's does,
    ``phi * mu``: the ends are as many times above as below the mean. Samples that are
    all alike say nothing of how large another one may be: their interval has no upper
    end; its lower one is theirs but for the examples that, by Wilson's upper end for
    none of n, may be 0.

    Raises:
        ValueError: if `samples` is empty or one is negative, or `confidence` is not in
            (0, 1).
    """
    samples = _vector(samples, most=math.inf)
    n, mean = samples.size, float(samples.mean())
    return _amount(mean, _variance(samples, samples.max()) / n, n, confidence)


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, confidence: float = 0.95
) -> Interval:
    """Interval of ``sum(numerators) / sum(denominators)``, both never negative.

    That of :func:`amount_interval`, by linearisation: the variance is that of the mean
    of ``x - ratio * y``, over the mean of y. For bits per byte a sample is a window:
    its bits and its bytes.

    Raises:
        ValueError: if the two differ in length or are empty, a numerator is negative,
            or a denominator is not positive.
    """
    x, y = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if x.shape != y.shape or (y <= 0).any():
        raise ValueError(
            f"numerators of shape {x.shape} need as many denominators, all positive; "
            f"got shape {y.shape} with a least of {y.min(initial=math.inf)}."
        )
    x = _vector(x, most=math.inf)
    n, ratio = x.size, float(x.sum() / y.sum())
    variance = _variance(x - ratio * y, x.max()) / n / float(y.mean()) ** 2
    return _amount(ratio, variance, n, confidence)


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
    samples: ArrayLike, reference: ArrayLike, confidence: float = 0.95
) -> Interval:
    """The :func:`paired_difference` of samples in [0, 1]: an interval in [-1, 1].

    That of :func:`share_interval`, its range stretched to the differences'.
    Differences that are all alike, as where two methods answer every example the same,
    have no spread to estimate from. One more example may still differ from them, with a
    probability of at most Wilson's upper end for none of n, and its difference may then
    be any in [-1, 1].

    Raises:
        ValueError: if the two differ in length, are empty, or not within [0, 1].
    """
    paired = paired_difference(samples, reference, confidence)
    difference = _vector(samples, most=1.0) - _vector(reference, most=1.0)
    if not _alike(difference, 1.0):
        share = share_interval((difference + 1) / 2, confidence)
        return Interval(paired.mean, 2 * share.low - 1, 2 * share.high - 1, paired.n)
    other = _wilson(0.0, paired.n, confidence).high
    low = paired.mean - other * (1 + paired.mean)
    return Interval(paired.mean, low, paired.mean + other * (1 - paired.mean), paired.n)


def log_prob(samples: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of the mean log-probability of each window, which is never above 0."""
    nats = amount_interval(-np.asarray(samples, np.float64), confidence)
    return Interval(-nats.mean, -nats.high, -nats.low, nats.n)


def perplexity(log_probs: ArrayLike, confidence: float = 0.95) -> Interval:
    """Perplexity from the mean log-probability (nats per token) of each window."""
    mean, low, high, n = log_prob(log_probs, confidence)
    return Interval(_exp(-mean), _exp(-high), _exp(-low), n)


def _vector(samples: ArrayLike, most: float | None = None) -> Float[np.ndarray, "N"]:
    """The samples; with `most` those in [0, most], what rounding put beyond them too.

    Samples that are no numbers pass: a mean of theirs is none either.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or samples.size < 1:
        raise ValueError(
            f"samples of shape {samples.shape} must be a non-empty vector."
        )
    if most is None:
        return samples
    if ((samples < -ROUNDING) | (samples > most + ROUNDING)).any():
        raise ValueError(
            f"samples from {samples.min()} to {samples.max()} must all be in "
            f"[0, {most:g}]."
        )
    return np.clip(samples, 0.0, most)


def _alike(samples: Float[np.ndarray, "N"], scale: float) -> bool:
    """True if samples, of numbers up to `scale`, differ by rounding at most."""
    return bool(np.ptp(samples) <= ALIKE * scale)


def _variance(samples: Float[np.ndarray, "N"], scale: float) -> float:
    """That of the population; 0 where there is none to estimate."""
    if not np.isfinite(samples).all() or _alike(samples, scale):
        return 0.0
    return float(samples.var(ddof=1))


def _amount(mean: float, variance: float, n: int, confidence: float) -> Interval:
    """The interval of an amount whose estimate has that variance."""
    if n == 1 or not math.isfinite(mean):
        _upper_tail(confidence)
        return Interval(mean, 0.0, math.inf, n)
    if variance == 0:
        other = _wilson(0.0, n, confidence).high
        return Interval(mean, mean * (1 - other), math.inf, n)
    distance = _student(n, confidence) ** 2 * variance / mean
    return Interval(mean, *_score_ends(mean, distance, most=math.inf), n)


def _wilson(rate: float, n: int, confidence: float) -> Interval:
    z = float(stats.norm.ppf(_upper_tail(confidence)))
    return Interval(rate, *_score_ends(rate, z * z / n, most=1.0), n)


def _score_ends(mean: float, distance: float, *, most: float) -> tuple[float, float]:
    """The solutions mu of ``(mean - mu)^2 = distance * mu * (1 - mu / most)``.

    They are on both sides of the mean and within [0, most]: at the mean the left side
    is the smaller one, at both ends of the range the right one is 0.
    """
    leading = 1 + distance / most
    middle = mean + distance / 2
    root = math.sqrt(distance * mean * (1 - mean / most) + distance**2 / 4)
    high = (middle + root) / leading
    # The product of the two is mean^2 / leading; their difference would cancel.
    low = mean**2 / (leading * high) if high else 0.0
    # Rounding must exclude neither the estimate itself nor the end of the range.
    return min(low, mean), min(max(high, mean), most)


def _student(n: int, confidence: float) -> float:
    return float(stats.t.ppf(_upper_tail(confidence), n - 1))


def _upper_tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"{confidence=} must be in (0, 1).")
    return 0.5 + confidence / 2


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
