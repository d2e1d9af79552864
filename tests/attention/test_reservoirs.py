"""Races draw each token with the chance of its weight, whatever the chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles.subgen
import pytest
from scipy import stats

from kvjax.attention import reservoirs

HEADS, SIZE = 2, 11


def keys_of(seeds):
    """A row's key for each seed."""
    rows = [reservoirs.row_keys(seed, 5, 1) for seed in seeds]
    return jnp.concatenate(rows)


def test_bits_are_threefrys_of_seed_layer_position_race_head_and_slot():
    """Tokens together draw what each draws alone, in whatever row."""
    key = jnp.concatenate([keys_of([9, 9]), reservoirs.row_keys(9, 6, 1)])
    positions = jnp.asarray([[3, 0, 200], [200, 3, 0], [3, 0, 200]], jnp.int32)
    found = np.asarray(reservoirs.bits(key, positions, 1, HEADS, 3))
    for b, n, h, j in np.ndindex(3, 3, HEADS, 3):
        layer, position = (5, 5, 6)[b], int(positions[b, n])
        expected = oracles.subgen.drawn(9, layer, position, 1, h * 3 + j)
        assert int(found[b, h, n, j]) == expected
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        again = reservoirs.row_keys(9, 5, 1)
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")
    np.testing.assert_array_equal(again[0], key[0])


@functools.partial(jax.jit, static_argnums=2)
def weighted(key, weights, slots):
    return reservoirs.race_weighted(key, weights, slots)


def test_slots_are_won_by_weight():
    """Chi-square of 30,000 slots, below the 0.999 quantile; who weighs 0 never wins."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.2, 3, 60).astype(np.float32) ** 2
    weights[7] = 0
    count = 30_000
    won = weighted(keys_of([1]), jnp.asarray(weights)[None, None], count)
    found = np.bincount(won.positions.ravel(), minlength=60)
    assert found[7] == 0
    expected = count * np.delete(weights, 7) / weights.sum()
    statistic = ((np.delete(found, 7) - expected) ** 2 / expected).sum()
    assert statistic < stats.chi2(58).ppf(0.999)
    # One after the other in one race: neighbours say nothing of each other.
    same = (won.positions[0, 0, 1:] == won.positions[0, 0, :-1]).mean()
    assert abs(same - (weights**2).sum() / weights.sum() ** 2) < 0.01


def test_members_of_a_cluster_win_alike():
    """Each of two clusters, of 30,000 slots; a cluster of nobody keeps its centre."""
    labels = np.array([0, 1, 1, -1, 0, 1, 1, 0, -1, 1])
    count = 30_000
    centres = jnp.asarray([[[0, 1, 8]]], jnp.int32)
    race = jax.jit(functools.partial(reservoirs.race_uniform, per_cluster=count))
    won = race(keys_of([2]), jnp.asarray(labels, jnp.int32)[None, None], centres)
    for cluster in range(2):
        members = np.flatnonzero(labels == cluster)
        found = np.bincount(np.asarray(won.positions[0, 0, cluster]), minlength=10)
        assert found[members].sum() == count
        expected = count / len(members)
        statistic = ((found[members] - expected) ** 2 / expected).sum()
        assert statistic < stats.chi2(len(members) - 1).ppf(0.999)
    assert (np.asarray(won.positions[0, 0, 2]) == 8).all()
    assert (np.asarray(won.race[0, 0, 2]) == reservoirs.LAST).all()


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_change_no_bit(monkeypatch, chunk):
    """Chunks of four are moved back at the end, and some tokens run twice."""
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.uniform(0, 2, (3, HEADS, SIZE)), jnp.float32)
    labels = jnp.asarray(rng.integers(-1, 3, weights.shape), jnp.int32)
    centres = jnp.zeros((3, HEADS, 3), jnp.int32)
    key = keys_of([0, 1, 0])

    def races():
        return (
            jax.jit(lambda: reservoirs.race_weighted(key, weights, 4))(),
            jax.jit(lambda: reservoirs.race_uniform(key, labels, centres, 2))(),
        )

    whole = races()
    monkeypatch.setattr(reservoirs, "CHUNK", chunk)
    jax.tree.map(np.testing.assert_array_equal, races(), whole)


def test_no_two_tokens_of_a_million_tie():
    """Times keep what 32 bits tell apart where it matters: at the shortest ones."""
    few = jnp.arange(1 << 12, dtype=jnp.uint32)
    times = reservoirs.exponentials(few[None, None, :, None], jnp.ones((1, 1, 1 << 12)))
    assert len(np.unique(times)) == 1 << 12
    last = jnp.full((1, 1, 1, 1), reservoirs.LAST, jnp.uint32)
    assert float(reservoirs.exponentials(last, jnp.ones((1, 1, 1)))[0, 0, 0, 0]) > 20
    assert np.isinf(reservoirs.exponentials(last, jnp.zeros((1, 1, 1)))).all()
