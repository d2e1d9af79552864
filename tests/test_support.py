"""The pieces of EntmaxKV one by one, as its paper states them, against float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import integrate, stats

from kvjax import reading, support, thresholds
from pallas_kernels.page_attention import page_attention

B, HKV, G, D, P, NP = 2, 2, 2, 8, 4, 8
LENGTH = np.array([8 * P, 6 * P + 1], np.int32)  # a full newest page; one of one token
SCALE = D**-0.5
ALPHAS = (1.5, 2.0, 4 / 3)


def draw(seed=0, sharpness=3.0):
    """q (B, Hq, D), pages (B, Hkv, NP, P, 2 D), with clustered keys."""
    rng = np.random.default_rng(seed)
    q = sharpness * rng.standard_normal((B, HKV * G, D))
    pages = rng.standard_normal((B, HKV, NP, P, 2 * D))
    pages[..., :D] += rng.standard_normal((B, HKV, NP, 1, D))
    return q.astype(np.float32), pages.astype(np.float32)


def lists(*pages):
    """The same list for every row and KV head."""
    return np.broadcast_to(np.array(pages, np.int32), (B, HKV, len(pages)))


@functools.partial(jax.jit, static_argnames=("alpha", "tau_mode", "steps"))
def attend(q, pages, ids, length, tau_hat=None, *, alpha, tau_mode="exact", steps=3):
    options = {"sm_scale": SCALE, "tau_mode": tau_mode, "tau_hat": tau_hat}
    return reading.attend_pages(
        q, pages, ids, length, alpha=alpha, steps=steps, **options
    )


@functools.partial(jax.jit, static_argnames="alpha")
def attend_certified(q, pages, bounds, first, length, *, alpha):
    return reading.attend_certified(
        q, pages, bounds, first, length, sm_scale=SCALE, alpha=alpha
    )


@jax.jit
def statistics_of(keys):
    return support.page_statistics(keys)


@jax.jit
def bounds_of(q, low, high, slopes=None, length=None):
    more = {} if slopes is None else {"slopes": slopes, "length": length}
    return support.page_bounds(q, low, high, sm_scale=SCALE, page_size=P, **more)


@jax.jit
def moments_of(q, mean, variance, slopes=None, length=None):
    more = {} if slopes is None else {"slopes": slopes, "length": length}
    return support.page_moments(q, mean, variance, sm_scale=SCALE, page_size=P, **more)


@functools.partial(jax.jit, static_argnames="alpha")
def estimate(mean, deviation, count, *, alpha):
    return thresholds.estimate_threshold(mean, deviation, count, alpha=alpha)


def rows(q, pages, ids):
    """b, h, scores (float64) and values of the listed tokens of every query head."""
    for b, h in np.ndindex(q.shape[:2]):
        kv = h // G
        own = ids[b, h * ids.shape[1] // q.shape[1]]
        kept = [
            (page, i)
            for page in own
            for i in range(P if page >= 0 else 0)
            if page * P + i < LENGTH[b]
        ]
        tokens = np.array([pages[b, kv, page, i] for page, i in kept], np.float64)
        yield b, h, SCALE * tokens[:, :D] @ q[b, h].astype(np.float64), tokens[:, D:]


EVERY = lists(*range(NP))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_attention_over_pages_is_entmax_over_their_tokens(alpha, monkeypatch):
    """Threshold, mass, output and value; any order of pages, any places of -1, and
    blocks of any size; what is not listed may be NaN."""
    q, pages = draw()
    listed = lists(5, -1, 2, 6, -1, 3, 7)
    spoilt = pages.copy()
    spoilt[:, :, [0, 1, 4]] = np.nan
    spoilt[1, :, 7] = np.nan  # beyond the row's length, and not read for it
    ids = listed.copy()
    ids[1][ids[1] == 7] = -1
    found = attend(q, spoilt, ids, LENGTH, alpha=alpha)
    for b, h, scores, values in rows(q, pages, ids):
        p = oracles.entmax(scores, alpha)
        if alpha != 4 / 3:
            np.testing.assert_allclose(
                p, oracles.entmax_sorted(scores, alpha), atol=1e-9
            )
        z, tau = (alpha - 1) * scores, float(found.tau[b, h])
        weights = np.maximum(z - tau, 0) ** (1 / (alpha - 1))
        np.testing.assert_allclose(weights, p, atol=2e-6)
        assert z.max() - 1 - 1e-6 <= tau <= z.max() - len(z) ** (1 - alpha) + 1e-6
        np.testing.assert_allclose(found.mass[b, h], 1, atol=1e-6)
        np.testing.assert_allclose(found.out[b, h], p @ values, atol=5e-6)
        entropy = (p - p**alpha).sum() / (alpha * (alpha - 1))
        assert float(found.value[b, h]) == pytest.approx(p @ scores + entropy, abs=1e-5)
    if alpha != 1.5:
        return
    other = attend(q, spoilt, ids[..., ::-1], LENGTH, alpha=alpha)
    monkeypatch.setattr(reading, "BLOCK", 2 * P)
    for same in (
        other,
        jax.jit(functools.partial(reading.attend_pages, sm_scale=SCALE, alpha=alpha))(
            q, spoilt, ids, LENGTH
        ),
    ):
        for one, two in zip(found, same, strict=True):
            np.testing.assert_allclose(one, two, atol=2e-6)


def test_groups_share_what_query_heads_could_have_alone():
    """GQA: as with K and V repeated for every query head."""
    q, pages = draw(1)
    shared = attend(q, pages, EVERY, LENGTH, alpha=1.5)
    repeated = np.repeat(pages, G, axis=1)
    alone = attend(q, repeated, np.repeat(EVERY, G, axis=1), LENGTH, alpha=1.5)
    own_lists = attend(q, pages, np.repeat(EVERY, G, axis=1), LENGTH, alpha=1.5)
    for one, two, three in zip(shared, alone, own_lists, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=4e-6)
        np.testing.assert_allclose(one, three, rtol=1e-6, atol=4e-6)


def test_extremes_have_known_thresholds():
    """Equal scores share the mass; one far above the others has it all."""
    q, pages = draw(2)
    equal = pages.copy()
    equal[..., :D] = pages[:, :, :1, :1, :D]
    for alpha in (1.5, 2.0):
        found = attend(q, equal, EVERY, LENGTH, alpha=alpha)
        for b, h, scores, values in rows(q, equal, EVERY):
            expected = (alpha - 1) * scores[0] - len(scores) ** (1 - alpha)
            np.testing.assert_allclose(found.tau[b, h], expected, atol=1e-5)
            np.testing.assert_allclose(found.out[b, h], values.mean(0), atol=1e-5)
        # A raw score 1 / (alpha - 1) above all others: its z is 1 above theirs.
        peaked = equal.copy()
        direction = q[:, ::G] / np.square(q[:, ::G]).sum(-1, keepdims=True) / SCALE
        peaked[:, :, 2, 1, :D] += 1.001 / (alpha - 1) * direction
        found = attend(q, peaked, EVERY, LENGTH, alpha=alpha)
        np.testing.assert_allclose(found.out[:, ::G], peaked[:, :, 2, 1, D:], atol=1e-6)


def test_more_pages_raise_the_threshold_and_lose_no_more():
    """The L1 distance of the weights is twice the dropped mass, at every step."""
    q, pages = draw(3)
    dense = attend(q, pages, EVERY, LENGTH, alpha=1.5)
    everything = {(b, h): (s, v) for b, h, s, v in rows(q, pages, EVERY)}
    before = np.full((B, HKV * G), -np.inf)
    lost_before = np.full((B, HKV * G), np.inf)
    chosen = [6]
    for page in (2, 0, 5, 3, 1, 4, 7):
        padded = lists(*chosen, *[-1] * (NP - len(chosen)))
        found = attend(q, pages, padded, LENGTH, alpha=1.5)
        assert (np.asarray(found.tau) >= before - 1e-6).all()
        before = np.asarray(found.tau)
        for (b, h), (scores, values) in everything.items():
            full = np.maximum(scores / 2 - float(dense.tau[b, h]), 0) ** 2
            kept = np.isin(np.arange(len(scores)) // P, chosen)
            part = np.maximum(scores / 2 - float(found.tau[b, h]), 0) ** 2 * kept
            lost = full[~kept].sum()
            np.testing.assert_allclose(np.abs(full - part).sum(), 2 * lost, atol=1e-5)
            assert lost <= lost_before[b, h] + 1e-6
            lost_before[b, h] = lost
            diameter = max(
                np.linalg.norm(x - y) for x, y in itertools.combinations(values, 2)
            )
            gap = np.linalg.norm(np.asarray(found.out - dense.out)[b, h])
            assert gap <= lost * diameter + 1e-5
        chosen.append(page)
    assert (lost_before < 0.5).all()


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
        support.page_bounds(
            *map(jnp.asarray, (q, low, high)), sm_scale=1.0, slopes=jnp.ones(4)
        )


def test_global_moments_are_those_of_all_historical_tokens():
    q, pages = draw(5)
    *_, mean, variance = statistics_of(pages[..., :D])
    mu, sigma = moments_of(q, mean, variance)
    historical = jax.jit(lambda n: support.is_historical(n, NP, P))(LENGTH)
    np.testing.assert_array_equal(historical.sum(-1), [7, 6])
    middle, spread = jax.jit(support.global_moments)(mu, sigma, historical)
    for b, h in np.ndindex(B, HKV * G):
        m, s = (np.asarray(x)[b, h, : historical[b].sum()] for x in (mu, sigma))
        np.testing.assert_allclose(middle[b, h], m.mean(), atol=1e-5)
        total = np.sqrt((s**2).mean() + (m**2).mean() - m.mean() ** 2)
        np.testing.assert_allclose(spread[b, h], total, rtol=1e-5)
    # Without a query all scores are 0: every page may have weight.
    none = jnp.zeros_like(mu)
    _, least = support.global_moments(none, none, historical)
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
    third = thresholds.truncated_moment(jnp.zeros(1), jnp.ones(1), 3)
    np.testing.assert_allclose(third, np.sqrt(2 / np.pi), rtol=1e-6)
    with pytest.raises(ValueError, match=r"alpha=1.7: .* 4/3, 1.5 and 2"):
        thresholds.gaussian_beta(1.7)


@functools.partial(jax.jit, static_argnames=("alpha", "z", "quantile", "excess"))
def margins_of(mu, sigma, historical, *, alpha=1.5, z=0.0, quantile=0.995, excess=0.1):
    middle, spread = support.global_moments(mu, sigma, historical)
    tokens = P * historical.sum(-1).astype(jnp.float32)[:, None, None]
    tau = thresholds.estimate_threshold(
        middle[..., None], spread[..., None], tokens, alpha=alpha
    )
    options = {"max_quantile": quantile, "safety_margin_z": z, "excess": excess}
    return support.gaussian_margins(
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
    listed = jax.jit(support.list_pages, static_argnames=("page_size", "size", "order"))
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


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_histogram_starts_within_a_bin_below_the_threshold(alpha):
    rng = np.random.default_rng(10)
    for bins in (8, 16):
        start = jax.jit(
            functools.partial(thresholds.histogram_start, alpha=alpha, bins=bins)
        )
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


@jax.jit
def certify(q, pages, bounds, length):
    scores = bounds.reshape(B, HKV, G, NP).max(2)
    ids, _ = support.list_pages(scores, length, page_size=P, size=6)
    found = reading.attend_pages(q, pages, ids, length, sm_scale=SCALE, alpha=1.5)
    options = {"alpha": 1.5, "page_size": P}
    return ids, found, support.certificate(bounds, ids, found.tau, length, **options)


def test_a_certificate_is_never_wrong_and_often_there():
    """Where every page left out has its bound at or below the threshold: no mass."""
    proved = lost_some = 0
    for seed in range(6):
        q, pages = draw(seed, sharpness=4.0)
        low, high, *_ = statistics_of(pages[..., :D])
        bounds = bounds_of(q, low, high)
        ids, found, exact = certify(q, pages, bounds, LENGTH)
        dense = attend(q, pages, EVERY, LENGTH, alpha=1.5)
        gap = np.abs(np.asarray(found.out - dense.out)).max(-1)
        assert (gap[np.asarray(exact)] < 1e-5).all()
        proved += int(exact.sum())
        lost_some += int((gap > 1e-3).sum())
        complete, read, holds = attend_certified(
            q, pages, bounds, ids[..., -3:], LENGTH, alpha=1.5
        )
        assert holds.all()
        for one, two in zip(complete, dense, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
        for part in np.asarray(read).reshape(B * HKV, -1):
            pages_read = part[part >= 0]
            assert len(set(pages_read)) == len(pages_read)
    assert proved > 5
    assert lost_some > 5


def test_a_certificate_needs_the_newest_page_and_finite_bounds():
    q, pages = draw(2, sharpness=4.0)
    low, high, *_ = statistics_of(pages[..., :D])
    bounds = bounds_of(q, low, high)
    length = np.array([NP * P, (NP - 1) * P], np.int32)  # whole pages
    found = attend(q, pages, EVERY, length, alpha=1.5)

    certificate = jax.jit(
        functools.partial(support.certificate, alpha=1.5, page_size=P)
    )

    def proved(bounds, *listed):
        return np.asarray(certificate(bounds, lists(*listed), found.tau, length))

    far = np.full(bounds.shape, -1e6, np.float32)
    assert proved(far, NP - 1, NP - 2).all()
    assert proved(far, 0, NP - 1)[0].all()
    assert not proved(far, 0, NP - 1)[1].any()  # its newest is the one before
    assert not proved(far, 0)[0].any()
    spoilt = far.copy()
    spoilt[:, 1, 3] = np.nan
    assert proved(spoilt, NP - 1, NP - 2).tolist() == [[True, False, True, True]] * 2
    spoilt[1, :, NP - 1] = np.nan  # beyond the row's length
    assert proved(spoilt, 3, NP - 1, NP - 2).all()


@pytest.mark.parametrize(("score", "tokens"), [(2.0**15, 2048), (3000.0, 1 << 15)])
def test_a_certificate_does_not_take_a_threshold_for_the_score_it_rounds_to(
    score, tokens
):
    """Of n equal scores sparsemax's threshold is 1 / n below them, and half the weight
    is left out where half of them are."""
    size = 64
    num_pages = tokens // size
    pages = np.zeros((1, 1, num_pages, size, 2), np.float32)
    pages[..., 0] = score
    pages[..., 1] = np.arange(num_pages)[:, None]
    ids = np.arange(num_pages // 2, num_pages, dtype=np.int32)[None, None]

    @jax.jit
    def both(q, pages, ids):
        given = {"length": jnp.array([tokens], jnp.int32), "alpha": 2.0}
        bounds = jnp.full((1, 1, num_pages), score)
        found = reading.attend_pages(q, pages, ids, sm_scale=1.0, **given)
        exact = support.certificate(bounds, ids, found.tau, page_size=size, **given)
        complete = reading.attend_certified(
            q, pages, bounds, ids, sm_scale=1.0, **given
        )
        return found, exact, complete

    found, exact, complete = both(np.ones((1, 1, 1), np.float32), pages, ids)
    assert float(found.tau[0, 0]) == score  # in float32
    assert not exact[0, 0]
    (dense, _, holds), middle = complete, (num_pages - 1) / 2
    assert holds[0, 0]
    np.testing.assert_allclose(dense.out[0, 0, 0], middle, rtol=1e-4)
    assert found.out[0, 0, 0] > 1.4 * middle


@pytest.mark.parametrize("alpha", ALPHAS)
def test_where_nothing_is_seen_nothing_comes_out(alpha):
    """As :func:`page_attention` has it, whatever the pages hold."""
    q, pages = draw()
    ids = lists(0, 1, NP - 1).copy()
    ids[0, 0] = -1
    length = np.array([NP * P, 0], np.int32)
    found = attend(q, pages, ids, length, alpha=alpha)
    other = jax.jit(functools.partial(page_attention, sm_scale=SCALE, alpha=alpha))
    out, value = other(q[:, :, None], pages, ids, length[:, None] - 1)
    np.testing.assert_allclose(found.out, out[:, :, 0], atol=5e-6)
    np.testing.assert_allclose(found.value, value[:, :, 0], atol=5e-6)
    nothing = np.zeros((B, HKV * G), bool)
    nothing[0, :G] = nothing[1] = True
    assert (np.asarray(found.mass) == 0).tolist() == nothing.tolist()
    assert not np.asarray(found.out)[nothing].any()


@pytest.mark.parametrize("tau_mode", ["fixed", "corrected"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_without_an_estimate_the_threshold_is_exact(alpha, tau_mode):
    q, pages = draw(3)
    exact = attend(q, pages, EVERY, LENGTH, alpha=alpha)
    guess = np.array(exact.tau) - 0.3
    guess[1, 0] = -np.inf
    guess[0, 2] = -np.inf
    found = attend(q, pages, EVERY, LENGTH, guess, alpha=alpha, tau_mode=tau_mode)
    for b, h in ((1, 0), (0, 2)):
        np.testing.assert_allclose(found.out[b, h], exact.out[b, h], atol=2e-5)
        np.testing.assert_allclose(found.tau[b, h], exact.tau[b, h], atol=1e-6)
    assert np.isfinite(found.out).all()
    if tau_mode == "fixed":
        assert (np.asarray(found.mass)[0, :2] > 1.1).all()  # theirs is what was given


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_of_attention_over_pages():
    q, pages = draw()
    with pytest.raises(ValueError, match="alpha=1 must be above 1"):
        reading.attend_pages(q, pages, EVERY, LENGTH, sm_scale=SCALE, alpha=1)
    with pytest.raises(ValueError, match="tau_mode='Exact' must be one of exact, "):
        reading.attend_pages(
            q, pages, EVERY, LENGTH, sm_scale=SCALE, alpha=1.5, tau_mode="Exact"
        )


@pytest.mark.parametrize("alpha", [1.5])
def test_corrections_arrive_and_fixed_thresholds_stay(alpha):
    q, pages = draw(11, sharpness=1.0)
    exact = attend(q, pages, EVERY, LENGTH, alpha=alpha)
    guess = exact.tau + np.linspace(-0.8, 0.8, exact.tau.size).reshape(B, -1)
    guess = guess.astype(np.float32)
    fixed = attend(q, pages, EVERY, LENGTH, guess, alpha=alpha, tau_mode="fixed")
    many = attend(
        q, pages, EVERY, LENGTH, guess, alpha=alpha, tau_mode="corrected", steps=12
    )
    np.testing.assert_allclose(many.out, exact.out, atol=1e-4)
    np.testing.assert_allclose(many.mass, 1, atol=1e-4)
    np.testing.assert_allclose(fixed.tau, guess, atol=1e-6)
    for b, h, scores, values in rows(q, pages, EVERY):
        tau = float(guess[b, h])
        weights = np.maximum((alpha - 1) * scores - tau, 0) ** (1 / (alpha - 1))
        np.testing.assert_allclose(fixed.mass[b, h], weights.sum(), atol=1e-5)
        np.testing.assert_allclose(fixed.out[b, h], weights @ values, atol=2e-5)
    with pytest.raises(ValueError, match="tau_mode='fixed' needs tau_hat"):
        attend(q, pages, EVERY, LENGTH, alpha=alpha, tau_mode="fixed")
