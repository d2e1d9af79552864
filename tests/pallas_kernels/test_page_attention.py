"""Attention over listed pages against float64 loops; what is not listed is NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.pallas import tpu as pltpu
from listed_pages import IDS, assert_close, draw, draw_masked, poisoned

from pallas_kernels.page_attention import Surrogate, page_attention, reference, tuning
from pallas_kernels.shared import tpu_lists

# Relative error of a row; two to three times the largest seen. What they catch: see
# test_tolerance_sees_one_token.
TOLERANCE = {"float32": 3e-6, "bfloat16": 5e-3}
BLOCK_TOKENS = 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few pages, so that short lists have whole, cut and empty ones."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(BLOCK_TOKENS, 3))


def _check(problem, dtype, sm_scale=0.2, interpret=True):
    q, pages, ids, positions, *mask = problem
    run = functools.partial(
        page_attention,
        sm_scale=sm_scale,
        implementation="mosaic_tpu",
        interpret=interpret,
    )
    read = np.asarray(ids)
    if mask:  # what no row of a list sees is not read either
        read = np.where(np.asarray(mask[0]).any(-1), read, -1)
    spoilt = poisoned(pages, read, np.asarray(positions))
    out, lse = jax.jit(run)(q, spoilt, ids, positions, *mask)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    assert_close((out, lse), problem, TOLERANCE[dtype], sm_scale)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "bfloat16"), (128, "float32"), (256, "float32")],
    ids="{}".format,
)
def test_widths_and_ragged_rows(head_dim, dtype):
    """Pages past a row's position are listed and not read; one list is empty."""
    problem = draw(head_dim=head_dim, ids=IDS, positions=[141, 30], dtype=dtype)
    _check(problem, dtype)


@pytest.mark.parametrize(
    ("heads", "page_size"),
    [((1, 1), 8), ((8, 1), 24), ((8, 2), 128), ((24, 2), 24)],
    ids="{}".format,
)
def test_groups_and_page_sizes(heads, page_size):
    """A block of many pages, of one page and a third, and a page above a block.

    Groups of twelve are those of four heads in three copies.
    """
    ids = [[[2, -1, 0, 3, 1, 4, -1]] * heads[1]]
    problem = draw(
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
    problem = draw(rows=3, num_pages=4, ids=ids, positions=[[-1, 17, 40]])
    _check(problem, "float32")


def test_more_rows_than_a_program_takes_come_in_tiles(monkeypatch):
    """As of a segment of a prompt: the last tile is padded, and rows are causal."""
    monkeypatch.setattr(tpu_lists, "MAX_ROWS", 8)
    positions = [[*range(133, 142)], [-1, *range(23, 31)]]
    _check(draw(ids=IDS, positions=positions, rows=9), "float32")


def test_a_mask_of_pages_by_row():
    problem = draw_masked()
    _check(problem, "float32")
    alone = functools.partial(page_attention, sm_scale=0.2)
    assert_close(jax.jit(alone)(*problem), problem, TOLERANCE["float32"], 0.2)


def test_copies_do_not_race():
    """Copies as late as they may be, into memory that holds NaN; races are an error."""
    interpret = pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
    )
    problem = draw(ids=IDS, positions=[141, 30], dtype="bfloat16")
    _check(problem, "bfloat16", interpret=interpret)


