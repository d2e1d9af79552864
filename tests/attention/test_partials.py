"""Partial results over disjoint keys merge into attention over their union."""

import itertools

import jax.numpy as jnp
import numpy as np
import oracles

from kvjax.attention.partials import Partial, merge


def _partial(query, keys, values, kept):
    out, lse, _ = oracles.softmax_attention(query, keys[kept], values[kept])
    return Partial(jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32))


def _problem(seed=0, num_keys=11, scale=1.0):
    rng = np.random.default_rng(seed)
    query = scale * rng.standard_normal(6)
    return query, rng.standard_normal((num_keys, 6)), rng.standard_normal((num_keys, 6))


def test_any_order_gives_the_union():
    query, keys, values = _problem()
    sets = [np.array([0, 5]), np.array([1, 2, 3, 10]), np.array([4]), np.arange(6, 10)]
    expected, lse, _ = oracles.softmax_attention(query, keys, values)
    for order in itertools.permutations(sets):
        merged = merge(*(_partial(query, keys, values, kept) for kept in order))
        np.testing.assert_allclose(merged.out, expected, atol=1e-6)
        np.testing.assert_allclose(merged.lse, lse, atol=1e-5)


def test_merging_is_associative_over_very_different_sizes():
    """Log-sums hundreds apart: nothing overflows, the larger one wins."""
    query, keys, values = _problem(1, scale=300.0)
    a, b, c = (
        _partial(query, keys, values, kept) for kept in np.array_split(np.arange(11), 3)
    )
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    np.testing.assert_allclose(left.out, right.out, atol=1e-6)
    expected, _, _ = oracles.softmax_attention(query, keys, values)
    np.testing.assert_allclose(left.out, expected, atol=1e-5)


def test_the_empty_set_changes_nothing():
    query, keys, values = _problem()
    some = _partial(query, keys, values, np.arange(4))
    empty = Partial(jnp.zeros(6), jnp.asarray(-jnp.inf))
    for merged in (merge(some, empty), merge(empty, some)):
        np.testing.assert_array_equal(merged.out, some.out)
        np.testing.assert_array_equal(merged.lse, some.lse)
    both = merge(empty, empty)
    assert not np.isnan(both.out).any()
    np.testing.assert_array_equal(both.out, 0.0)
    assert both.lse == -np.inf
