"""`top_k` against NumPy's stable sort of total-order keys: every path, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pallas_kernels.topk import mosaic_tpu, top_k

# Sizes of a line, of a tile, and around them; one and many tiles.
SIZES = [(1, 1), (129, 129), (17000, 140)]

DTYPES = np.float32, np.int32


def by(implementation):
    if implementation == "xla":
        return functools.partial(top_k, implementation="xla")
    return functools.partial(top_k, implementation=implementation, interpret=True)


implementations = pytest.mark.parametrize("run", ["xla", "mosaic_tpu"], indirect=True)


@pytest.fixture
def run(request):
    found = by(request.param)

    def call(scores, k, **options):
        arrays = {n: options.pop(n) for n in ("where", "count") if n in options}

        def f(scores, arrays):
            return found(scores, k, **arrays, **options)

        return jax.tree.map(np.asarray, jax.jit(f)(scores, arrays))

    return call


def bits(arrays):
    """Of values and indices: -0.0 is not 0.0, and NaN is itself."""
    dtypes = np.float32, np.int32
    return [x.astype(t).tobytes() for x, t in zip(arrays, dtypes, strict=True)]


def same(found, expected):
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert bits(found) == bits(expected)


@implementations
@pytest.mark.parametrize("order", ["score", "index"])
@pytest.mark.parametrize(("size", "k"), SIZES, ids=lambda x: str(x))
def test_random_scores(run, size, k, order):
    rng = np.random.default_rng(size)
    scores = rng.standard_normal((2, 3, size)).astype(np.float32)
    same(run(scores, k, order=order), oracles.top_k(scores, k, order=order))


def adversarial(size):
    rng = np.random.default_rng(0)
    every_bit = rng.integers(0, 2**32, size, np.uint32).view(np.float32)
    ramp = np.arange(size, dtype=np.float32)
    return {
        "all equal": np.full(size, 0.3, np.float32),
        "rising": ramp,
        "falling": -ramp,
        "few values": rng.integers(0, 3, size).astype(np.float32),
        "denormals": rng.integers(-9, 10, size).astype(np.float32) * np.float32(1e-45),
        "zeros of both signs": np.where(rng.random(size) < 0.5, 0.0, -0.0),
        "infinities": rng.choice(np.float32([np.inf, -np.inf, 1]), size),
        "nothing": np.full(size, -np.inf),
        "the last ones": (ramp >= size - 3).astype(np.float32),
        "every bit pattern": np.where(np.isnan(every_bit), np.nan, every_bit),
        "NaNs": np.where(rng.random(size) < 0.01, np.nan, ramp),
    }


@implementations
@pytest.mark.parametrize("k", [1, 300, 16_400])
def test_adversarial_scores(run, k):
    rows = adversarial(16500)
    scores = np.stack([row.astype(np.float32) for row in rows.values()])
    found, expected = run(scores, k), oracles.top_k(scores, k)
    for i, name in enumerate(rows):
        assert bits(x[i] for x in found) == bits(x[i] for x in expected), name


@implementations
def test_counts_and_masks_are_of_each_row(run):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 50, (5, 700)).astype(np.float32)
    where = np.arange(700) < np.array([700, 129, 3, 0, 128])[:, None]
    count = np.array([0, 200, 200, 200, 77], np.int32)
    for order in ("score", "index"):
        found = run(scores, 200, where=where, count=count, order=order)
        same(found, oracles.top_k(scores, 200, where, count, order=order))
        assert [(row >= 0).sum() for row in found[1]] == [0, 129, 3, 0, 77]


@implementations
def test_what_is_masked_is_never_looked_at(run):
    scores = np.random.default_rng(2).standard_normal((1, 300)).astype(np.float32)
    where = np.arange(300) % 3 == 0
    poisoned = np.where(where, scores, np.nan).astype(np.float32)
    same(run(poisoned, 50, where=where), oracles.top_k(scores, 50, where[None]))


@settings(max_examples=25, deadline=None)
@given(
    scores=npst.arrays(
        np.float32, (2, 200), elements=st.floats(width=32, allow_nan=False)
    ),
    count=st.lists(st.integers(0, 20), min_size=2, max_size=2),
)
def test_any_scores(scores, count):
    """The kernel, compiled once: sizes do not change."""
    count = np.array(count, np.int32)
    found = _kernel_of_20(scores, count)
    same(jax.tree.map(np.asarray, found), oracles.top_k(scores, 20, count=count))


@jax.jit
def _kernel_of_20(scores, count):
    return by("mosaic_tpu")(scores, 20, count=count)


def test_a_recall_below_one_is_the_tpu_s_own_and_exact_elsewhere():
    rng = np.random.default_rng(5)
    scores = rng.standard_normal((2, 400)).astype(np.float32)
    scores[0, 5:] = -np.inf
    where, count = scores < 2, np.array([30, 7], np.int32)
    run = jax.jit(functools.partial(top_k, k=30, recall=0.875))
    found = jax.tree.map(np.asarray, run(scores, where=where, count=count))
    same(found, oracles.top_k(scores, 30, where, count))
    traced = run.trace(jnp.zeros((2, 40_000)))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "ApproxTopK" in text
    assert "recall_target = 8.750000e-01" in text


@implementations
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_scores_keep_their_dtype(run, dtype):
    scores = jnp.asarray(np.random.default_rng(3).standard_normal((2, 400)), dtype)
    values, indices = run(scores, 37)
    assert values.dtype == dtype
    expected = oracles.top_k(np.asarray(scores, np.float32), 37)
    same((values, indices), expected)


def test_a_row_of_a_million_fits_and_a_larger_one_says_why_not():
    unsupported = functools.partial(mosaic_tpu.unsupported, k=8192, order="index")
    assert unsupported(jax.ShapeDtypeStruct((1, 8, 1 << 20), jnp.float32), None) is None
    large = jax.ShapeDtypeStruct((1, 8, 1 << 22), jnp.float32)
    with pytest.raises(NotImplementedError, match=r"4,194,304 scores takes"):
        jax.eval_shape(lambda x: by("mosaic_tpu")(x, 8192), large)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: top_k(x, 0), r"k=0 must be in \[1, 9\]"),
        (lambda x: top_k(x, 10), r"k=10 must be in \[1, 9\]"),
        (
            lambda x: top_k(x, 1, order="value"),
            "order='value' must be one of score, index",
        ),
        (lambda x: top_k(x, 1, recall=0.0), r"recall=0.0 must be in \(0, 1\]"),
        (
            lambda x: top_k(x, 1, recall=0.9, implementation="mosaic_tpu"),
            "implementation='mosaic_tpu' is exact: recall=0.9 needs 'xla'",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 9)))
