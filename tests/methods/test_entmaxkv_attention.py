"""Entmax attention over pages and what it proves, against float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from drawn_pages import (
    ALPHAS,
    EVERY,
    HKV,
    LENGTH,
    NP,
    SCALE,
    B,
    D,
    G,
    P,
    attend,
    attend_certified,
    bounds_of,
    draw,
    lists,
    rows,
    statistics_of,
)

from kvjax.methods.entmaxkv import attention, page_bounds
from pallas_kernels.page_entmax import page_entmax


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
    monkeypatch.setattr(attention, "BLOCK", 2 * P)
    for same in (
        other,
        jax.jit(functools.partial(attention.attend_pages, sm_scale=SCALE, alpha=alpha))(
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


@jax.jit
def certify(q, pages, bounds, length):
    scores = bounds.reshape(B, HKV, G, NP).max(2)
    ids, _ = page_bounds.list_pages(scores, length, page_size=P, size=6)
    found = attention.attend_pages(q, pages, ids, length, sm_scale=SCALE, alpha=1.5)
    options = {"alpha": 1.5, "page_size": P}
    return (
        ids,
        found,
        page_bounds.certificate(bounds, ids, found.tau, length, **options),
    )


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
        functools.partial(page_bounds.certificate, alpha=1.5, page_size=P)
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
        found = attention.attend_pages(q, pages, ids, sm_scale=1.0, **given)
        exact = page_bounds.certificate(bounds, ids, found.tau, page_size=size, **given)
        complete = attention.attend_certified(
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
    """As :func:`page_entmax` has it, whatever the pages hold."""
    q, pages = draw()
    ids = lists(0, 1, NP - 1).copy()
    ids[0, 0] = -1
    length = np.array([NP * P, 0], np.int32)
    found = attend(q, pages, ids, length, alpha=alpha)
    other = jax.jit(functools.partial(page_entmax, sm_scale=SCALE, alpha=alpha))
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
        attention.attend_pages(q, pages, EVERY, LENGTH, sm_scale=SCALE, alpha=1)
    with pytest.raises(ValueError, match="tau_mode='Exact' must be one of exact, "):
        attention.attend_pages(
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
