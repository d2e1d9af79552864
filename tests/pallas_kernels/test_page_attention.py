"""Attention over listed pages against float64 loops; what is not listed is NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.entmax import reference as entmax_reference
from pallas_kernels.page_attention import Surrogate, page_attention, reference, tuning

# Relative error of a row; two to three times the largest seen. What they catch: see
# test_tolerance_sees_one_token.
TOLERANCE = {"float32": 3e-6, "bfloat16": 5e-3}
BLOCK_TOKENS = 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few pages, so that short lists have whole, cut and empty ones."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(BLOCK_TOKENS, 3))


def _problem(
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
    return *rounded, jnp.asarray(ids), jnp.asarray(positions)


def _poisoned(pages, ids, positions):
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


def _assert_close(actual, problem, tolerance, sm_scale, alpha=1.0, tau=None):
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


def _check(problem, dtype, sm_scale=0.2, alpha=1.0, interpret=True, tau=None):
    q, pages, ids, positions, *mask = problem
    run = functools.partial(
        page_attention,
        sm_scale=sm_scale,
        alpha=alpha,
        implementation="mosaic_tpu",
        interpret=interpret,
    )
    read = np.asarray(ids)
    if mask:  # what no row of a list sees is not read either
        read = np.where(np.asarray(mask[0]).any(-1), read, -1)
    poisoned = _poisoned(pages, read, np.asarray(positions))
    out, lse = jax.jit(run)(q, poisoned, ids, positions, *mask, tau=tau)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    _assert_close((out, lse), problem, TOLERANCE[dtype], sm_scale, alpha, tau)


# Two rows, two lists: whole blocks, cut ones, -1 at every place, none at all.
IDS = [
    [[4, -1, 0, 7, 2, 1, 3, 5], [-1, -1, 8, -1, 6, -1, -1, -1]],
    [[-1, 1, -1, -1, 2, 0, -1, -1], [-1] * 8],
]


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "bfloat16"), (128, "float32"), (256, "float32")],
    ids="{}".format,
)
def test_widths_and_ragged_rows(head_dim, dtype):
    """Pages past a row's position are listed and not read; one list is empty."""
    problem = _problem(head_dim=head_dim, ids=IDS, positions=[141, 30], dtype=dtype)
    _check(problem, dtype)


@pytest.mark.parametrize(
    ("heads", "page_size"),
    [((1, 1), 8), ((8, 1), 24), ((8, 2), 128)],
    ids="{}".format,
)
def test_groups_and_page_sizes(heads, page_size):
    """A block of many pages, of one page and a third, and a page above a block."""
    ids = [[[2, -1, 0, 3, 1, 4, -1]] * heads[1]]
    problem = _problem(
        heads=heads,
        num_pages=5,
        page_size=page_size,
        ids=ids,
        positions=[page_size * 3],
    )
    _check(problem, "float32")


def test_several_rows_with_a_list_for_each_query_head():
    """Three rows a head end in different pages; the first one sees no key at all."""
    ids = [[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]]
    problem = _problem(rows=3, num_pages=4, ids=ids, positions=[[-1, 17, 40]])
    _check(problem, "float32")


def _masked_problem(**sizes):
    """Pages that all rows see, some, the last alone, none; a row that sees nothing."""
    ids = [[[0, 3, 2, 1], [3, 1, -1, 0]]]
    flags = [[0b1110, 0b0110, 0b1000, 0], [0b1110, 0b1110, 0b1110, 0b0100]]
    rows = np.arange(4)
    mask = np.asarray(flags)[None, ..., None] >> rows & 1 == 1
    problem = _problem(
        rows=4, num_pages=4, ids=ids, positions=[[63, 50, 60, 63]], **sizes
    )
    return *problem, jnp.asarray(mask)


def test_a_mask_of_pages_by_row():
    problem = _masked_problem()
    _check(problem, "float32")
    alone = functools.partial(page_attention, sm_scale=0.2)
    _assert_close(jax.jit(alone)(*problem), problem, TOLERANCE["float32"], 0.2)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_copies_do_not_race(alpha):
    """Copies as late as they may be, into memory that holds NaN; races are an error."""
    interpret = pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
    )
    problem = _problem(ids=IDS, positions=[141, 30], dtype="bfloat16")
    _check(problem, "bfloat16", alpha=alpha, interpret=interpret)


