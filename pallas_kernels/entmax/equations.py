"""The equations of every path of entmax, over whatever sums up the scores.

Where the time goes is passes over the scores, so the threshold is found by Newton's
method on the norm of the excess, from the left, where every step is safe.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Newton needs 4 to 8 passes. A convex function lets the product of value and slope
# fall by four a step, so that 40 are enough for whatever fits into memory.
MAX_STEPS = 40

# tau -> (sum of x ** beta, sum of x ** (beta - 1)) over each row's x = max(z - tau, 0)
Sums = Callable[[Array], tuple[Array, ...]]


class Threshold(NamedTuple):
    """The threshold is `tau` for z = (alpha - 1) * (scores - top), in [-1, 0).

    Apart, because many nearly equal scores have a tau next to 0, and their sum needs
    all of its digits.
    """

    top: Float[Array, "*B 1"]  # the largest score, 0 where all are masked
    tau: Float[Array, "*B 1"]


def shifted(scores: Array, top: Array, alpha: float) -> Array:
    """z of :class:`Threshold`."""
    # Differences first: huge scores neither overflow nor lose what tells them apart.
    return jnp.where(scores == top, 0.0, (alpha - 1) * (scores - top))


def powers(excess: Array, alpha: float) -> tuple[Array, Array]:
    """`(x ** beta, x ** (beta - 1))`, beta = 1 / (alpha - 1), 0 where the excess is."""
    if alpha == 1.5:
        return excess * excess, excess
    if alpha == 2.0:
        return excess, jnp.where(excess > 0, 1.0, 0.0).astype(excess.dtype)
    exponent = 1 / (alpha - 1) - 1
    nearest = round(exponent)
    if nearest >= 1 and abs(exponent - nearest) < 1e-9:
        slope = lax.integer_pow(excess, nearest)
    else:
        is_inside = excess > 0
        log = jnp.log(jnp.where(is_inside, excess, 1.0))
        slope = jnp.where(is_inside, jnp.exp(exponent * log), 0.0)
    return slope * excess, slope


def value(top: Array, tau: Array, total: Array, moment: Array, alpha: float) -> Array:
    """max over p of p . scores + H(p), -inf where nothing has any mass.

    Of a row whose weights sum to `total`, and times their excess to `moment`.
    """
    # p ** alpha = p * x, and p . z = p . x + tau where p sums to 1.
    maximum = top + (tau + moment + (1 - moment) / alpha) / (alpha - 1)
    return jnp.where(total == 0, -jnp.inf, maximum)


def find_tau(sums: Sums, start: Array, num_scores: int, alpha: float) -> Array:
    """`tau` of :class:`Threshold`, as many as `start`, which is -1 everywhere."""
    if alpha <= 2:
        return _newton(sums, start, alpha)
    return _bisection(sums, start, num_scores, alpha)


def _newton(sums, tau, alpha):
    """The root from below, for alpha <= 2.

    With x = max(z - tau, 0) and S = sum x ** beta, the norm S ** (1 / beta) is convex
    and falling in tau, as beta >= 1: steps towards norm 1 from the left, where the top
    alone has mass 1 (tau = -1), never pass the root. The norm is nearly straight, so
    that they arrive sooner than with S. On the left every weight is too large, by S - 1
    in all, which is therefore the exact error that a row stops at.
    """
    tolerance = 16 * float(jnp.finfo(tau.dtype).eps)

    def is_due(carry):
        step, _, excess = carry
        num_active = jnp.where(excess > tolerance, 1.0, 0.0).max(initial=0.0)
        return (step < MAX_STEPS) & (num_active > 0)

    def advance(carry):
        step, tau, excess = carry
        total, slope = sums(tau)
        # total ** (2 - alpha), which is positive wherever it counts.
        shrunk = jnp.exp((2 - alpha) * jnp.log(positive(total)))
        move = (total - shrunk) / positive(slope)
        # A row that has arrived stays: its result must not depend on other rows. Nor
        # does a row go back that rounding took past the root: steps are unsafe there.
        is_active = excess > tolerance
        tau = jnp.where(is_active & (total > 1), tau + move, tau)
        return step + 1, tau, jnp.where(is_active, total - 1, excess)

    excess = jnp.full_like(tau, jnp.inf)
    return lax.while_loop(is_due, advance, (jnp.int32(0), tau, excess))[1]


def _bisection(sums, low, num_scores, alpha):
    """The root for alpha > 2, where the slope is infinite at every score."""
    steps = jnp.finfo(low.dtype).nmant + 7

    def halve(_, bracket):
        low, width = bracket
        width = width / 2
        total, _ = sums(low + width)
        return jnp.where(total >= 1, low + width, low), width

    # At -1 the top alone has mass 1; at the other end, that many equals would.
    width = jnp.full_like(low, 1 - num_scores ** (1 - alpha))
    return lax.fori_loop(0, steps, halve, (low, width))[0]


def positive(total: Array) -> Array:
    """A divisor: 1 instead of 0."""
    return jnp.where(total == 0, 1.0, total)
