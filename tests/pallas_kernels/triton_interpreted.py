"""Triton kernels in Triton's interpreter against float64 loops; see `test_triton.py`.

In a process of its own, as TRITON_INTERPRET decides for a process what kernels are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels.entmax import solve, weights
from pallas_kernels.entmax import triton as entmax_triton
from pallas_kernels.page_attention import Surrogate, page_attention
from pallas_kernels.page_attention import triton as page_attention_triton
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.page_scores import page_bounds, page_moments
from pallas_kernels.page_scores import triton as page_scores_triton
from pallas_kernels.topk import top_k
from pallas_kernels.topk import triton as topk_triton

pytest_plugins = ("interpreting",)

# Relative error of a row, three times the largest seen: the interpreter cuts a bfloat16
# off where a GPU rounds.
TOLERANCE = {"float32": 4e-6, "float16": 1e-3, "bfloat16": 8e-3}

# Two rows, two lists: whole blocks, cut ones, -1 at every place, none at all.
IDS = [
    [[4, -1, 0, 7, 2, 1, 3, 5], [-1, -1, 8, -1, 6, -1, -1, -1]],
    [[-1, 1, -1, -1, 2, 0, -1, -1], [-1] * 8],
]


def _problem(
    *, ids, positions, heads=(4, 2), head_dim=16, page_size=16, dtype="float32"
):
    rng = np.random.default_rng(0)
    ids = np.array(ids, np.int32)
    positions = np.array(positions, np.int32)
    batch, rows = positions.shape
    shape = (batch, heads[1], 9, page_size, 2 * head_dim)
    q = rng.standard_normal((batch, heads[0], rows, head_dim))
    return (
        jnp.asarray(q, dtype),
        jnp.asarray(rng.standard_normal(shape), dtype),
        jnp.asarray(ids),
        jnp.asarray(positions),
    )


def _poisoned(pages, ids, positions):
    """NaN in every page that no list of its head names, and past the row's tokens."""
    _, heads, _, page_size, _ = pages.shape
    keep = np.zeros(pages.shape[:4], bool)
    for b, h, i in np.ndindex(ids.shape):
        if ids[b, h, i] >= 0:
            keep[b, h // (ids.shape[1] // heads), ids[b, h, i]] = True
    token = np.arange(keep[0, 0].size).reshape(-1, page_size)
    keep &= token <= positions.max(1)[:, None, None, None]
    return jnp.where(keep[..., None], pages, jnp.nan)


_pages = functools.partial(page_attention, implementation="triton", interpret=True)
_entmax = functools.partial(page_entmax, implementation="triton", interpret=True)


def _check(problem, mask=None, sm_scale=0.4, alpha=1.0):
    q, pages, ids, positions = problem
    run = functools.partial(_pages, sm_scale=sm_scale)
    if alpha != 1:
        run = functools.partial(_entmax, sm_scale=sm_scale, alpha=alpha)
    poisoned = _poisoned(pages, np.asarray(ids), np.asarray(positions))
    out, lse = jax.jit(run)(q, poisoned, ids, positions, mask)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    tolerance = TOLERANCE[q.dtype.name]
    inputs = [np.asarray(x, np.float64) for x in (q, pages)]
    inputs += [x if x is None else np.asarray(x) for x in (ids, positions, mask)]
    expected, expected_lse = oracles.page_attention(
        *inputs, sm_scale=sm_scale, alpha=alpha
    )
    size = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(out - expected, axis=-1) / np.where(size == 0, 1, size)
    assert error.max() < tolerance, error.max()
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=tolerance)