@pytest.mark.parametrize(
    "case", ["a-list-a-query-head", "kernel-D64-bfloat16", "kernel-mask"]
)
def test_weights_of_two_kinds_from_one_read(case):
    """From where other tokens left it; without the first ones; and another sum."""
    first = 21  # page 0 is not seen and page 1 is cut
    if case == "kernel-mask":
        problem = _masked_problem()
    elif case == "kernel-D64-bfloat16":
        sizes = {"head_dim": 64, "dtype": "bfloat16"}
        problem = _problem(ids=IDS, positions=[141, 30], **sizes)
    else:
        ids = [[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]]
        problem = _problem(rows=3, num_pages=4, ids=ids, positions=[[20, 17, 40]])
    q, pages, ids, positions, *mask = problem
    # What is listed and not seen is a number, as large as one can be.
    pages = pages.at[:, :, 1, :5].set(1e30)
    run = functools.partial(page_attention, sm_scale=0.2, first_position=first)
    poisoned = pages
    if case.startswith("kernel"):
        run = functools.partial(run, implementation="mosaic_tpu", interpret=True)
        read = np.where(np.asarray(ids) == 0, -1, ids)
        if mask:
            read = np.where(np.asarray(mask[0]).any(-1), read, -1)
        poisoned = _poisoned(pages, read, np.asarray(positions))
    initial, surrogate = oracles.beside(problem)
    out, lse, taken, mass = jax.jit(run)(
        q,
        poisoned,
        ids,
        positions,
        *mask,
        initial=initial,
        surrogate=Surrogate(*surrogate),
    )
    inputs = [np.asarray(x.astype(jnp.float32)) for x in (q, pages)]
    inputs += [np.asarray(x) for x in problem[2:]]
    expected = oracles.page_attention(
        *inputs, sm_scale=0.2, initial=initial, first_position=first
    )
    tolerance = TOLERANCE[q.dtype.name]
    size = np.maximum(np.linalg.norm(expected[0], axis=-1), 1e-30)
    assert (np.linalg.norm(out - expected[0], axis=-1) / size).max() < tolerance
    np.testing.assert_allclose(lse, expected[1], rtol=1e-6, atol=tolerance)
    # In full precision, also of 16 bits.
    mask = mask[0] if mask else None
    wanted, total = oracles.page_weighed(*inputs[:4], mask, surrogate, first)
    np.testing.assert_allclose(mass, total, rtol=3e-6)
    unit = np.abs(wanted).max()
    assert unit > 1
    np.testing.assert_allclose(taken, wanted, rtol=0, atol=3e-6 * unit)


def test_tolerance_sees_one_token():
    """The reference passes; without one of its 80 tokens it does not."""
    problem = _problem(ids=[[[0, 1, 2, 3, 4]] * 2], positions=[79], dtype="bfloat16")
    run = functools.partial(page_attention, sm_scale=0.02)
    _assert_close(run(*problem), problem, TOLERANCE["bfloat16"], 0.02)
    cut = (*problem[:3], problem[3] - 1)
    with pytest.raises(AssertionError):
        _assert_close(run(*cut), problem, TOLERANCE["bfloat16"], 0.02)


@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_entmax_over_the_union_of_the_pages(alpha):
    """Lists of each query head, of each KV head, cut, empty; scores far apart."""
    for ids, rows, positions in (
        (IDS, 1, [141, 30]),
        ([[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]], 2, [[17, 40]]),
    ):
        problem = _problem(rows=rows, ids=ids, positions=positions, head_dim=16)
        run = functools.partial(page_attention, sm_scale=1.0, alpha=alpha)
        actual = jax.jit(run)(*problem)
        _assert_close(actual, problem, 1e-5, 1.0, alpha)
        # Softmax is far away, and so is a threshold per page.
        with pytest.raises(AssertionError):
            _assert_close(actual, problem, 1e-2, 1.0)


@pytest.mark.parametrize(
    ("alpha", "head_dim", "dtype"),
    [(1.5, 128, "float32"), (1.3, 64, "bfloat16"), (3.0, 128, "float32")],
    ids="{}".format,
)
def test_entmax_kernel(alpha, head_dim, dtype):
    """Whole, cut and empty blocks; few tokens of many in the support; an empty list."""
    problem = _problem(head_dim=head_dim, ids=IDS, positions=[141, 30], dtype=dtype)
    _check(problem, dtype, 0.5, alpha)


def test_entmax_kernel_with_rows_and_a_mask():
    _check(_masked_problem(), "float32", 0.5, 1.5)


def test_entmax_kernel_reads_no_value_outside_the_support():
    """One key far above all others: the values of every other page may be NaN."""
    q, pages, ids, positions = _problem(ids=IDS, positions=[141, 30])
    pages = pages.at[..., :128].multiply(0.01)
    pages = pages.at[:, :, 2, 5, :128].set(10 * (q[:, ::2, 0] + q[:, 1::2, 0]))
    pages = pages.at[:, :, jnp.array([0, 1, 3, 4, 5, 6, 7, 8]), :, 128:].set(jnp.nan)
    expected = np.asarray(pages[:, :, 2, 5, 128:])
    out, _ = page_attention(
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


def test_entmax_with_a_given_threshold(monkeypatch):
    """Much, little and no mass; three rows at a time and then the fourth."""
    monkeypatch.setattr(entmax_reference, "SCORES_AT_ONCE", 3 * 2 * 64)
    tau = np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 4, 4)
    problem = _masked_problem(head_dim=16)
    run = functools.partial(page_attention, sm_scale=1.0, alpha=1.5)
    actual = jax.jit(run)(*problem, tau=tau)
    mass = np.asarray(actual[1])
    assert mass[0, 0, 1] > 1
    assert (mass[:, :2, 0] == 0).all()  # a row that sees no key
    _assert_close(actual, problem, 3e-6, 1.0, 1.5, tau)
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


