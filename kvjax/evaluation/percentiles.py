"""Percentiles of tokens, and intervals that know that tokens of a window are alike."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from kvjax.evaluation import statistics
from kvjax.evaluation.statistics import Interval


def percentile_interval(
    samples: ArrayLike, share: float = 0.99, confidence: float = 0.95
) -> Interval:
    """Interval of the percentile of all windows' tokens, between two of them.

    The estimate is the least sample that no more than ``1 - share`` of all exceed. Its
    ends are samples too, by the ranks between which it would be left by independent
    samples (Woodruff 1952). Their number is that whose share up to the estimate would
    vary as the shares of the windows do (Korn and Graubard 1998, with Student's
    quantile): at least one a window, at most all. Where that is too few for an upper
    end it is infinite; the 99th percentile needs 368.

    Args:
        samples: a row a window, a column a token, none of them negative.
        share: of the samples up to the percentile, 0.99 for the 99th.
        confidence: of the interval.

    Returns:
        The interval; its `mean` is the percentile, its `n` the number of windows.

    Raises:
        ValueError: if there are no samples, one is negative, or `share` or `confidence`
            is not in (0, 1).
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 2 or not samples.size:
        raise ValueError(
            f"samples of shape {samples.shape} must be windows of tokens, at least one."
        )
    if (samples < 0).any():
        raise ValueError(f"samples from {samples.min()} on must not be negative.")
    for name, value in {"share": share, "confidence": confidence}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must be in (0, 1).")
    windows, tokens = samples.shape
    ordered = np.sort(samples, axis=None)
    estimate = float(ordered[_rank(share, samples.size) - 1])
    if windows == 1 or not np.isfinite(samples).all():
        return Interval(estimate, 0.0, math.inf, windows)
    shares = (samples <= estimate).mean(1)
    count = _independent(shares, tokens, confidence)
    tail = (1 - confidence) / 2
    low, high = (int(stats.binom.ppf(q, count, share)) for q in (tail, 1 - tail))
    ends = [0.0, math.inf]
    if low > 0:
        ends[0] = float(ordered[_rank(low / count, samples.size) - 1])
    if high < count:
        ends[1] = float(ordered[_rank((high + 1) / count, samples.size) - 1])
    return Interval(estimate, min(ends[0], estimate), max(ends[1], estimate), windows)


def _rank(share: float, count: int) -> int:
    """The least rank, from 1 on, up to which there is that share of `count`."""
    return min(max(math.ceil(share * count - 1e-9), 1), count)


def _independent(shares: np.ndarray, tokens: int, confidence: float) -> int:
    """The independent samples whose share would vary as the windows' mean does."""
    windows, mean = shares.size, float(shares.mean())
    variance = float(shares.var(ddof=1)) / windows
    if variance == 0 or not 0 < mean < 1:
        return windows  # nothing says that they differ within a window
    tail = 0.5 + confidence / 2
    loss = float(stats.norm.ppf(tail) / stats.t.ppf(tail, windows - 1)) ** 2
    count = mean * (1 - mean) / variance * loss
    return int(min(max(count, windows), windows * tokens))


def count_interval(samples: ArrayLike, most: int, confidence: float = 0.95) -> Interval:
    """Interval of the mean of counts from 0 to `most`: that of shares, as many times.

    Raises:
        ValueError: as :func:`kvjax.evaluation.statistics.share_interval`, or if `most`
            is below 1.
    """
    if most < 1:
        raise ValueError(f"{most=} must be at least 1.")
    found = statistics.share_interval(
        np.asarray(samples, np.float64) / most, confidence
    )
    return Interval(most * found.mean, most * found.low, most * found.high, found.n)
