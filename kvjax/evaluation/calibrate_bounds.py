"""Risk control: bounds of expected losses that hold with a stated confidence.

Also after a search: of several candidates, tested on the same prompts, all that pass
have an expected loss below the bound, together with that confidence. For losses in
[0, 1] of independent prompts; no distribution is assumed.

A test is a bet (Waudby-Smith and Ramdas, arXiv:2010.09686). Who doubts that the
expected loss is at least b, starts with 1 and stakes a share s of the most that cannot
ruin it: each loss x multiplies the capital by ``1 + s * (b - x) / (1 - b)``, which is
never negative, and 1 at most in expectation if the doubt is wrong. So is the product
over independent prompts, and the mean of several stakes: by Markov's inequality the
capital exceeds 1 / level with a probability of at most `level`. Unlike Hoeffding's
bound, a bet gains from losses that vary little, as mean divergences do.

The search is Learn then Test's (Angelopoulos et al., arXiv:2110.01052) by fixed
sequences: a family's candidates are tested from the dearest, which should lose least,
to the cheapest, each at the full level of the family; the first that fails ends it, and
what is cheaper is not looked at. Families share the level evenly (Bonferroni). Within a
family no number of candidates costs anything, and no order of their true losses breaks
the guarantee: where the order is wrong, less is found.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

STAKES = 32  # shares of the largest stake, evenly apart
LARGEST = 0.5  # of the first capital, on the largest; the others share the rest
ROUNDING = 1e-6  # losses so far beyond their range are at its end
PRECISION = 1e-6  # of an upper bound


class Tested(NamedTuple):
    """A candidate whose losses were looked at."""

    losses: Float[np.ndarray, "N"]
    passes: bool

    @property
    def mean(self) -> float:
        return float(self.losses.mean())


def p_value(losses: ArrayLike, at_most: float) -> float:
    """Returns a p-value of the claim that the expected loss is at least `at_most`.

    The order of the losses does not matter.

    Args:
        losses: in [0, 1], of independent prompts.
        at_most: the bound, in (0, 1).

    Raises:
        ValueError: if there is no loss, one is outside [0, 1], or the bound is not
            inside.
    """
    if not 0 < at_most < 1:
        raise ValueError(f"{at_most=} must be in (0, 1), the range of losses.")
    losses = _checked(losses)
    shares = np.arange(1, STAKES + 1) / STAKES
    first = np.full(STAKES, (1 - LARGEST) / (STAKES - 1))
    first[-1] = LARGEST
    gains = (at_most - losses) / (1 - at_most)
    with np.errstate(divide="ignore"):  # a loss of 1 ruins the largest stake
        # Its factor is 0 but for rounding, which may be below.
        factors = np.maximum(1 + shares[:, None] * gains, 0)
        capital = np.log(factors).sum(1) + np.log(first)
    most = capital.max()
    return float(min(1.0, math.exp(-most) / np.exp(capital - most).sum()))


def upper_bound(losses: ArrayLike, level: float) -> float:
    """Returns what the expected loss is below, but for a probability of `level`.

    The least bound that :func:`p_value` lets pass at the level, rounded up; 1 if none.

    Raises:
        ValueError: as :func:`p_value`, and if the level is not in (0, 1).
    """
    _check_level(level)
    losses = _checked(losses)
    low, high = float(losses.mean()), 1.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        if p_value(losses, middle) <= level:
            high = middle
        else:
            low = middle
    return high


def prompts_needed(at_most: float, level: float) -> int:
    """Returns the fewest prompts by which anything can pass: if none loses anything.

    Raises:
        ValueError: if the bound or the level is not in (0, 1).
    """
    _check_level(level)
    most = 1
    while p_value(np.zeros(most), at_most) > level:
        most *= 2
    least = most // 2  # too few
    while most - least > 1:
        middle = (least + most) // 2
        if p_value(np.zeros(middle), at_most) <= level:
            most = middle
        else:
            least = middle
    return most


def level_of(confidence: float, families: int) -> float:
    """Returns the level of each family's tests.

    Raises:
        ValueError: if the confidence is not in (0, 1), or there is no family.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"{confidence=} must be in (0, 1).")
    if families < 1:
        raise ValueError(f"{families=} must be at least 1: give a method.")
    return (1 - confidence) / families


def find(
    families: Sequence[Iterable[ArrayLike]], *, at_most: float, confidence: float
) -> list[list[Tested]]:
    """Tests candidates family by family, each from its dearest to its cheapest.

    All that pass have an expected loss below `at_most`, together with the confidence.

    Args:
        families: of each the losses of its candidates, in the order of the tests; an
            iterator is not asked for more once a candidate fails.
        at_most: the bound, in (0, 1).
        confidence: in (0, 1).

    Returns:
        Of each family those that were looked at: the last may have failed.

    Raises:
        ValueError: as :func:`p_value` and :func:`level_of`.
    """
    level = level_of(confidence, len(families))
    found: list[list[Tested]] = []
    for family in families:
        found.append([])
        for losses in family:
            losses = _checked(losses)
            passes = p_value(losses, at_most) <= level
            found[-1].append(Tested(losses, passes))
            if not passes:
                break
    return found


def _checked(losses: ArrayLike) -> Float[np.ndarray, "N"]:
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 1 or not losses.size:
        raise ValueError(f"losses of shape {losses.shape} must be a non-empty vector.")
    if not ((losses >= -ROUNDING) & (losses <= 1 + ROUNDING)).all():
        raise ValueError(
            f"losses from {losses.min()} to {losses.max()} must all be in [0, 1]."
        )
    return np.clip(losses, 0.0, 1.0)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"{level=} must be in (0, 1).")