def test_entmax_kernel_with_a_given_threshold():
    tau = np.linspace(-1, 2, 8, dtype=np.float32).reshape(2, 4, 1)
    problem = _problem(ids=IDS, positions=[141, 30])
    _check(problem, "float32", 0.5, 1.5, tau=tau)


@pytest.mark.parametrize("scores_at_once", [1 << 24, 3 * 2 * 64])
def test_entmax_with_a_mask_of_pages_by_row(monkeypatch, scores_at_once):
    """Also with three rows at a time and then the fourth."""
    monkeypatch.setattr(entmax_reference, "SCORES_AT_ONCE", scores_at_once)
    problem = _masked_problem(head_dim=16)
    run = functools.partial(page_attention, sm_scale=1.0, alpha=1.5)
    _assert_close(jax.jit(run)(*problem), problem, 1e-5, 1.0, 1.5)


def test_gradient_is_the_reference_s():
    q, pages, ids, positions = _problem(
        num_pages=3, page_size=8, ids=[[[0, 2]] * 2], positions=[20]
    )

    def loss(attend, **options):
        def of(q, pages):
            out, lse = attend(q, pages, ids, positions, sm_scale=0.2, **options)
            return (out**2).sum() + lse.sum()

        return jax.jit(jax.grad(of, argnums=(0, 1)))(q, pages)

    kernel = loss(page_attention, implementation="mosaic_tpu", interpret=True)
    defined = loss(functools.partial(reference.page_attention, mask=None), alpha=1.0)
    for actual, expected in zip(kernel, defined, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head_dim": 96}, "D=96"),
        ({"page_size": 4}, "P=4"),
        ({"rows": 300}, "600 query rows"),
        ({"rows": 33, "masked": True}, "T=33 rows"),
        ({"dtype": "float16"}, "float16"),
        ({"ids": np.zeros((1, 2, 80_000))}, "2 lists of 80000"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_kernel_cannot(changed, reason):
    """It says so by name, and left to choose, the reference runs."""
    sizes = {"num_pages": 2, "ids": [[[0, 1]] * 2], "positions": [5]} | changed
    if sizes.get("rows"):
        sizes["positions"] = [[5] * sizes["rows"]]
    masked = sizes.pop("masked", False)
    problem = jax.eval_shape(lambda: _problem(**sizes))
    if masked:
        shape = (*problem[2].shape, sizes["rows"])
        problem = (*problem, jax.ShapeDtypeStruct(shape, jnp.bool_))
    run = functools.partial(page_attention, sm_scale=0.2)
    jax.eval_shape(run, *problem)
    with pytest.raises(NotImplementedError, match=f"page_attention: .*{reason}"):
        jax.eval_shape(functools.partial(run, implementation="mosaic_tpu"), *problem)


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_shapes():
    q, pages, ids, positions = _problem(
        num_pages=2, page_size=8, ids=[[[0]] * 2], positions=[5]
    )
    with pytest.raises(ValueError, match=r"256.* must be 2 \* 64"):
        page_attention(q[..., :64], pages, ids, positions, sm_scale=1.0)
    with pytest.raises(ValueError, match="2 KV heads or 4 query heads"):
        page_attention(q, pages, ids[:, :1], positions, sm_scale=1.0)
    run = functools.partial(page_attention, q, pages, ids, positions, sm_scale=1.0)
    with pytest.raises(ValueError, match=r"tau .*: alpha=1.0 must be above 1"):
        run(tau=jnp.zeros((1, 4, 1)))
    for tau in (jnp.zeros((1, 4, 2)), jnp.zeros((1, 4, 1), "bfloat16")):
        with pytest.raises(
            ValueError, match=r"tau .*must be float32 for .*\(1, 4, 1\)"
        ):
            run(tau=tau, alpha=1.5)
    initial, surrogate = oracles.beside((q, pages))
    for given in (
        {"initial": initial},
        {"surrogate": Surrogate(*surrogate)},
        {"first_position": 1},
    ):
        with pytest.raises(ValueError, match=r"are of softmax: alpha=1.5 must be 1"):
            run(alpha=1.5, **given)
    with pytest.raises(ValueError, match=r"initial .*must be .*float32\(1, 4, 1\)"):
        run(initial=(initial[0], initial[1][:, :2]))
    with pytest.raises(
        ValueError, match=r"surrogate .*must be .*float32\(1, 4, 1, 3\)"
    ):
        run(surrogate=Surrogate(*surrogate[:2], surrogate[2][..., :1]))
    mask = jnp.ones((*ids.shape, 2), bool)
    with pytest.raises(ValueError, match=r"mask .*of the 1 query rows"):
        page_attention(q, pages, ids, positions, mask, sm_scale=1.0)
