"""Entmax attention over listed pages against float64 loops; the rest is NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from listed_pages import IDS, assert_close, draw, draw_masked, poisoned

from pallas_kernels.entmax import reference as entmax_reference
from pallas_kernels.page_attention import tuning
from pallas_kernels.page_entmax import page_entmax

# Relative error of a row; two to three times the largest seen.
TOLERANCE = {"float32": 3e-6, "bfloat16": 5e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few pages, so that short lists have whole, cut and empty ones."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(32, 3))


def _check(problem, dtype, sm_scale, alpha, interpret=True, tau=None):
    q, pages, ids, positions, *mask = problem
    run = functools.partial(
        page_entmax,
        sm_scale=sm_scale,
        alpha=alpha,
        implementation="mosaic_tpu",
        interpret=interpret,
    )
    read = np.asarray(ids)
    if mask:  # what no row of a list sees is not read either
        read = np.where(np.asarray(mask[0]).any(-1), read, -1)
    spoilt = poisoned(pages, read, np.asarray(positions))
    out, value = jax.jit(run)(q, spoilt, ids, positions, *mask, tau=tau)
    assert (out.dtype, value.dtype) == (jnp.float32, jnp.float32)
    assert_close((out, value), problem, TOLERANCE[dtype], sm_scale, alpha, tau)


@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_over_the_union_of_the_pages(alpha):
    """Lists of each query head, of each KV head, cut, empty; scores far apart."""
    for ids, rows, positions in (
        (IDS, 1, [141, 30]),
        ([[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]], 2, [[17, 40]]),
    ):
        problem = draw(rows=rows, ids=ids, positions=positions, head_dim=16)
        run = functools.partial(page_entmax, sm_scale=1.0, alpha=alpha)
        actual = jax.jit(run)(*problem)
        assert_close(actual, problem, 1e-5, 1.0, alpha)
        # Softmax is far away, and so is a threshold per page.
        with pytest.raises(AssertionError):
            assert_close(actual, problem, 1e-2, 1.0)


@pytest.mark.parametrize(
    ("alpha", "head_dim", "dtype"),
    [(1.5, 128, "float32"), (1.3, 64, "bfloat16"), (3.0, 128, "float32")],
    ids="{}".format,
)
def test_kernel(alpha, head_dim, dtype):
    """Whole, cut and empty blocks; few tokens of many in the support; an empty list."""
    problem = draw(head_dim=head_dim, ids=IDS, positions=[141, 30], dtype=dtype)
    _check(problem, dtype, 0.5, alpha)


def test_kernel_with_rows_and_a_mask():
    _check(draw_masked(), "float32", 0.5, 1.5)


def test_kernel_reads_no_value_outside_the_support():
    """One key far above all others: the values of every other page may be NaN."""
    q, pages, ids, positions = draw(ids=IDS, positions=[141, 30])
    pages = pages.at[..., :128].multiply(0.01)
    pages = pages.at[:, :, 2, 5, :128].set(10 * (q[:, ::2, 0] + q[:, 1::2, 0]))
    pages = pages.at[:, :, jnp.array([0, 1, 3, 4, 5, 6, 7, 8]), :, 128:].set(jnp.nan)
    expected = np.asarray(pages[:, :, 2, 5, 128:])
    out, _ = page_entmax(
        q,
        pages,
        ids,
        positions,
        sm_scale=1.0,
        alpha=1.5,
        implementation="mosaic_tpu",
        interpret=True,
    )
    # The first row's first list holds page 2; two query heads share it.
    np.testing.assert_allclose(out[0, :2, 0], expected[0, [0, 0]], rtol=1e-6)


def test_with_a_given_threshold(monkeypatch):
    """Much, little and no mass; three rows at a time and then the fourth."""
    monkeypatch.setattr(entmax_reference, "SCORES_AT_ONCE", 3 * 2 * 64)
    tau = np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 4, 4)
    problem = draw_masked(head_dim=16)
    run = functools.partial(page_entmax, sm_scale=1.0, alpha=1.5)
    actual = jax.jit(run)(*problem, tau=tau)
    mass = np.asarray(actual[1])
    assert mass[0, 0, 1] > 1
    assert (mass[:, :2, 0] == 0).all()  # a row that sees no key
    assert_close(actual, problem, 3e-6, 1.0, 1.5, tau)
    # The solved threshold is the one whose mass is 1.
    solved = functools.partial(run, alpha=1.7)
    out, _ = jax.jit(solved)(*problem)
    low, high = np.full_like(tau, -50), np.full_like(tau, 50)
    given = jax.jit(solved)
    for _ in range(40):
        middle = (low + high) / 2
        found = given(*problem, tau=middle)
        is_low = np.asarray(found[1]) > 1
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    np.testing.assert_allclose(found[0], out, rtol=0, atol=1e-4)


def test_kernel_with_a_given_threshold():
    tau = np.linspace(-1, 2, 8, dtype=np.float32).reshape(2, 4, 1)
    problem = draw(ids=IDS, positions=[141, 30])
    _check(problem, "float32", 0.5, 1.5, tau=tau)


@pytest.mark.parametrize("scores_at_once", [1 << 24, 3 * 2 * 64])
def test_with_a_mask_of_pages_by_row(monkeypatch, scores_at_once):
    """Also with three rows at a time and then the fourth."""
    monkeypatch.setattr(entmax_reference, "SCORES_AT_ONCE", scores_at_once)
    problem = draw_masked(head_dim=16)
    run = functools.partial(page_entmax, sm_scale=1.0, alpha=1.5)
    assert_close(jax.jit(run)(*problem), problem, 1e-5, 1.0, 1.5)


def test_copies_do_not_race():
    """Copies as late as they may be, into memory that holds NaN; races are an error."""
    interpret = pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
    )
    problem = draw(ids=IDS, positions=[141, 30], dtype="bfloat16")
    _check(problem, "bfloat16", 0.2, 1.5, interpret=interpret)


def test_what_the_kernel_cannot():
    """It says so by name, and left to choose, the reference runs."""
    run = functools.partial(page_entmax, sm_scale=1.0, alpha=1.5)
    named = functools.partial(run, implementation="mosaic_tpu")
    for sizes, reason in (
        ({"head_dim": 96, "ids": IDS, "positions": [5, 5]}, "D=96"),
        ({"page_size": 128, "ids": np.zeros((1, 2, 2048)), "positions": [5]}, "VMEM"),
    ):
        problem = jax.eval_shape(functools.partial(draw, **sizes))
        jax.eval_shape(run, *problem)
        with pytest.raises(NotImplementedError, match=f"page_entmax: .*{reason}"):
            jax.eval_shape(named, *problem)


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_shapes():
    problem = draw(num_pages=2, page_size=8, ids=[[[0]] * 2], positions=[5])
    run = functools.partial(page_entmax, *problem, sm_scale=1.0)
    for alpha in (1.0, float("inf")):
        with pytest.raises(ValueError, match=r"alpha=.* must be finite and above 1"):
            run(alpha=alpha)
    for tau in (jnp.zeros((1, 4, 2)), jnp.zeros((1, 4, 1), "bfloat16")):
        with pytest.raises(
            ValueError, match=r"tau .*must be float32 for .*\(1, 4, 1\)"
        ):
            run(tau=tau, alpha=1.5)
    mask = jnp.ones((*problem[2].shape, 2), bool)
    with pytest.raises(ValueError, match=r"mask .*of the 1 query rows"):
        run(mask=mask, alpha=1.5)
