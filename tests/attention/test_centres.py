"""Greedy and online clusters of keys, against token-by-token loops, and their radii."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles.subgen
import pytest

from kvjax.attention import centres

SIZE, MOST = 24, 6


@functools.cache
def greedy(count):
    return jax.jit(functools.partial(centres.farthest_first, count=count))


@functools.cache
def online(delta, most=MOST):
    return jax.jit(functools.partial(centres.online, delta=delta, most=most))


def radius(found):
    joined = np.asarray(found.labels) >= 0
    return np.sqrt(np.where(joined, found.squared, 0).max(-1))


def ragged(shape, seed=0):
    """Keys, and a stretch of candidates in each row; the others hold huge numbers."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((*shape, 5)).astype(np.float32)
    slots = np.arange(shape[2])
    first = rng.integers(0, 5, shape[0])[:, None, None]
    last = np.array([shape[2], *rng.integers(0, shape[2], shape[0] - 1)])
    candidates = (slots >= first) & (slots < last[:, None, None])
    candidates = np.broadcast_to(candidates, shape).copy()
    keys[~candidates] = 1e30
    return jnp.asarray(keys), jnp.asarray(candidates)


def each_head(keys, candidates):
    for b, h in np.ndindex(keys.shape[:2]):
        yield (b, h), np.asarray(keys[b, h]), list(np.flatnonzero(candidates[b, h]))


@pytest.mark.parametrize("count", [1, MOST, 30])
def test_the_farthest_is_next_as_in_loops(count):
    """One centre, some, and more than there are keys."""
    keys, candidates = ragged((6, 2, SIZE))
    found = greedy(count)(keys, candidates)
    for at, own, held in each_head(keys, candidates):
        expected = oracles.subgen.farthest_first(own, held, count)
        padded = expected + [-1] * (count - len(expected))
        assert found.centres[at].tolist() == padded
        labels = [oracles.subgen.nearest(own, p, expected) for p in held]
        assert found.labels[at][np.array(held, int)].tolist() == labels
    assert (np.asarray(found.labels)[~np.asarray(candidates)] == -1).all()
    labels = np.asarray(found.labels)[..., None, :] == np.arange(count)[:, None]
    np.testing.assert_array_equal(centres.sizes(found), labels.sum(-1))


@pytest.mark.parametrize("delta", [0.5, 2.0, 5.0])
def test_foundings_are_those_of_a_loop_over_tokens(delta):
    """A table that fills at once, one that fills late, and one that does not."""
    keys, candidates = ragged((20, 2, SIZE), seed=1)
    found = online(delta)(keys, candidates)
    numbers = []
    for at, own, held in each_head(keys, candidates):
        expected, labels = oracles.subgen.online(own, held, delta, MOST)
        assert found.centres[at].tolist() == expected + [-1] * (MOST - len(expected))
        assert found.labels[at][np.array(held, int)].tolist() == labels
        numbers.append(len(expected))
        apart = [own[p] - own[expected[i]] for p, i in zip(held, labels, strict=True)]
        squared = found.squared[at][np.array(held, int)]
        np.testing.assert_allclose(squared, [x @ x for x in apart], rtol=1e-6)
    assert (max(numbers) == MOST) == (delta < 3)


def test_a_key_at_delta_exactly_joins():
    keys = jnp.asarray([0.0, 2.0, -2.0, 4.5, 6.5])[None, None, :, None]
    found = online(2.0)(keys, jnp.ones((1, 1, 5), bool))
    assert found.labels.ravel().tolist() == [0, 0, 0, 1, 1]
    assert found.centres.ravel().tolist() == [0, 3, -1, -1, -1, -1]


def test_few_clusters_cover_keys_that_are_clustered():
    """In any order: parts of diameter delta, of which there are as many as centres."""
    rng = np.random.default_rng(2)
    delta, parts = 1.0, 5
    middles = rng.standard_normal((200, 1, parts, 4))
    within = rng.standard_normal((200, 1, SIZE, 4))
    within *= rng.uniform(0, delta / 2, (200, 1, SIZE, 1)) / np.linalg.norm(
        within, axis=-1, keepdims=True
    )
    part = rng.integers(0, parts, (200, 1, SIZE, 1))
    keys = np.take_along_axis(2.0 * middles, part, axis=2) + within
    everything = jnp.ones(keys.shape[:3], bool)
    keys = jnp.asarray(keys, jnp.float32)
    slack = 1 + 1e-6
    # As many as there are parts, and room for more: none is founded.
    found = online(delta * slack, SIZE)(keys, everything)
    assert ((np.asarray(found.centres) >= 0).sum(-1) <= parts).all()
    assert (radius(found) <= delta * slack).all()
    covered = greedy(parts)(keys, everything)
    assert (radius(covered) <= delta * slack).all()
    assert radius(covered).max() > delta / 2


def test_equal_keys_are_chosen_after_all_others():
    """One at a time all the same, so that a count is kept; their clusters are empty."""
    places = np.array([3, 3, 0, 3, 0, 9, 3], np.float32)
    keys = jnp.asarray(places)[None, None, :, None]
    everything = jnp.ones((1, 1, 7), bool)
    found = greedy(5)(keys, everything)
    assert found.centres.ravel().tolist() == [0, 5, 2, 1, 3]
    assert found.labels.ravel().tolist() == [0, 0, 2, 0, 2, 1, 0]
    assert centres.sizes(found).ravel().tolist() == [4, 1, 2, 0, 0]


def test_distances_between_like_keys_do_not_cancel():
    """Steps of a thousandth, a thousand from the origin."""
    steps = np.array([0, 1, 5, 2], np.float32) / 1024
    keys = jnp.asarray(1000 + steps)[None, None, :, None]
    found = greedy(3)(keys, jnp.ones((1, 1, 4), bool))
    assert found.centres.ravel().tolist() == [0, 2, 3]
    assert float(found.squared[0, 0, 1]) == 2.0**-20


def test_the_nearest_of_those_in_use_is_the_first():
    held = jnp.asarray([1.0, 3.0, 3.0, 2.0])[None, None, :, None]
    key = jnp.full((1, 1, 1, 1), 2.2)
    is_used = jnp.asarray([True, True, True, False])[None, None]
    label, squared = centres.nearest(key, held, is_used)
    assert (int(label[0, 0]), float(squared[0, 0])) == (1, pytest.approx(0.64))
    _, squared = centres.nearest(key, held, jnp.zeros_like(is_used))
    assert float(squared[0, 0]) == np.inf
