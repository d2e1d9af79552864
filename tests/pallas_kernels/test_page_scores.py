"""Page bounds against float64 loops, and as bounds of the logits."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels.page_scores import page_bounds


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