@pytest.mark.parametrize("splits", [1, 3], indirect=True)
@pytest.mark.usefixtures("splits")
class TestPageAttention:
    @pytest.mark.parametrize("dtype", list(TOLERANCE))
    def test_ragged_lists(self, dtype):
        """Pages past a row's position are listed and not read; one list is empty."""
        _check(_problem(ids=IDS, positions=[[141], [30]], dtype=dtype))

    def test_a_page_above_a_block_and_one_that_divides_none(self):
        ids = [[[2, -1, 0, 3, 1, 4, -1]] * 2]
        for page_size, head_dim in ((24, 64), (64, 32)):
            problem = _problem(
                ids=ids, positions=[[90]], page_size=page_size, head_dim=head_dim
            )
            _check(problem)

    def test_rows_see_what_their_mask_and_position_let_them(self):
        """A list for each query head; the first of three rows sees no key at all."""
        ids = np.array([[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]])
        problem = _problem(ids=ids, positions=[[-1, 17, 40]])
        _check(problem)
        mask = np.random.default_rng(1).random((*ids.shape, 3)) < 0.6
        _check(problem, jnp.asarray(mask))

    def test_more_rows_than_a_program_takes(self):
        ids = [[[0, 5, -1, 2]]]
        positions = np.arange(23, 43)[None]
        _check(_problem(heads=(4, 1), ids=ids, positions=positions))


