"""Criticality of blocks to segments: bounds, shares and ties, on arrays by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import criticality

RNG = np.random.default_rng(0)
Q = 3 * RNG.standard_normal((2, 4, 6, 5)).astype(np.float32)  # B, Hq, M, D
K = RNG.standard_normal((2, 2, 3, 4, 5)).astype(np.float32)  # B, Hkv, NB, P, D
EVERY = jnp.ones((2, 6), bool)


def scored(q=Q, k=K, valid=EVERY, dtype="float32", **options):
    segment = criticality.extremes(jnp.asarray(q, dtype), valid)
    low, high = (jnp.asarray(x, dtype) for x in (k.min(3), k.max(3)))
    return np.asarray(criticality.scores(segment, low, high, **options))


def test_midrange_is_the_larger_mean_of_two_products():
    """Of both extremes of the queries, with one extreme of the keys at a time."""
    found = scored(group_reduce="max")
    for b, kv, j in np.ndindex(2, 2, 3):
        heads = []
        for q in Q[b, 2 * kv : 2 * kv + 2]:
            sides = K[b, kv, j].max(0), K[b, kv, j].min(0)
            heads.append(max((q.max(0) @ k + q.min(0) @ k) / 2 for k in sides))
        np.testing.assert_allclose(found[b, kv, j], max(heads), rtol=1e-5)


def test_bound_is_above_every_product_and_reached_by_single_ones():
    found = scored(score="bound", group_reduce="max")
    products = np.einsum("bkgmd,bkjpd->bkjgmp", Q.reshape(2, 2, 2, 6, 5), K)
    largest = products.max((3, 4, 5))
    assert (found >= largest - 1e-5).all()
    assert (scored(group_reduce="max") < largest).any()  # midrange bounds nothing
    alone = scored(Q[:, :, :1], K[:, :, :, :1], EVERY[:, :1], score="bound")
    np.testing.assert_allclose(alone, products[:, :, :, :, 0, 0].mean(3), rtol=1e-5)


def test_queries_that_are_not_real_have_no_say():
    """Nor do rows without any, whatever padding holds."""
    valid = jnp.arange(6) < jnp.array([[4], [0]])
    spoilt = np.where(np.asarray(valid)[:, None, :, None], Q, np.nan)
    found = scored(spoilt, valid=valid)
    np.testing.assert_array_equal(found[0], scored(Q[:, :, :4], valid=EVERY[:, :4])[0])
    assert not found[1].any()


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32")])
def test_narrow_queries_are_scored_wide(dtype, wide):
    """The middle of two bfloat16 numbers is none of them."""
    found = scored(dtype=dtype)
    assert found.dtype == wide
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in (Q, K)]
    np.testing.assert_allclose(found, scored(*rounded), rtol=1e-6)


def test_shares_sum_to_one_over_what_is_valid_and_nothing_has_none():
    scores = jnp.array([[[1.0, 2.0, jnp.nan]], [[5.0, jnp.inf, 1.0]]])
    valid = jnp.array([[True, True, False], [False] * 3])
    found = np.asarray(criticality.shares(scores, valid, 0.5))
    expected = np.exp([0.5, 1.0]) / np.exp([0.5, 1.0]).sum()
    np.testing.assert_allclose(found[0, 0], [*expected, 0.0], rtol=1e-6)
    assert not found[1].any()


def test_what_is_handed_up_is_mixed_in_where_there_is_any():
    own = jnp.array([[[0.5, 0.5, 0.0]], [[0.5, 0.5, 0.0]]])
    below = jnp.array([[[0.2, 0.8, 0.0]], [[0.0, 0.0, 0.0]]])
    found = criticality.fused(own, below, 0.25)
    np.testing.assert_allclose(found[0, 0], [0.425, 0.575, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], own[1])


def test_ties_go_to_the_lower_block_and_what_is_missing_is_none():
    ranking = jnp.array([[[0.0, 0.3, 0.0, 0.3, 0.9]]])
    valid = jnp.array([[True, True, True, True, False]])
    for count, expected in (
        (3, [1, 3, 0]),
        (5, [1, 3, 0, 2, -1]),
        (9, [1, 3, 0, 2, -1]),
    ):
        found = criticality.choose(ranking, valid, count)
        assert found[0, 0].tolist() == expected
