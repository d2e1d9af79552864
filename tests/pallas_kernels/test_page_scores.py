"""Scores of pages against float64 loops, and as bounds and moments of the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels.page_scores import page_bounds, page_moments, tuning

# Relative error of the kernel's bounds; at most three times the largest seen.
TOLERANCE = {"float32": 1.5e-6, "bfloat16": 1.5e-6}


def _pages(batch, num_kv_heads, num_pages, page_size, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, num_kv_heads, num_pages, page_size, head_dim)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)], ids=["G1", "G4", "G3"])
@pytest.mark.parametrize("page_size", [1, 5])
def test_equals_loops_and_bounds_every_logit(heads, page_size):
    keys = _pages(2, heads[1], 7, page_size, 6)
    q = np.random.default_rng(1).standard_normal((2, heads[0], 6)).astype(np.float32)
    bounds = page_bounds(
        jnp.asarray(q), jnp.asarray(keys.min(3)), jnp.asarray(keys.max(3))
    )
    assert bounds.shape == (2, heads[0], 7)
    assert bounds.dtype == jnp.float32
    group = heads[0] // heads[1]
    for b, h, page in np.ndindex(2, heads[0], 7):
        expected = oracles.page_bound(q[b, h], keys[b, h // group, page])
        np.testing.assert_allclose(bounds[b, h, page], expected, rtol=1e-5, atol=1e-5)
        highest = (keys[b, h // group, page] @ q[b, h]).max()
        assert bounds[b, h, page] >= highest - 1e-5
        if page_size == 1:
            np.testing.assert_allclose(bounds[b, h, page], highest, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_one_score_for_the_heads_that_share_keys(how):
    keys = jnp.asarray(_pages(2, 2, 5, 3, 6))
    q = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 6)), jnp.float32)
    each = np.asarray(page_bounds(q, keys.min(3), keys.max(3)), np.float64)
    reduced = page_bounds(q, keys.min(3), keys.max(3), group_reduce=how)
    expected = getattr(each.reshape(2, 2, 3, 5), how)(axis=2)
    np.testing.assert_allclose(reduced, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_those_of_independent_channels(dtype):
    """Over every combination of a page's values by channel, which are independent."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 4, 3))  # pages, what a channel may be, channels
    combinations = values[:, np.indices((4,) * 3).reshape(3, -1).T, np.arange(3)]
    mean, variance = (
        jnp.asarray(x[None, None], dtype) for x in (values.mean(1), values.var(1))
    )
    q = jnp.asarray(rng.standard_normal((1, 2, 3)), dtype)
    found = page_moments(q, mean, variance)
    logits = combinations @ np.asarray(q[0].astype(jnp.float32)).T
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    for actual, expected in zip(found, (logits.mean(1), logits.var(1)), strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual[0], expected.T, rtol=tolerance, atol=1e-2)


def test_a_square_keeps_twice_the_bits_of_half_precision():
    """1.0078125 squared is 1.01568...; rounded to bfloat16 it would be 1.015625."""
    q = jnp.full((1, 1, 1), 1.0078125, jnp.bfloat16)
    ones = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    variance = page_moments(q, ones, ones)[1]
    np.testing.assert_allclose(variance, 1.0078125**2, rtol=1e-5)


