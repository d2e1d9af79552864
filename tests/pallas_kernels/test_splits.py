"""Merged parts are attention to all keys at once."""

import itertools

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels.shared.split_k import merge


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_give_the_whole(axis):
    """Of 7, 0 and 3 keys, whose logits differ by hundreds; and of no key at all."""
    rng = np.random.default_rng(0)
    query, keys = rng.standard_normal(4), 100 * rng.standard_normal((10, 4))
    values = rng.standard_normal((10, 3))
    ends = [0, 7, 7, 10]
    parts = [
        oracles.softmax_attention(query, keys[a:b], values[a:b], 1.0)[:2]
        if b > a
        else (np.zeros(3), -np.inf)
        for a, b in itertools.pairwise(ends)
    ]
    out = np.stack([[out, np.zeros(3)] for out, _ in parts])  # and a row without keys
    lse = np.array([[lse, -np.inf] for _, lse in parts])
    if axis:
        out, lse = out.swapaxes(0, 1), lse.swapaxes(0, 1)
    merged, total = merge(
        jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32), axis
    )
    expected, whole, _ = oracles.softmax_attention(query, keys, values, 1.0)
    np.testing.assert_allclose(merged, [expected, np.zeros(3)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, [whole, -np.inf], rtol=1e-6)
