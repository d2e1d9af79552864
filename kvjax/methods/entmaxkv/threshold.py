"""The threshold of entmax: estimated from moments of the scores, and corrected.

With a = alpha - 1 and beta = 1 / a, scores s have z = a * s and weights
max(z - tau, 0) ** beta, whose sum is 1 for one tau. Exactly, over scores in hand, it is
:func:`pallas_kernels.entmax.solve`'s.

    C   components of a mixture
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.entmax import check_alpha

# Orders whose truncated moments of a normal distribution are known here, and their
# beta = 1 / (alpha - 1).
GAUSSIAN_ALPHAS = {2.0: 1, 1.5: 2, 4 / 3: 3}

SMALLEST_DEVIATION = 1e-6  # of scores
_NEWTON_STEPS = 60
# Below this many deviations the recursion of the moments loses digits to cancellation.
_TAIL = -2.0
_NODES, _WEIGHTS = (x.astype(np.float32) for x in np.polynomial.laguerre.laggauss(20))


def gaussian_beta(alpha: float) -> int:
    """Returns the beta of an order that the Gaussian selector knows.

    Raises:
        ValueError: unless alpha is 4/3, 1.5 or 2.
    """
    for known, beta in GAUSSIAN_ALPHAS.items():
        if math.isclose(alpha, known, rel_tol=1e-6):
            return beta
    raise ValueError(
        f"{alpha=}: the Gaussian threshold is known for alpha 4/3, 1.5 and 2; use "
        "selector='topk'."
    )


def estimate_threshold(
    mean: Float[Array, "*B C"],
    deviation: Float[Array, "*B C"],
    count: Float[Array, "*#B C"],
    *,
    alpha: float,
) -> Float[Array, "*B"]:
    """Estimates tau_hat, with which normal scores have an expected mass of 1.

    Solves sum_c count_c * E[max(a * S_c - tau, 0) ** beta] = 1, S_c normal. One
    component, with the global moments and all historical tokens, is the single
    Gaussian; a component a page the mixture that ALiBi needs.

    Args:
        mean, deviation: of the scores of each component.
        count: tokens of each component; those with 0 do not count.
        alpha: 4/3, 1.5 or 2.

    Returns:
        In units of z; -inf where no component counts.

    Raises:
        ValueError: for another alpha.
    """
    beta = gaussian_beta(alpha)
    a = 1 / beta
    middle = a * mean
    spread = a * jnp.maximum(deviation, SMALLEST_DEVIATION)
    counted = count > 0
    log_count = jnp.log(jnp.where(counted, count, 1.0))
    # Jensen on one component: the root is no lower than a * mean - count ** -a.
    low = jnp.where(counted, middle - jnp.exp(-a * log_count), -jnp.inf)
    low = low.max(-1, initial=-jnp.inf)
    is_empty = low == -jnp.inf
    start = jnp.where(is_empty, 0.0, low)

    def log_mass(tau: Float[Array, "*B"]) -> Float[Array, "2 *B"]:
        """The logs of the mass, and of its derivative's absolute value over beta."""
        t = (middle - tau[..., None]) / spread
        upper, lower = log_truncated_moments(t, beta)
        parts = jnp.stack(
            [upper + beta * jnp.log(spread), lower + (beta - 1) * jnp.log(spread)]
        )
        parts = jnp.where(counted, parts + log_count, -jnp.inf)
        return jax.nn.logsumexp(parts, axis=-1)

    # The norm mass ** (1 / beta) is convex and falls with tau: from the left Newton's
    # steps never pass the root.
    def is_due(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        step, _, active = carry
        return (step < _NEWTON_STEPS) & active.any()

    def advance(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, tau, active = carry
        mass, slope = log_mass(tau)
        # (N - 1) / |N'| with N = mass ** a and |N'| = mass ** (a - 1) * slope.
        move = jnp.exp(mass - slope) * -jnp.expm1(-a * mass)
        moved = tau + jnp.maximum(move, 0.0)
        active &= moved > tau
        return step + 1, jnp.where(active, moved, tau), active

    carry = (jnp.int32(0), start, ~is_empty)
    tau = lax.while_loop(is_due, advance, carry)[1]
    return jnp.where(is_empty, -jnp.inf, tau)


def log_truncated_moments(
    t: Float[Array, "*B"], order: int
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """The logs of E[max(X + t, 0) ** k], X standard normal, k = order and order - 1.

    From t = -2 on by M_k = t M_(k-1) + (k - 1) M_(k-2); further out that difference
    cancels, and the integral of y ** k exp(-y ** 2 / 2 - |t| y), times the density at
    t, is summed at Laguerre's nodes, every term of which is positive.
    """
    near = jnp.maximum(t, _TAIL)
    density = jnp.exp(-jnp.square(near) / 2) / math.sqrt(2 * math.pi)
    moments = [jax.scipy.stats.norm.cdf(near)]
    moments.append(near * moments[0] + density)
    for k in range(2, order + 1):
        moments.append(near * moments[k - 1] + (k - 1) * moments[k - 2])

    far = jnp.maximum(-t, -_TAIL)[..., None]
    scale = far + 1.0
    y = _NODES / scale
    terms = _WEIGHTS * jnp.exp(_NODES - y * far - jnp.square(y) / 2) / scale
    at_t = -jnp.square(far[..., 0]) / 2 - math.log(2 * math.pi) / 2
    tails = [at_t + jnp.log((terms * y**k).sum(-1)) for k in (order, order - 1)]
    upper, lower = (
        jnp.where(t < _TAIL, tail, jnp.log(moments[k]))
        for k, tail in zip((order, order - 1), tails, strict=True)
    )
    return upper, lower


def correct_threshold(
    scores: Float[Array, "*B S"],
    tau: Float[Array, "*B"],
    *,
    alpha: float,
    steps: int = 3,
) -> Float[Array, "*B"]:
    """Moves an estimate of the threshold towards that of the given scores.

    Starts within [max - 1, max]; a step halves the bracket and takes, where it stays
    inside, a secant's, Newton's or Halley's instead. Three steps do not always arrive.

    Args:
        scores: float32, -inf where masked; a row needs one that is not.
        tau: the estimate, in units of z.
        alpha: above 1, at most 2.
        steps: of correction.

    Raises:
        ValueError: if alpha is not in (1, 2] or `steps` is negative.
    """
    check_alpha(alpha)
    if alpha > 2 or steps < 0:
        raise ValueError(f"{alpha=} must be at most 2, and {steps=} at least 0.")
    beta = 1 / (alpha - 1)
    z = (alpha - 1) * scores
    high = z.max(-1)
    low = high - 1
    tau = jnp.clip(tau, low, high)

    def advance(step: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, tau, tau_before, f_before = carry
        excess = z - tau[..., None]
        inside = excess > 0
        safe = jnp.where(inside, excess, 1.0)

        def power(exponent: float) -> Float[Array, "*B"]:
            return jnp.where(inside, safe**exponent, 0.0).sum(-1)

        f = power(beta) - 1
        first = -beta * power(beta - 1)
        second = beta * (beta - 1) * power(beta - 2)
        low = jnp.where(f > 0, tau, low)
        high = jnp.where(f < 0, tau, high)
        best = (low + high) / 2
        # A secant's step, of which the first has none, Newton's and Halley's.
        rise = jnp.where(step > 0, f - f_before, 0.0)
        for numerator, denominator in (
            (f * (tau - tau_before), rise),
            (f, first),
            (2 * f * first, 2 * first**2 - f * second),
        ):
            usable = jnp.abs(denominator) > 1e-12
            candidate = tau - numerator / jnp.where(usable, denominator, 1.0)
            usable &= (candidate >= low - 1e-6) & (candidate <= high + 1e-6)
            best = jnp.where(usable, candidate, best)
        return low, high, jnp.where(jnp.abs(f) <= 1e-6, tau, best), tau, f

    carry = low, high, tau, tau, jnp.zeros_like(tau)
    return lax.fori_loop(0, steps, advance, carry)[2]