@pytest.mark.parametrize("splits", [3], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("splits")
def test_weights_of_two_kinds_from_one_read(dtype):
    """From where other tokens left it; without the first ones; and another sum."""
    first = 21
    ids = np.array([[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]])
    problem = _problem(ids=ids, positions=[[20, 17, 60]], dtype=dtype)
    q, pages, ids, positions = problem
    mask = np.random.default_rng(1).random((*ids.shape, 3)) < 0.8
    initial, surrogate = oracles.beside(problem)
    unread = np.arange(9 * 16).reshape(9, 16, 1) < first
    out, lse, taken, mass = jax.jit(
        functools.partial(_pages, sm_scale=0.4, first_position=first)
    )(
        q,
        jnp.where(unread, jnp.nan, pages),
        ids,
        positions,
        jnp.asarray(mask),
        initial=initial,
        surrogate=Surrogate(*surrogate),
    )
    inputs = [np.asarray(x, np.float64) for x in (q, pages)]
    inputs += [np.asarray(x) for x in (ids, positions, mask)]
    expected = oracles.page_attention(
        *inputs, sm_scale=0.4, initial=initial, first_position=first
    )
    tolerance = TOLERANCE[dtype]
    size = np.maximum(np.linalg.norm(expected[0], axis=-1), 1e-30)
    assert (np.linalg.norm(out - expected[0], axis=-1) / size).max() < tolerance
    np.testing.assert_allclose(lse, expected[1], rtol=1e-6, atol=tolerance)
    wanted, total = oracles.page_weighed(*inputs, surrogate, first)
    np.testing.assert_allclose(mass, total, rtol=3e-6)
    unit = np.abs(wanted).max()
    np.testing.assert_allclose(taken, wanted, rtol=0, atol=3e-6 * unit)


@pytest.mark.usefixtures("splits")
class TestPageEntmax:
    @pytest.mark.parametrize(
        ("splits", "dtype", "alpha"),
        [(1, "float32", 1.5), (3, "float32", 2.0), (3, "bfloat16", 1.3)],
        indirect=["splits"],
    )
    def test_ragged_lists(self, dtype, alpha):
        """Pages past a row's position are listed and not read; one list is empty."""
        _check(
            _problem(ids=IDS, positions=[[141], [30]], dtype=dtype), None, 0.7, alpha
        )

    @pytest.mark.parametrize("splits", [3], indirect=True)
    def test_rows_see_what_their_mask_and_position_let_them(self):
        """The first of three rows sees no key; the last block of a list is cut."""
        ids = np.array([[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]])
        problem = _problem(ids=ids, positions=[[-1, 17, 94]], page_size=28)
        mask = np.random.default_rng(1).random((*ids.shape, 3)) < 0.6
        mask[0, 0] = True
        _check(problem, jnp.asarray(mask), alpha=1.25)

    @pytest.mark.parametrize("splits", [3], indirect=True)
    def test_no_value_outside_the_support_is_read(self):
        """One key far above all others: the values of every other token may be NaN."""
        q, pages, ids, positions = _problem(ids=IDS, positions=[[141], [30]])
        pages = pages.at[..., :16].multiply(0.01)
        pages = pages.at[:, :, 2, 5, :16].set(10 * (q[:, ::2, 0] + q[:, 1::2, 0]))
        others = np.arange(9 * 16).reshape(9, 16, 1) != 2 * 16 + 5
        pages = pages.at[..., 16:].set(jnp.where(others, jnp.nan, pages[..., 16:]))
        run = functools.partial(_entmax, sm_scale=1.0, alpha=1.5)
        out, _ = jax.jit(run)(q, pages, ids, positions)
        expected = np.asarray(pages[0, 0, 2, 5, 16:])
        # The first row's first list holds page 2; two query heads share it.
        np.testing.assert_allclose(out[0, :2, 0], [expected] * 2, rtol=1e-6)

    @pytest.mark.parametrize("splits", [3], indirect=True)
    def test_a_key_that_is_no_number_shows(self):
        """In the rows that see it, and in no other; with a threshold given too."""
        q, pages, ids, positions = _problem(ids=IDS, positions=[[141], [30]])
        pages = pages.at[0, 0, 4, 3, 2].set(jnp.nan)
        run = functools.partial(_entmax, sm_scale=1.0, alpha=1.5)
        for tau in (None, jnp.zeros(q.shape[:3])):
            out, value = jax.jit(run)(q, pages, ids, positions, None, tau)
            np.testing.assert_array_equal(np.isnan(out[0, :, 0, 0]), [1, 1, 0, 0])
            np.testing.assert_array_equal(np.isnan(value[0, :, 0]), [1, 1, 0, 0])
            assert np.isfinite(out[1]).all()

    @pytest.mark.parametrize(
        ("splits", "alpha"), [(1, 1.7), (3, 1.5)], indirect=["splits"]
    )
    def test_parts_of_a_list_with_one_threshold_add_up(self, alpha):
        """Of two disjoint lists: out, and the mass."""
        problem = _problem(ids=IDS, positions=[[141], [30]])
        q, pages, ids, positions = problem
        inputs = [np.asarray(x, np.float64) for x in (q, pages)]
        inputs += [np.asarray(x) for x in (ids, positions)]
        # Some rows keep much, some little, some nothing.
        tau = np.linspace(-1.5, 1.5, 8).reshape(2, 4, 1).astype(np.float32)
        expected = oracles.page_attention(*inputs, None, 0.4, alpha, tau)
        assert (expected[1] == 0).any()
        assert (expected[1] > 1).any()
        run = jax.jit(functools.partial(_entmax, sm_scale=0.4, alpha=alpha))
        poisoned = _poisoned(pages, np.asarray(ids), np.asarray(positions))
        parts = [
            run(q, poisoned, jnp.where(keep, ids, -1), positions, None, tau)
            for keep in (ids % 3 == 0, ids % 3 != 0)
        ]
        for first, second, wanted in zip(*parts, expected, strict=True):
            np.testing.assert_allclose(first + second, wanted, rtol=1e-6, atol=2e-5)


@pytest.mark.usefixtures("eager")
def test_a_cache_of_more_than_2_to_the_31_elements():
    """Four gigabytes that are never touched but for two pages, 2**32 bytes apart."""
    q, small, ids, _ = _problem(
        ids=[[[1, 0]]], positions=[[0]], heads=(2, 1), page_size=64, dtype="float16"
    )
    last = 2**31 // small[0, 0, 0].size + 5
    pages = np.zeros((1, 1, last + 1, *small.shape[3:]), np.float16)
    pages[0, 0, [2, last]] = small[0, 0, :2]
    out, lse = page_attention_triton.page_attention(
        *(q, pages, jnp.array([[[last, 2]]]), jnp.array([[last * 64 + 63]]), None),
        sm_scale=0.4,
        interpret=True,
    )
    inputs = [np.asarray(x, np.float64) for x in (q, small)]
    expected = oracles.page_attention(
        *inputs, np.asarray(ids), np.array([[127]]), sm_scale=0.4
    )
    np.testing.assert_allclose(out, expected[0], atol=1e-3)
    np.testing.assert_allclose(lse, expected[1], atol=1e-3)


@pytest.fixture
def blocks_of_16_pages(monkeypatch):
    """For up to 128 dimensions of 32 bits: two blocks, and a third in part."""
    monkeypatch.setattr(page_scores_triton, "BLOCK_BYTES", 1 << 10)


def _statistics(heads, head_dim, dtype):
    """A query and two arrays for each of 37 pages; again, as they are, in float64."""
    rng = np.random.default_rng(0)
    shape = (2, heads[1], 37, head_dim)
    q = rng.standard_normal((2, heads[0], head_dim))
    first, spread = rng.standard_normal(shape), np.abs(rng.standard_normal(shape))
    arrays = [jnp.asarray(x, dtype) for x in (q, first, spread)]
    return arrays, [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


@pytest.mark.usefixtures("blocks_of_16_pages")
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [((8, 2), 128, "float32"), ((2, 2), 16, "bfloat16"), ((20, 1), 64, "float16")],
    ids="{}".format,
)
class TestPageScores:
    def test_bounds_and_what_they_reduce_to(self, heads, head_dim, dtype):
        (q, low, spread), (q64, low64, _) = _statistics(heads, head_dim, dtype)
        high = low + spread
        keys = np.stack([low64, np.asarray(high.astype(jnp.float32), np.float64)], 3)
        group = heads[0] // heads[1]
        expected = np.empty((2, *heads[1:], group, 37))
        for b, h, g, page in np.ndindex(expected.shape):
            expected[b, h, g, page] = oracles.page_bound(
                q64[b, h * group + g], keys[b, h, page]
            )
        for how, reduced in (
            ("none", expected.reshape(2, -1, 37)),
            ("mean", expected.mean(2)),
            ("max", expected.max(2)),
        ):
            run = functools.partial(page_bounds, group_reduce=how)
            run = functools.partial(run, implementation="triton", interpret=True)
            found = jax.jit(run)(q, low, high)
            assert found.dtype == jnp.float32
            # Sums of 128 products near 80, whose order is up to NumPy and the machine.
            np.testing.assert_allclose(found, reduced, rtol=0, atol=2e-5)

    def test_moments(self, heads, head_dim, dtype):
        arrays, (q, mean, variance) = _statistics(heads, head_dim, dtype)
        run = functools.partial(page_moments, implementation="triton", interpret=True)
        found = jax.jit(run)(*arrays)
        q = q.reshape(2, heads[1], -1, 1, head_dim)
        expected = (q * mean[:, :, None]).sum(-1), (q**2 * variance[:, :, None]).sum(-1)
        for actual, wanted in zip(found, expected, strict=True):
            assert actual.dtype == jnp.float32
            wanted = wanted.reshape(actual.shape)
            np.testing.assert_allclose(actual, wanted, rtol=2e-6, atol=1e-5)


@functools.cache
def _solver(alpha):
    return jax.jit(
        functools.partial(solve, alpha=alpha, implementation="triton", interpret=True)
    )


@pytest.fixture
def resident(monkeypatch, request):
    """The longest row that stays in registers; a longer one comes in chunks of 64."""
    monkeypatch.setattr(entmax_triton, "RESIDENT", request.param)
    monkeypatch.setattr(entmax_triton, "CHUNK", 64)


@pytest.mark.usefixtures("resident")
class TestEntmax:
    @pytest.mark.parametrize(
        ("resident", "alpha"),
        [(64, 1.25), (512, 4 / 3), (512, 1.5), (64, 1.7), (64, 2.0), (64, 3.0)],
        indirect=["resident"],
    )
    def test_equals_halving_in_float64(self, alpha):
        spread = np.float32([[0.1], [1], [10], [1e4]])
        scores = np.random.default_rng(0).standard_normal((4, 300)).astype("f") * spread
        scores[1, 1:] = -np.inf
        scores[2, 7:9] = scores[2].max() + 1
        found = _solver(alpha)(scores.reshape(2, 2, 300))
        assert found.top.shape == found.tau.shape == (2, 2, 1)
        np.testing.assert_array_equal(found.top.ravel(), scores.max(-1))
        excess = (alpha - 1) * (scores - scores.max(-1, keepdims=True).astype("d"))
        excess = np.maximum(excess - np.asarray(found.tau, "d").reshape(4, 1), 0)
        p = np.where(excess > 0, excess, 0) ** (1 / (alpha - 1))
        # What is not divided by its sum shows how far the threshold is.
        expected = [oracles.entmax(row, alpha) for row in scores]
        np.testing.assert_allclose(p, expected, atol=1e-6 if alpha <= 2 else 1e-3)
        np.testing.assert_allclose(p.sum(-1), 1, atol=4e-6 if alpha <= 2 else 2e-3)

    @pytest.mark.parametrize("resident", [64], indirect=True)
    def test_extremes(self):
        big, inf = 3e38, np.inf
        rows = {
            (0.0, 0.0, 0.0, 0.0): [0.25] * 4,
            (big, big, -big, 0.0): [0.5, 0.5, 0, 0],
            (-inf, 2.0, -inf, -inf): [0, 1, 0, 0],
            (-inf, -inf, -inf, -inf): [0] * 4,
            (inf, 1.0, inf, -inf): [0.5, 0, 0.5, 0],
        }
        scores = jnp.array(list(rows), jnp.float32)
        p, _ = weights(scores, _solver(1.5)(scores), alpha=1.5)
        np.testing.assert_allclose(p, list(rows.values()), atol=1e-6)
        poisoned = jnp.pad(scores, ((0, 0), (0, 296))).at[0, 299].set(jnp.nan)
        found = _solver(1.5)(poisoned)
        np.testing.assert_array_equal(np.isnan(found.top[:, 0]), [1, 0, 0, 0, 0])


@pytest.fixture(params=[256, 1 << 14], ids=["in-parts", "resident"])
def parts(monkeypatch, request):
    """Rows of 700 scores in parts of 128, or in registers."""
    monkeypatch.setattr(topk_triton, "RESIDENT", request.param)
    monkeypatch.setattr(topk_triton, "PART", 128)


def _bits(arrays):
    """-0.0 is not 0.0, and NaN is itself."""
    dtypes = np.float32, np.int32
    return [
        np.asarray(x).astype(t).tobytes() for x, t in zip(arrays, dtypes, strict=True)
    ]


@pytest.mark.usefixtures("parts")
class TestTopK:
    def test_adversarial_scores(self):
        k = 690
        rng = np.random.default_rng(0)
        ramp = np.arange(700, dtype=np.float32)
        every_bit = rng.integers(0, 2**32, 700, np.uint32).view(np.float32)
        tiny = rng.integers(-9, 10, 700).astype(np.float32) * np.float32(1e-45)
        rows = {
            "random": rng.standard_normal(700),
            "all equal": np.full(700, 0.3),
            "rising": ramp,
            "falling": -ramp,
            "few values": rng.integers(0, 3, 700),
            "denormals": tiny,
            "zeros of both signs": np.where(rng.random(700) < 0.5, 0.0, -0.0),
            "infinities": rng.choice(np.float32([np.inf, -np.inf, 1]), 700),
            "nothing": np.full(700, -np.inf),
            "every bit pattern": np.where(np.isnan(every_bit), np.nan, every_bit),
            "NaNs": np.where(rng.random(700) < 0.01, np.nan, ramp),
            "NaNs with a sign": np.where(rng.random(700) < 0.5, -np.nan, ramp),
        }
        scores = np.stack([row.astype(np.float32) for row in rows.values()])
        count = np.resize([130, k, k, 1, 130], len(rows)).astype(np.int32)
        run = functools.partial(
            top_k, k=k, order="index", implementation="triton", interpret=True
        )
        found = jax.jit(run)(scores, count=count)
        expected = oracles.top_k(scores, k, count=count, order="index")
        for i, name in enumerate(rows):
            assert _bits(x[i] for x in found) == _bits(x[i] for x in expected), name

    def test_counts_masks_and_a_narrow_dtype(self):
        rng = np.random.default_rng(1)
        scores = rng.integers(0, 50, (5, 700)).astype(np.float32)
        where = np.arange(700) < np.array([700, 129, 3, 0, 128])[:, None]
        count = np.array([0, 200, 200, 200, 77], np.int32)
        poisoned = jnp.asarray(np.where(where, scores, np.nan), "bfloat16")
        run = functools.partial(top_k, k=200, implementation="triton", interpret=True)
        found = jax.jit(run)(poisoned, where=where, count=count)
        assert found[0].dtype == "bfloat16"
        assert _bits(found) == _bits(oracles.top_k(scores, 200, where, count))