@pytest.mark.parametrize(
    "case", ["a-list-a-query-head", "kernel-D64-bfloat16", "kernel-mask"]
)
def test_weights_of_two_kinds_from_one_read(case):
    """From where other tokens left it; without the first ones; and another sum."""
    first = 21  # page 0 is not seen and page 1 is cut
    if case == "kernel-mask":
        problem = draw_masked()
    elif case == "kernel-D64-bfloat16":
        sizes = {"head_dim": 64, "dtype": "bfloat16"}
        problem = draw(ids=IDS, positions=[141, 30], **sizes)
    else:
        ids = [[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]]
        problem = draw(rows=3, num_pages=4, ids=ids, positions=[[20, 17, 40]])
    q, pages, ids, positions, *mask = problem
    # What is listed and not seen is a number, as large as one can be.
    pages = pages.at[:, :, 1, :5].set(1e30)
    run = functools.partial(page_attention, sm_scale=0.2, first_position=first)
    spoilt = pages
    if case.startswith("kernel"):
        run = functools.partial(run, implementation="mosaic_tpu", interpret=True)
        read = np.where(np.asarray(ids) == 0, -1, ids)
        if mask:
            read = np.where(np.asarray(mask[0]).any(-1), read, -1)
        spoilt = poisoned(pages, read, np.asarray(positions))
    initial, surrogate = oracles.beside(problem)
    out, lse, taken, mass = jax.jit(run)(
        q,
        spoilt,
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
    problem = draw(ids=[[[0, 1, 2, 3, 4]] * 2], positions=[79], dtype="bfloat16")
    run = functools.partial(page_attention, sm_scale=0.02)
    assert_close(run(*problem), problem, TOLERANCE["bfloat16"], 0.02)
    cut = (*problem[:3], problem[3] - 1)
    with pytest.raises(AssertionError):
        assert_close(run(*cut), problem, TOLERANCE["bfloat16"], 0.02)


def test_gradient_is_the_reference_s():
    q, pages, ids, positions = draw(
        num_pages=3, page_size=8, ids=[[[0, 2]] * 2], positions=[20]
    )

    def loss(attend, **options):
        def of(q, pages):
            out, lse = attend(q, pages, ids, positions, sm_scale=0.2, **options)
            return (out**2).sum() + lse.sum()

        return jax.jit(jax.grad(of, argnums=(0, 1)))(q, pages)

    kernel = loss(page_attention, implementation="mosaic_tpu", interpret=True)
    defined = loss(functools.partial(reference.page_attention, mask=None))
    for actual, expected in zip(kernel, defined, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head_dim": 96}, "D=96"),
        ({"page_size": 4}, "P=4"),
        ({"heads": (600, 2)}, "300 query rows"),
        ({"rows": 300, "masked": True}, "600 query rows"),
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
    problem = jax.eval_shape(lambda: draw(**sizes))
    if masked:
        shape = (*problem[2].shape, sizes["rows"])
        problem = (*problem, jax.ShapeDtypeStruct(shape, jnp.bool_))
    run = functools.partial(page_attention, sm_scale=0.2)
    jax.eval_shape(run, *problem)
    with pytest.raises(NotImplementedError, match=f"page_attention: .*{reason}"):
        jax.eval_shape(functools.partial(run, implementation="mosaic_tpu"), *problem)


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_shapes():
    q, pages, ids, positions = draw(
        num_pages=2, page_size=8, ids=[[[0]] * 2], positions=[5]
    )
    with pytest.raises(ValueError, match=r"256.* must be 2 \* 64"):
        page_attention(q[..., :64], pages, ids, positions, sm_scale=1.0)
    with pytest.raises(ValueError, match="2 KV heads or 4 query heads"):
        page_attention(q, pages, ids[:, :1], positions, sm_scale=1.0)
    run = functools.partial(page_attention, q, pages, ids, positions, sm_scale=1.0)
    initial, surrogate = oracles.beside((q, pages))
    with pytest.raises(ValueError, match=r"initial .*must be .*float32\(1, 4, 1\)"):
        run(initial=(initial[0], initial[1][:, :2]))
    with pytest.raises(
        ValueError, match=r"surrogate .*must be .*float32\(1, 4, 1, 3\)"
    ):
        run(surrogate=Surrogate(*surrogate[:2], surrogate[2][..., :1]))
    mask = jnp.ones((*ids.shape, 2), bool)
    with pytest.raises(ValueError, match=r"mask .*of the 1 query rows"):
        page_attention(q, pages, ids, positions, mask, sm_scale=1.0)