def test_half_precision_sums_in_single():
    """256 products of one: a bfloat16 sum of more would stop growing."""
    ones = jnp.ones((1, 1, 2, 512), jnp.bfloat16)
    bounds = page_bounds(jnp.ones((1, 1, 512), jnp.bfloat16), ones, ones)
    np.testing.assert_array_equal(bounds, 512.0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_shapes():
    page_min, page_max = jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 5, 4))
    with pytest.raises(ValueError, match=r"shapes disagree.*3, 4.*5, 4"):
        page_bounds(jnp.zeros((1, 2, 4)), page_min, page_max)
    with pytest.raises(ValueError, match=r"q \(1, 2, 5\), page_mean \(1, 2, 3, 4\)"):
        page_moments(jnp.zeros((1, 2, 5)), page_min, page_min)
    with pytest.raises(ValueError, match="group_reduce='sum' must be one of 'none'"):
        page_bounds(jnp.zeros((1, 2, 4)), page_min, page_min, group_reduce="sum")


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [((8, 2), 128, "float32"), ((8, 1), 256, "bfloat16"), ((2, 2), 128, "bfloat16")],
    ids="{}".format,
)
def test_kernel_equals_loops(monkeypatch, heads, head_dim, dtype):
    """A block of 128 pages and a rest. Of a page, the extremes are all there is."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(128))
    keys = jnp.asarray(_pages(2, heads[1], 150, 2, head_dim), dtype)
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((2, heads[0], head_dim)), dtype)
    run = functools.partial(page_bounds, implementation="mosaic_tpu", interpret=True)
    bounds = np.asarray(jax.jit(run)(q, keys.min(3), keys.max(3)))
    assert (bounds.shape, bounds.dtype) == ((2, heads[0], 150), jnp.float32)
    q, keys = (np.asarray(x.astype(jnp.float32)) for x in (q, keys))
    group, pages = heads[0] // heads[1], [0, 1, 126, 127, 128, 149]
    for b, h in np.ndindex(2, heads[0]):
        expected = [oracles.page_bound(q[b, h], keys[b, h // group, p]) for p in pages]
        np.testing.assert_allclose(bounds[b, h, pages], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("how", ["mean", "max"])
def test_kernel_reduces_over_the_group(how):
    """The kernel takes the same numbers, so that only their order may differ."""
    rng = np.random.default_rng(1)
    keys = jnp.asarray(_pages(1, 2, 9, 2, 128))
    q = jnp.asarray(rng.standard_normal((1, 8, 128)), jnp.float32)
    run = functools.partial(page_bounds, q, keys.min(3), keys.max(3))
    each = np.asarray(run(), np.float64).reshape(1, 2, 4, 9)
    reduced = run(group_reduce=how, implementation="mosaic_tpu", interpret=True)
    np.testing.assert_allclose(reduced, getattr(each, how)(axis=2), rtol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_of_the_moments_equals_loops(monkeypatch, dtype):
    """A block of 128 pages and a rest."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(128))
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((2, 6, 128)), dtype)
    mean = jnp.asarray(rng.standard_normal((2, 2, 150, 128)), dtype)
    variance = jnp.asarray(rng.random((2, 2, 150, 128)), dtype)
    run = functools.partial(page_moments, implementation="mosaic_tpu", interpret=True)
    found = [np.asarray(x) for x in jax.jit(run)(q, mean, variance)]
    q, mean, variance = (
        np.asarray(x.astype(jnp.float32)).astype(float) for x in (q, mean, variance)
    )
    for b, h in np.ndindex(2, 6):
        expected = mean[b, h // 3] @ q[b, h], variance[b, h // 3] @ q[b, h] ** 2
        np.testing.assert_allclose(found[0][b, h], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[1][b, h], expected[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtypes", "reason"),
    [
        ((1, 2, 64), ("float32", "float32"), "D=64"),
        ((1, 2, 128), ("bfloat16", "float32"), "dtypes bfloat16, float32"),
        ((1, 300, 128), ("float32", "float32"), "300 query heads"),
    ],
    ids=["D64", "dtypes", "heads"],
)
def test_what_the_kernel_cannot(shape, dtypes, reason):
    """It says so by name, and left to choose, the reference runs."""
    q = jnp.zeros(shape, dtypes[0])
    extremes = jnp.zeros((1, 2, 3, shape[2]), dtypes[1])
    with pytest.raises(NotImplementedError, match=f"page_bounds: .*{reason}"):
        page_bounds(q, extremes, extremes, implementation="mosaic_tpu")
    if dtypes[0] == dtypes[1]:
        assert page_bounds(q, extremes, extremes).shape == (1, shape[1], 3)
