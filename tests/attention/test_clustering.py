"""Clusters of keys, scores of their centroids, quantiles and lists, by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.attention import clustering
from pallas_kernels.shared import quantized

RNG = np.random.default_rng(11)
MOST = 7
COUNT, NUM = np.array([[41, 41], [3, 12], [0, 0]]), np.array([[7, 5], [3, 1], [0, 0]])


def as_ints(x):
    return jnp.asarray(x, jnp.int32)


@pytest.fixture(scope="module")
def keys():
    """Of three rows and two heads, 41 at most; beyond a row's count they are huge."""
    drawn = RNG.standard_normal((3, 2, 45, 6)) + 1.0
    drawn[0, 0, 5:8] = drawn[0, 0, 30]  # the same direction, in several places
    for b, h in np.ndindex(3, 2):
        drawn[b, h, COUNT[b, h] :] = 1e30
    return drawn.astype(np.float32)


def cluster(keys, rounds, count=COUNT, num=NUM):
    # Not of one function for all: the size of a block is no argument.
    run = jax.jit(lambda *given: clustering.kmeans(*given, MOST, rounds))
    found = run(keys, as_ints(count), as_ints(num))
    return jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def found(keys):
    return cluster(jnp.asarray(keys), 12)


@pytest.mark.parametrize("rounds", [0, 12])
def test_equals_loops_in_blocks(rounds, keys, found, monkeypatch):
    """Blocks that do not divide the keys, and one of all, give what loops give."""
    monkeypatch.setattr(clustering, "BLOCK", 8)
    labelled = cluster(jnp.asarray(keys), rounds)
    for b, h in np.ndindex(3, 2):
        count, num = COUNT[b, h], NUM[b, h]
        mine = keys[b, h, :count].astype(np.float64)
        expected = oracles.kmeans(list(mine), num, rounds) if count else []
        np.testing.assert_array_equal(labelled.labels[b, h, :count], expected)
        assert (labelled.labels[b, h, count:] == MOST).all()
        for c in range(MOST):
            members = mine[np.array(expected, int) == c]
            assert labelled.size[b, h, c] == len(members)
            mean = members.mean(0) if len(members) else np.zeros(6)
            np.testing.assert_allclose(labelled.means[b, h, c], mean, atol=1e-5)
    if rounds:
        np.testing.assert_array_equal(labelled.labels, found.labels)


def test_at_rest_each_direction_is_nearest_to_the_mean_of_its_own(keys, found):
    """By distance: the means are shorter than 1, the more so the more they spread."""
    rested = cluster(jnp.asarray(keys), 40)
    for h in range(2):
        directions = keys[0, h, :41].astype(np.float64)
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        labels = rested.labels[0, h, :41]
        means = [directions[labels == c].mean(0) for c in range(NUM[0, h])]
        gaps = np.linalg.norm(directions[:, None] - np.array(means), axis=-1)
        np.testing.assert_array_equal(gaps.argmin(1), labels)
    assert not np.array_equal(rested.labels, cluster(jnp.asarray(keys), 0).labels)


def test_lengths_of_keys_do_not_matter(keys, found):
    """Their means do, which are of the keys as they came."""
    longer = keys.copy()
    longer[:, 0] *= 3.0
    longer[:, 1, ::2] *= 0.5
    other = cluster(jnp.asarray(longer), 12)
    np.testing.assert_array_equal(other.labels, found.labels)
    np.testing.assert_allclose(other.means[:, 0], 3 * found.means[:, 0], rtol=1e-5)


def test_the_centre_of_no_key_stays(keys):
    """More clusters than directions: the lower one gets all, the other none."""
    same = np.broadcast_to(keys[0, 0, 0], (1, 1, 20, 6))
    found = cluster(jnp.asarray(same), 4, [[20]], [[3]])
    assert found.size[0, 0].tolist() == [20] + [0] * 6
    assert not found.means[0, 0, 1:].any()
    # Both begin at the first key, and the lower one gets all. It moves to half of that
    # key, to which the other, which did not, is then nearer.
    a, b = np.eye(6)[:2]
    four = np.stack([a, b, a, -b])[None, None]
    found = cluster(jnp.asarray(four, jnp.float32), 1, [[4]], [[2]])
    assert found.labels[0, 0].tolist() == [1, 0, 1, 0]


def test_quantised_keys_are_clustered_by_what_they_stand_for(keys):
    small = np.where(keys > 1e3, 0.0, keys)
    part = quantized.Format(6, 8, 6, False)
    layout = quantized.Layout((part,), "float32")
    stored = quantized.encode(layout, jnp.asarray(small))
    codes, floats = (cluster(x, 3) for x in (stored, quantized.floats(stored)))
    np.testing.assert_array_equal(codes.labels, floats.labels)
    np.testing.assert_allclose(codes.means, floats.means, rtol=1e-6)


