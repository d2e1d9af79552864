"""How EntmaxKV chooses pages, piece by piece as its paper states it, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from drawn_pages import (
    ALPHAS,
    HKV,
    LENGTH,
    NP,
    SCALE,
    B,
    D,
    G,
    P,
    bounds_of,
    draw,
    estimate,
    moments_of,
    statistics_of,
)
from scipy import integrate, stats

from kvjax.methods.entmaxkv import page_bounds, threshold


def test_statistics_bounds_and_moments_are_those_of_the_scores():
    """Also under ALiBi, with a bias that grows or falls; two-pass, far from 0."""
    q, pages = draw(4)
    keys = pages[..., :D] + np.float32(300)
    found = statistics_of(keys)
    wide = keys.astype(np.float64)
    np.testing.assert_array_equal(found.minimum, keys.min(3))
    np.testing.assert_array_equal(found.maximum, keys.max(3))
    np.testing.assert_allclose(found.mean, wide.mean(3), rtol=1e-6)
    np.testing.assert_allclose(found.variance, wide.var(3), rtol=1e-3)

    keys = pages[..., :D]
    low, high, mean, variance = statistics_of(keys)
    slopes = np.array([0.5, -0.25, 0.0, 0.0], np.float32)
    position = np.arange(NP * P) - (LENGTH[:, None] - 1)
    for slope, given in ((np.zeros(4), ()), (slopes, (slopes, LENGTH))):
        bound = np.asarray(bounds_of(q, low, high, *given))
        mu, sigma = map(np.asarray, moments_of(q, mean, variance, *given))
        for b, h in np.ndindex(B, HKV * G):
            own, query = keys[b, h // G].astype(np.float64), q[b, h].astype(np.float64)
            bias = (slope[h] * position[b]).reshape(NP, P)
            scores = SCALE * own @ query + bias
            assert (bound[b, h] >= scores.max(1) - 1e-5).all()
            products = query * own
            terms = np.maximum(query * own.min(1), query * own.max(1)).sum(-1)
            np.testing.assert_allclose(
                bound[b, h], SCALE * terms + bias.max(1), atol=1e-4
            )
            np.testing.assert_allclose(mu[b, h], scores.mean(1), atol=1e-4)
            spread = np.sqrt(products.var(1).sum(-1)) * SCALE
            np.testing.assert_allclose(sigma[b, h], spread, rtol=1e-4)
    with pytest.raises(ValueError, match="slopes need length=None"):
        page_bounds.score_bounds(
            *map(jnp.asarray, (q, low, high)), sm_scale=1.0, slopes=jnp.ones(4)
        )


def test_global_moments_are_those_of_all_historical_tokens():
    q, pages = draw(5)
    *_, mean, variance = statistics_of(pages[..., :D])
    mu, sigma = moments_of(q, mean, variance)
    historical = jax.jit(lambda n: page_bounds.is_historical(n, NP, P))(LENGTH)
    np.testing.assert_array_equal(historical.sum(-1), [7, 6])
    middle, spread = jax.jit(page_bounds.global_moments)(mu, sigma, historical)
    for b, h in np.ndindex(B, HKV * G):
        m, s = (np.asarray(x)[b, h, : historical[b].sum()] for x in (mu, sigma))
        np.testing.assert_allclose(middle[b, h], m.mean(), atol=1e-5)
        total = np.sqrt((s**2).mean() + (m**2).mean() - m.mean() ** 2)
        np.testing.assert_allclose(spread[b, h], total, rtol=1e-5)
    # Without a query all scores are 0: every page may have weight.
    none = jnp.zeros_like(mu)
    _, least = page_bounds.global_moments(none, none, historical)
    np.testing.assert_array_equal(least, np.float32(1e-6))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_estimated_threshold_solves_its_equation(alpha):
    """One Gaussian of few or a million tokens, narrow or wide; mixtures of them."""
    rng = np.random.default_rng(6)
    beta, a = round(1 / (alpha - 1)), alpha - 1
    mean = np.array([0.0, -3.0, 40.0, 1.0, 0.5, -20.0], np.float32)
    deviation = np.array([1.0, 0.3, 8.0, 1e-3, 1e-6, 3.0], np.float32)
    count = np.array([64, 2.0**20, 4096, 1024, 256, 65536], np.float32)
    found = estimate(mean[:, None], deviation[:, None], count[:, None], alpha=alpha)
    for c, tau in enumerate(np.asarray(found, np.float64)):
        single = [mean[c]], [deviation[c]], [count[c]]
        single = [[float(x) for x in part] for part in single]
        expected = oracles.entmax_threshold(*single, alpha)
        scale = a * (abs(mean[c]) + deviation[c])
        assert abs(tau - expected) <= 2e-6 * max(scale, 1), c
        assert tau >= a * mean[c] - count[c] ** -a - 1e-5 * max(scale, 1)
    # A million tokens: 5 deviations out, by another integral than either's.
    tau, m, s = float(found[1]), float(a * mean[1]), float(a * deviation[1])
    mass, _ = integrate.quad(
        lambda y: y**beta * stats.norm.pdf(y + tau, m, s), 0, 3, points=[0.1, 0.5]
    )
    assert float(count[1]) * mass == pytest.approx(1, rel=2e-4)

    shape = 3, 5
    mixed = [rng.normal(0, 2, shape), rng.uniform(0.1, 2, shape), np.full(shape, 16.0)]
    mixed[2][1, 3:] = 0  # pages that do not count
    mixed[2][2] = 0
    mixed = [x.astype(np.float32) for x in mixed]
    found = estimate(*mixed, alpha=alpha)
    for i in range(2):
        own = [
            [float(y) for y, n in zip(x[i], mixed[2][i], strict=True) if n]
            for x in mixed
        ]
        assert float(found[i]) == pytest.approx(
            oracles.entmax_threshold(*own, alpha), abs=3e-6
        )
    assert found[2] == -np.inf
    alike = [np.float32(x) for x in ([[0.3] * 4], [[0.7] * 4], [[16] * 4])]
    alone = [np.float32(x) for x in ([[0.3]], [[0.7]], [[64]])]
    np.testing.assert_allclose(
        estimate(*alike, alpha=alpha), estimate(*alone, alpha=alpha), atol=1e-6
    )


def test_the_third_moment_of_a_half_normal():
    third, _ = threshold.log_truncated_moments(jnp.zeros(1), 3)
    np.testing.assert_allclose(jnp.exp(third), np.sqrt(2 / np.pi), rtol=1e-6)
    with pytest.raises(ValueError, match=r"alpha=1.7: .* 4/3, 1.5 and 2"):
        threshold.gaussian_beta(1.7)


@functools.partial(jax.jit, static_argnames=("alpha", "z", "quantile", "excess"))
def margins_of(mu, sigma, historical, *, alpha=1.5, z=0.0, quantile=0.995, excess=0.1):
    middle, spread = page_bounds.global_moments(mu, sigma, historical)
    tokens = P * historical.sum(-1).astype(jnp.float32)[:, None, None]
    tau = threshold.estimate_threshold(
        middle[..., None], spread[..., None], tokens, alpha=alpha
    )
    options = {"max_quantile": quantile, "safety_margin_z": z, "excess": excess}
    return page_bounds.gaussian_margins(
        mu, sigma, tau, historical, alpha=alpha, page_size=P, **options
    )


def test_margins_choose_more_with_every_safety_and_treat_equals_alike():
    rng = np.random.default_rng(8)
    mu = rng.normal(0, 3, (B, HKV * G, NP)).astype(np.float32)
    sigma = rng.uniform(0.2, 1, mu.shape).astype(np.float32)
    mu[:, :, 1], sigma[:, :, 1] = mu[:, :, 4], sigma[:, :, 4]
    historical = np.arange(NP) < np.array([[7], [6]])
    base = np.asarray(margins_of(mu, sigma, historical))
    assert ((base > 0).any(-1) & (base <= 0).any(-1)).all()
    np.testing.assert_array_equal(base > -np.inf, historical[:, None] & (base < np.inf))
    np.testing.assert_array_equal(base[:, :, 1], base[:, :, 4])
    np.testing.assert_allclose(
        margins_of(mu + 5, sigma, historical)[:1], base[:1], atol=1e-5
    )
    for safer in ({"z": 0.4}, {"quantile": 0.9999}, {"excess": 0.6}):
        more = np.asarray(margins_of(mu, sigma, historical, **safer))
        assert (more >= base).all(), safer
        assert (more > base).any(), safer
    still = margins_of(0 * mu, 0 * sigma, historical)
    assert (np.asarray(still)[historical[:, None] & np.ones_like(mu, bool)] > 0).all()


def test_lists_have_the_best_pages_then_the_newest():
    scores = np.random.default_rng(9).normal(size=(B, HKV, NP)).astype(np.float32)
    scores[0, 0, 5:] = -np.inf
    scores[1, :, 6:] = 99  # the newest page and one beyond: not theirs to choose
    listed = jax.jit(
        page_bounds.list_pages, static_argnames=("page_size", "size", "order")
    )
    sizes = (1, 4, NP - 1, NP, NP + 1)
    for size, order in ((4, "score"), *((size, "index") for size in sizes)):
        ids, count = listed(scores, LENGTH, page_size=P, size=size, order=order)
        assert ids.shape == (B, HKV, size)
        for b, h in np.ndindex(B, HKV):
            tail = (LENGTH[b] - 1) // P
            open_ = [p for p in range(tail) if scores[b, h, p] > -np.inf]
            best = sorted(open_, key=lambda p: -scores[b, h, p])[: size - 1]
            best = sorted(best) if order == "index" else best
            expected = [*best, tail]
            assert count[b, h] == len(expected)
            assert ids[b, h].tolist() == expected + [-1] * (size - len(expected))


def histogram_start(scores, *, alpha, bins):
    """t_low, with t_low <= tau <= t_low + 1 / bins, from a histogram of the scores.

    The authors' kernels start there; ours find the threshold without. Every z but the
    largest moves down to the edge of its bin in [max - 1, max]; the threshold of so few
    values follows exactly, for alpha 1.5 and 2.
    """
    beta = threshold.gaussian_beta(alpha)
    z = scores / beta
    top = z.max(-1, keepdims=True)
    place = (z - (top - 1)) * bins
    place = jnp.where(place >= 0, jnp.minimum(place, bins - 1).astype(jnp.int32), -1)
    each = place[..., None, :] == jnp.arange(bins, dtype=jnp.int32)[:, None]
    counts = each.sum(-1).astype(jnp.float32)
    counts = counts.at[..., -1].add(-1.0)  # the largest itself stays where it is

    def accept(step, sums):
        j = bins - 1 - step
        edge = j.astype(jnp.float32) / bins
        count = counts[..., j]
        number, total, squares = more = (
            sums[0] + count,
            sums[1] + count * edge,
            sums[2] + count * jnp.square(edge),
        )
        if beta == 1:
            inside = total - number * edge < 1
        else:
            inside = number * jnp.square(edge) - 2 * total * edge + squares < 1
        return tuple(jnp.where(inside, *pair) for pair in zip(more, sums, strict=True))

    sums = (jnp.ones_like(top[..., 0]),) * 3
    number, total, squares = jax.lax.fori_loop(0, bins, accept, sums)
    if beta == 1:
        offset = (total - 1) / number
    else:
        inner = jnp.square(total) - number * (squares - 1)
        offset = (total - jnp.sqrt(jnp.maximum(inner, 0.0))) / number
    return top[..., 0] - 1 + offset


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_histogram_starts_within_a_bin_below_the_threshold(alpha):
    rng = np.random.default_rng(10)
    for bins in (8, 16):
        start = jax.jit(functools.partial(histogram_start, alpha=alpha, bins=bins))
        scores = rng.normal(0, rng.uniform(0.3, 6, (40, 1)), (40, 64)).astype(
            np.float32
        )
        scores[1, 7:] = -np.inf
        low = np.asarray(start(scores), np.float64)
        for row, t in zip(scores, low, strict=True):
            z = (alpha - 1) * row[row > -np.inf].astype(np.float64)
            p = oracles.entmax_sorted(z / (alpha - 1), alpha)
            tau = (z - p ** (alpha - 1))[p.argmax()]
            assert t - 1e-6 <= tau <= t + 1 / bins + 1e-6
        assert (low[0] - low).any()
