"""The benchmark counts the right bytes and runs the right thing; no time is tested."""

import jax
import numpy as np
import oracles
import pytest

from kvjax.cost import bench_kernels

SIZES = bench_kernels.Sizes(
    context=256,
    budget=128,
    page_size=16,
    batch=2,
    num_kv_heads=2,
    group=3,
    head_dim=8,
)


def test_bytes_are_those_of_the_arrays_that_must_be_read():
    found = bench_kernels.operations(SIZES)

    def size(name, *which):
        arguments = found[name].arguments
        return sum(arguments[i].nbytes for i in which)

    assert found["full"].num_bytes == size("full", 1, 2)
    assert found["entmax full"].num_bytes == size("entmax full", 1, 2)
    assert found["page_bounds"].num_bytes == size("page_bounds", 1, 2)
    assert found["top_k"].num_bytes == size("top_k", 0)
    half = SIZES.budget / SIZES.context
    assert found["page_attention"].num_bytes == half * size("page_attention", 1)
    assert found["sparse"].num_bytes == half * size("sparse", 1) + size("sparse", 2, 3)
    assert found["copy"].num_bytes == 2 * size("copy", 0)  # read, and written


def test_shapes_alone_are_those_of_the_arrays():
    made, like = (
        bench_kernels.operations(SIZES),
        bench_kernels.operations(SIZES, like=True),
    )
    for name, operation in made.items():
        shapes = [(x.shape, x.dtype) for x in operation.arguments]
        assert shapes == [(x.shape, x.dtype) for x in like[name].arguments]
        assert operation.num_bytes == like[name].num_bytes


def test_sparse_is_attention_over_the_pages_of_highest_bounds():
    run, (q, fused, low, high, position), *_ = bench_kernels.operations(SIZES)["sparse"]
    out, _ = jax.jit(run)(q, fused, low, high, position)
    q, fused, low, high = (np.asarray(x, np.float64) for x in (q, fused, low, high))
    for b, h in np.ndindex(2, 6):
        group = q[b, 3 * (h // 3) : 3 * (h // 3) + 3]
        bound = np.maximum(group * low[b, h // 3], group * high[b, h // 3])
        pages = np.argsort(-bound.sum(-1).mean(0))[:8]
        k, v = np.split(fused[b, h // 3, pages].reshape(-1, 16), 2, axis=-1)
        weights = np.exp(k @ q[b, h, 0] * 8**-0.5)
        expected = weights @ v / weights.sum()
        np.testing.assert_allclose(out[b, h, 0], expected, rtol=1e-4, atol=1e-5)


def test_sparse_entmax_reads_as_many_pages():
    """By bounds, the same number; by Gaussians, the pages made to stand out."""
    sizes = SIZES._replace(context=1024, budget=64, batch=1)
    found = bench_kernels.operations(sizes)
    _, (q, fused, ids, position), _, _ = found["page_attention, entmax"]
    run, (*_, mean, variance, _), _, _ = found["sparse, entmax, gaussian"]
    out, _ = jax.jit(run)(q, fused, mean, variance, position)
    last = sizes.context // sizes.page_size - 1
    for h in range(6):
        pages = sorted({*np.asarray(ids)[0, h // 3].tolist(), last})
        k, v = np.split(np.asarray(fused)[0, h // 3, pages].reshape(-1, 16), 2, axis=-1)
        weights = oracles.entmax(k @ np.asarray(q)[0, h, 0] * 8**-0.5, 1.5)
        np.testing.assert_allclose(out[0, h], weights @ v, rtol=1e-4, atol=1e-5)
    assert found["sparse, entmax"].num_bytes == found["sparse"].num_bytes


def test_timings_share_one_yardstick():
    done = []
    timings = {t.name: t for t in bench_kernels.kernels(SIZES, 3, done.append)}
    assert done[-1] == 1
    assert timings["full"].times_full == 1
    copy = timings["copy"]
    assert copy.floor == pytest.approx(copy.median)
    for timing in timings.values():
        assert timing.low <= timing.median <= timing.high
        ratio = timing.floor / copy.floor
        assert ratio == pytest.approx(timing.num_bytes / copy.num_bytes)


@pytest.mark.parametrize(
    "change", [{"budget": 256}, {"budget": 100}, {"context": 250}, {"budget": 0}]
)
def test_what_is_no_sparse_budget_is_an_error(change):
    with pytest.raises(ValueError, match="must be multiples of page_size=16"):
        bench_kernels.kernels(SIZES._replace(**change))


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        bench_kernels.kernels(SIZES, 0)