def test_sums_by_scatter_and_by_product_agree(keys):
    rows = jnp.asarray(np.where(keys > 1e3, 0.0, keys))
    labels = as_ints(RNG.integers(0, MOST + 1, rows.shape[:3]))
    nothing = jnp.zeros((3, 2, MOST, 6)), jnp.zeros((3, 2, MOST), jnp.int32)
    sums, size = clustering.add_to(*nothing, rows, labels)
    product = clustering.multiplied(rows, labels, MOST)
    np.testing.assert_allclose(sums, product, atol=1e-5)
    counted = [(np.asarray(labels) == c).sum(-1) for c in range(MOST)]
    np.testing.assert_array_equal(size, np.stack(counted, -1))


def test_no_array_is_as_large_as_keys_times_clusters():
    """Of 20,000 keys and 1,000 clusters: what is held at once is a tenth of that."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, 1, 20_000, 4), "float32"),
            ((1, 1), "int32"),
            ((1, 1), "int32"),
        )
    ]
    run = jax.jit(clustering.kmeans, static_argnums=(3, 4))
    compiled = run.lower(*shapes, 1000, 2).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    assert held < 0.1 * 20_000 * 1000 * 4


# --- scores


def scored(q, centroids, size, **options):
    logs = clustering.log_scores(
        *(jnp.asarray(x, jnp.float32) for x in (q, centroids)),
        as_ints(size),
        sm_scale=0.5,
        **options,
    )
    return np.exp(np.asarray(logs, np.float64))


def test_weights_of_all_keys_add_up_to_one(keys, found):
    """However large the logits, and beside clusters without a key."""
    q = RNG.standard_normal((3, 4, 2, 6))
    for factor in (1.0, 300.0):
        weights = scored(factor * q, found.means, found.size)
        assert np.isfinite(weights).all()
        total = (weights * np.repeat(found.size, 2, axis=1)[:, :, None]).sum(-1)
        np.testing.assert_allclose(total[:2], 1.0, rtol=1e-4)
        assert not weights[2].any()  # a row without a cluster


def test_low_scores_beside_an_empty_cluster():
    """Which has a centroid of 0, and would be the largest of all."""
    centroids = np.array([[[[-300.0, 0.0], [0.0, 0.0], [-301.0, 0.0]]]])
    q = np.array([[[[1.0, 0.0]]]])
    weights = scored(q, centroids, [[[3, 0, 2]]])[0, 0, 0]
    expected = np.exp([0.0, -np.inf, -0.5]) / (3 + 2 * np.exp(-0.5))
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_centroids_stand_for_less_than_their_keys(keys, found):
    """Jensen: of logits of the mean of keys, and of the keys themselves."""
    q = RNG.standard_normal((2, 6))
    for h in range(2):
        logits = 0.5 * found.means[0, h].astype(np.float64) @ q[h]
        estimated = np.log((found.size[0, h] * np.exp(logits)).sum())
        own = np.log(np.exp(0.5 * keys[0, h, :41].astype(np.float64) @ q[h]).sum())
        assert own - 1.0 < estimated <= own


# --- quantiles and lists


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_a_quantile_is_that_of_every_key(share):
    values = RNG.standard_normal((5, 9)).astype(np.float32)
    weights = RNG.integers(0, 6, (5, 9))
    weights[3], weights[4] = 0, [0] * 8 + [1]
    found = clustering.weighted_quantile(jnp.asarray(values), as_ints(weights), share)
    for row in range(3):
        every = np.repeat(values[row].astype(np.float64), weights[row])
        np.testing.assert_allclose(found[row], np.quantile(every, share), rtol=1e-5)
    assert found[3] == 0.0
    assert found[4] == values[4, 8]


def test_lists_are_runs_and_the_last_is_cut():
    size, first = as_ints([[[3, 0, 4, 2]]]), as_ints([[[0, 3, 3, 7]]])
    for most, expected in (
        (10, [7, 8, 0, 1, 2, 3, 4, 5, 6, -1]),
        (6, [7, 8, 0, 1, 2, 3]),
        (2, [7, 8]),
    ):
        chosen = as_ints([[[3, 0, 2, -1]]])
        slots = clustering.listed_slots(chosen, size, first, most)
        assert slots[0, 0].tolist() == expected
    nothing = clustering.listed_slots(as_ints([[[-1, -1]]]), size, first, 3)
    assert nothing[0, 0].tolist() == [-1] * 3


def test_runs_are_in_the_order_of_labels():
    labels = as_ints([[[2, 0, 2, 1, 3, 3, 0]]])  # 3: none
    assert clustering.in_runs(labels)[0, 0].tolist() == [1, 6, 3, 0, 2, 4, 5]
    assert clustering.first_slots(as_ints([[[2, 1, 2]]]))[0, 0].tolist() == [0, 2, 3]


def test_shares_are_exact():
    """Those of 32-bit floats are not: 0.29 of 100 is 29."""
    for share in (0.05, 0.29, 0.07, 1.0, 1 / 3):
        counts = np.arange(3000)
        expected = [int(np.floor(n * share + 1e-9)) for n in counts]
        found = clustering.share_of(as_ints(counts), share)
        np.testing.assert_array_equal(found, expected)
