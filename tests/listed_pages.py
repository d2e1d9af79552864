"""Problems of attention over listed pages: lists that are whole, cut and empty."""

import jax.numpy as jnp
import numpy as np
import oracles

# Two rows, two lists: whole blocks, cut ones, -1 at every place, none at all.
IDS = [
    [[4, -1, 0, 7, 2, 1, 3, 5], [-1, -1, 8, -1, 6, -1, -1, -1]],
    [[-1, 1, -1, -1, 2, 0, -1, -1], [-1] * 8],
]


def draw(
    *,
    heads=(4, 2),
    rows=1,
    head_dim=128,
    num_pages=9,
    page_size=16,
    ids,
    positions,
    dtype="float32",
    seed=0,
):
    rng = np.random.default_rng(seed)
    batch = len(positions)
    q = rng.standard_normal((batch, heads[0], rows, head_dim))
    shape = (batch, heads[1], num_pages, page_size, 2 * head_dim)
    ids = np.asarray(ids, np.int32)
    positions = np.asarray(positions, np.int32).reshape(batch, rows)
    rounded = [jnp.asarray(x, dtype) for x in (q, rng.standard_normal(shape))]
    return (
        *rounded,
        jnp.asarray(ids, ids.dtype),
        jnp.asarray(positions, positions.dtype),
    )


def poisoned(pages, ids, positions):
    """NaN in every page that no list of its head names, and past the row's tokens."""
    batch, num_kv_heads, num_pages, page_size, _ = pages.shape
    keep = np.zeros((batch, num_kv_heads, num_pages * page_size), bool)
    per_head = ids.shape[1] // num_kv_heads
    for b, h, i in np.ndindex(ids.shape):
        if ids[b, h, i] >= 0:
            first = ids[b, h, i] * page_size
            keep[b, h // per_head, first : first + page_size] = True
        keep[b, :, positions[b].max() + 1 :] = False
    keep = keep.reshape(pages.shape[:4])[..., None]
    return jnp.where(keep, pages, jnp.nan)


def draw_masked(**sizes):
    """Pages that all rows see, some, the last alone, none; a row that sees nothing."""
    ids = [[[0, 3, 2, 1], [3, 1, -1, 0]]]
    flags = [[0b1110, 0b0110, 0b1000, 0], [0b1110, 0b1110, 0b1110, 0b0100]]
    rows = np.arange(4)
    mask = np.asarray(flags)[None, ..., None] >> rows & 1 == 1
    problem = draw(rows=4, num_pages=4, ids=ids, positions=[[63, 50, 60, 63]], **sizes)
    return *problem, jnp.asarray(mask)


def assert_close(actual, problem, tolerance, sm_scale, alpha=1.0, tau=None):
    out, lse = (np.asarray(x, np.float64) for x in actual)
    inputs = [np.asarray(x.astype(jnp.float32)) for x in problem[:2]]
    inputs += [np.asarray(x) for x in problem[2:]]
    expected, expected_lse = oracles.page_attention(
        *inputs, sm_scale=sm_scale, alpha=alpha, tau=tau
    )
    size = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(out - expected, axis=-1) / np.where(size == 0, 1, size)
    assert error.max() < tolerance, error.max()
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=tolerance)
