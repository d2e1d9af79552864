"""What keys received, block by block, against float64 loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import selection
from pallas_kernels.decode_attention import decode_attention


@pytest.mark.parametrize("in_order", [True, False])
def test_attention_mass_is_the_sum_of_the_exact_weights(monkeypatch, in_order):
    """Two blocks and a rest; slots in any order, an empty one, a row that is none."""
    monkeypatch.setattr(selection, "BLOCK", 4)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, n, 3)) for h, n in ((4, 3), (2, 10), (2, 10)))
    positions = np.array([[-1, 4, 8]], np.int32)
    held = np.arange(10, dtype=np.int32)[None, None]
    if not in_order:
        held = rng.permutation(10).astype(np.int32)[None, None] - 1
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    keys_at = None if in_order else jnp.asarray(held)
    _, lse = decode_attention(*arrays, jnp.asarray(positions), keys_at, sm_scale=0.5)
    mass = selection.attention_mass(
        *arrays[:2],
        lse,
        jnp.asarray(positions),
        lambda weights: weights.sum(2),
        key_positions=keys_at,
        sm_scale=0.5,
    )
    for h in range(4):
        expected = np.zeros(10)
        for t, position in enumerate(positions[0]):
            seen = (held[0, 0] >= 0) & (held[0, 0] <= position)
            weights = np.exp(0.5 * k[0, h // 2] @ q[0, h, t]) * seen
            expected += weights / max(weights.sum(), 1e-30)
        np.testing.assert_allclose(mass[0, h], expected, rtol=1e-5, atol=1e-7)
