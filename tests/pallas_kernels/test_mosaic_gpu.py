"""The kernels of Hopper GPUs, simulated, against float64 loops.

The simulation runs the copies and their barriers; what a program has not copied is NaN.
That the same kernels compile for a GPU is in `aot/test_gpu.py`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.entmax import solve, weights
from pallas_kernels.page_attention import mosaic_gpu, page_attention
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.shared import hopper

needs_mosaic = pytest.mark.skipif(
    hopper.plgpu is None,
    reason=f"Mosaic GPU kernels need jax >= 0.11; this is {jax.__version__}",
)
# Relative error of a row, two to three times the largest seen: weights are rounded to
# this dtype, as the values are.
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that a program has several blocks, of lists that are short."""
    monkeypatch.setattr(hopper, "PROGRAMS", 8)


@pytest.fixture
def one_program(monkeypatch):
    """For each list, so that it fills each place of its ring again."""
    monkeypatch.setattr(hopper, "PROGRAMS", 1)


def _simulated(operation, races=False, **static):
    interpret = hopper.plgpu.InterpretGPUParams(detect_races=races)
    run = functools.partial(
        operation, implementation="mosaic_gpu", interpret=interpret, **static
    )
    return jax.jit(run)


def _assert_close(actual, expected, dtype):
    out, lse = (np.asarray(x, np.float64) for x in actual)
    size = np.linalg.norm(expected[0], axis=-1)
    error = np.linalg.norm(out - expected[0], axis=-1) / np.where(size == 0, 1, size)
    assert error.max() < TOLERANCE[dtype], error.max()
    np.testing.assert_allclose(lse, expected[1], rtol=2e-6, atol=2e-6)


def _check_pages(
    heads,
    head_dim,
    pages,
    ids,
    positions,
    mask=None,
    dtype="bfloat16",
    initial=False,
    first_position=0,
    **options,
):
    """Poison: NaN in pages that are not listed or not seen, and in keys not seen."""
    rng = np.random.default_rng(0)
    ids, positions = np.asarray(ids, np.int32), np.asarray(positions, np.int32)
    (batch, rows), (num_pages, page_size) = positions.shape, pages
    q = rng.standard_normal((batch, heads[0], rows, head_dim))
    cache = rng.standard_normal((batch, heads[1], *pages, 2 * head_dim))
    q, cache = (jnp.asarray(x, dtype) for x in (q, cache))
    position = np.arange(num_pages * page_size).reshape(pages)
    unseen = position > positions.max(1)[:, None, None]  # (B, NP, P)
    unread = np.repeat(unseen.all(-1)[:, None], heads[1], axis=1)  # (B, Hkv, NP)
    for b, h, page in np.ndindex(unread.shape):
        lists = ids[b].reshape(heads[1], -1)
        unread[b, h, page] |= page not in lists[h]
    if mask is not None:  # of one list a KV head
        for b, h, place in np.argwhere(~mask.any(-1) & (ids >= 0)):
            unread[b, h, ids[b, h, place]] = True
    is_key = np.arange(2 * head_dim) < head_dim
    hidden = unread[..., None, None] | (unseen[:, None, ..., None] & is_key)
    poisoned = jnp.where(hidden, jnp.nan, cache)
    # A weight of 0, then: as the public function wants it, a number.
    poisoned = jnp.where(
        unseen[:, None, ..., None] & ~hidden, jnp.asarray(6e4, dtype), poisoned
    )
    initial = oracles.beside((q, cache))[0] if initial else None
    more = {"initial": initial, "first_position": first_position}
    run = _simulated(
        page_attention, sm_scale=0.2, first_position=first_position, **options
    )
    actual = run(
        q,
        poisoned,
        jnp.asarray(ids),
        jnp.asarray(positions),
        None if mask is None else jnp.asarray(mask),
        initial=initial,
    )
    inputs = [np.asarray(x.astype(jnp.float32)) for x in (q, cache)]
    given = *inputs, ids, positions, mask
    expected = oracles.page_attention(*given, sm_scale=0.2, **more)
    _assert_close(actual, expected, dtype)


@needs_mosaic
def test_pages_of_a_block():
    """-1 at every place, cut and unseen pages, an empty list, parts without blocks."""
    ids = [
        [[4, -1, 0, 7, 2, 1, 3], [-1, -1, 6, -1, 5, -1, -1]],
        [[-1, 1, -1, -1, 2, 0, -1], [-1] * 7],
    ]
    _check_pages((8, 2), 128, (8, 64), ids, [[300], [70]])


@needs_mosaic
def test_pages_from_where_other_tokens_left_it():
    """Without the first tokens: page 0 is not seen and page 1 is cut."""
    ids = [[[4, -1, 0, 7, 2, 1, 3], [-1, -1, 6, -1, 1, -1, -1]]]
    options = {"initial": True, "first_position": 101}
    _check_pages((8, 2), 64, (8, 64), ids, [[300]], **options)


@needs_mosaic
def test_several_pages_a_block_without_races(one_program):
    """A block that one page fills in part; rows that end in different pages; in f16."""
    none = [-1] * 10
    ids = [
        [9, 3, 0, -1, 2, 6, 7, 1, 8, 5],
        none,
        [5, 7, 1, 8, *none[4:]],
        [9, *none[1:]],
    ]
    _check_pages(
        (4, 2), 64, (10, 16), [ids], [[-1, 37, 150]], dtype="float16", races=True
    )


@needs_mosaic
def test_pages_above_a_block():
    """Of which a row's position cuts one half, and leaves the other unread."""
    _check_pages((2, 1), 64, (4, 128), [[[3, 0, -1, 2]]], [[300]])


@needs_mosaic
def test_wide_heads_and_a_block_of_which_one_page_is_cut():
    _check_pages((1, 1), 256, (5, 32), [[[3, 0, -1, 2, 1]]], [[100]])


@needs_mosaic
@pytest.mark.parametrize("page_size", [32, 128])
def test_rows_that_see_some_of_the_pages(page_size):
    """Each row its own; a page that none sees is not read; a row that sees none."""
    mask = np.random.default_rng(1).random((1, 2, 5, 3)) < 0.5
    mask[0, 0, :, 1], mask[0, :, 2] = False, False
    ids = [[[3, 1, 4, 0, 2], [0, 5, 3, -1, 4]]]
    positions = [[3 * page_size + 5, 4 * page_size, 9 * page_size]]
    _check_pages((4, 2), 64, (6, page_size), ids, positions, mask)


def _check_decode(
    heads,
    head_dim,
    slots,
    positions,
    held=None,
    window=None,
    soft_cap=None,
    races=False,
    with_logits=False,
):
    """Poison: NaN in blocks that no row sees, and in all keys that no row sees."""
    rng = np.random.default_rng(0)
    positions = np.asarray(positions, np.int32)
    batch, rows = positions.shape
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, *shape, head_dim)), jnp.bfloat16)
        for shape in ((heads[0], rows), (heads[1], slots), (heads[1], slots))
    )
    slot = np.arange(slots)
    own = np.broadcast_to(slot if held is None else held, (batch, heads[1], slots))
    first, last = (x[:, None, None] for x in (positions.min(1), positions.max(1)))
    lowest = 0 if window is None else np.maximum(first - window + 1, 0)
    unseen = (own < lowest) | (own > last)
    unread = np.zeros_like(unseen)
    if held is None:
        block = slot // hopper.BLOCK
        unread = (block > last // hopper.BLOCK) | (block < lowest // hopper.BLOCK)
        # The last block is whole, and begins in the one before.
        unread &= (slot < slots - hopper.BLOCK) | (last < block[-1] * hopper.BLOCK)
    poisoned_k = jnp.where(unseen[..., None], jnp.nan, k)
    poisoned_v = jnp.where(unread[..., None], jnp.nan, v)
    run = _simulated(
        decode_attention,
        races,
        sm_scale=0.3,
        window=window,
        soft_cap=soft_cap,
        with_logits=with_logits,
    )
    given = None if held is None else jnp.asarray(held, jnp.int32)
    results = run(q, poisoned_k, poisoned_v, jnp.asarray(positions), given)
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    scored = np.full((*lse.shape, slots), -np.inf)
    for b, h, t in np.ndindex(lse.shape):
        kv, here = h * heads[1] // heads[0], positions[b, t]
        oldest = 0 if window is None else max(here - window + 1, 0)
        kept = [s for s in slot if oldest <= own[b, kv, s] <= here]
        logits = 0.3 * k[b, kv, kept] @ q[b, h, t]
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        scored[b, h, t, kept] = logits
        if kept:
            weights = np.exp(logits)
            out[b, h, t] = weights @ v[b, kv, kept] / weights.sum()
            lse[b, h, t] = np.log(weights.sum())
    _assert_close(results[:2], (out, lse), "bfloat16")
    assert len(results) == 2 + with_logits
    for found in results[2:]:
        np.testing.assert_allclose(found, scored, rtol=2e-6, atol=2e-6)


@needs_mosaic
def test_decode_up_to_each_row_s_position():
    """None, the last of a block, within the last one, which begins in another."""
    positions = [[-1], [127], [195]]
    _check_decode((4, 2), 64, 200, positions, soft_cap=1.0, with_logits=True)


@needs_mosaic
def test_decode_in_a_window_without_races(one_program):
    """Rows that end in different blocks; nothing before the window is read."""
    _check_decode(
        (2, 1), 128, 264, [[150, 199]], window=70, races=True, with_logits=True
    )


@needs_mosaic
def test_a_prompt_in_tiles_without_races():
    """Three heads at 43 positions, in three tiles; the last has one position."""
    positions = np.stack([np.arange(130, 173), np.arange(20, 63)])
    _check_decode((3, 1), 64, 200, positions, window=100, races=True)


@needs_mosaic
def test_a_tile_of_a_prompt_reads_what_its_own_rows_see():
    """Values that the second tile alone sees are NaN, and so is its output alone."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((1, 2, 60, 64), (1, 1, 192, 64), (1, 1, 192, 64))
    )
    positions = jnp.arange(96, 156, dtype=jnp.int32)[None]  # a tile has 32 of them
    run = functools.partial(decode_attention, sm_scale=0.3)
    expected = jax.jit(run)(q, k, v, positions)
    poisoned = v.at[:, :, 128:].set(jnp.nan)
    found = _simulated(decode_attention, sm_scale=0.3)(q, k, poisoned, positions)
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-6, atol=2e-6)
    out = np.asarray(found[0])
    np.testing.assert_allclose(out[:, :, :32], expected[0][:, :, :32], atol=2e-2)
    assert np.isnan(out[:, :, 32:]).all()


@needs_mosaic
@pytest.mark.parametrize("shape", [(2, 2), (1, 1)], ids="{}".format)
def test_decode_with_positions_of_its_slots(shape):
    """A ring in any order, empty slots, a window, and a cap on the logits."""
    held = [np.random.default_rng(i).permutation(136) - 20 for i in range(4)]
    held = np.maximum(np.stack(held).reshape(2, 2, 136)[: shape[0], : shape[1]], -1)
    _check_decode((8, 2), 64, 136, [[60], [110]], held=held, window=90, soft_cap=1.0)


# Part of a step, of several steps, and where it is found by halving.
@needs_mosaic
@pytest.mark.parametrize(
    ("alpha", "length"), [(1.5, 9000), (1.7, 1025), (1.25, 4097), (3.0, 1025)]
)
def test_the_threshold_of_entmax(alpha, length):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 2, length)) * np.array([0.1, 3.0])[:, None]
    scores = scores.astype(np.float32)
    scores[1, 0, 1:] = -np.inf
    scores[1, 1, -1] = 9.0  # the largest is the last
    run = functools.partial(
        solve, alpha=alpha, implementation="mosaic_gpu", interpret=True
    )
    found = jax.jit(run)(scores)
    p, _ = weights(jnp.asarray(scores), found, alpha=alpha)
    expected = [[oracles.entmax(row, alpha) for row in block] for block in scores]
    # As of the reference: the slope is infinite at every score where alpha > 2.
    np.testing.assert_allclose(p, expected, atol=1e-6 if alpha <= 2 else 1e-3)
    np.testing.assert_array_equal(found.top[..., 0], scores.max(-1))


@needs_mosaic
def test_rows_of_no_score_and_of_no_number():
    """Both as of the reference; one row does not touch the other."""
    scores = np.full((3, 1030), -np.inf, np.float32)
    scores[1, 7], scores[2, [3, 900]] = np.nan, [1.0, 2.0]
    run = functools.partial(solve, alpha=2.0)
    named = functools.partial(run, implementation="mosaic_gpu", interpret=True)
    actual, expected = jax.jit(named)(scores), run(jnp.asarray(scores))
    for found, defined in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(found[::2], defined[::2])
    assert np.isnan(actual.top[1, 0])


def _shapes(heads=(8, 2), rows=1, head_dim=128, page_size=64, dtype="bfloat16"):
    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    return (
        array(1, heads[0], rows, head_dim, dtype=dtype),
        array(1, heads[1], 9, page_size, 2 * head_dim, dtype=dtype),
        array(1, heads[1], 4),
        array(1, rows),
    )


def _refusal(*arguments, operation=page_attention, **static):
    """What the kernel says when it is named; left to choose, the operation traces."""
    run = functools.partial(operation, sm_scale=0.2, **static)
    jax.eval_shape(run, *arguments)
    named = functools.partial(run, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(named, *arguments)
    return str(error.value)


@needs_mosaic
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head_dim": 96}, "D=96 must be 64, 128 or 256"),
        ({"page_size": 24}, "P=24 must be 8, 16, 32 or a multiple of 64"),
        ({"page_size": 96}, "P=96"),
        ({"rows": 17}, "68 query rows"),
        ({"dtype": "float32"}, "float32"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_pages_the_kernel_cannot(changed, reason):
    """It says so by name, and left to choose, the reference runs."""
    assert re.search(reason, _refusal(*_shapes(**changed)))


@needs_mosaic
def test_entmax_is_not_merged():
    """Blocks are merged by their log-sum-exp: entmax over pages has no such kernel."""
    run = functools.partial(page_entmax, sm_scale=0.2, alpha=1.5)
    with pytest.raises(ValueError, match="'mosaic_gpu' must be None or one of"):
        jax.eval_shape(functools.partial(run, implementation="mosaic_gpu"), *_shapes())


@needs_mosaic
@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        (100, "100 slots must be a multiple of 8"),
        (56, "56 slots must be .* at least 64"),
    ],
    ids=["odd", "few"],
)
def test_what_decode_the_kernel_cannot(slots, reason):
    q = jax.ShapeDtypeStruct((1, 4, 1, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, slots, 64), jnp.bfloat16)
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    said = _refusal(q, k, k, position, operation=decode_attention)
    assert re.search(reason, said)


@needs_mosaic
@pytest.mark.parametrize(
    ("heads", "rows", "static"),
    [(130, 1, {}), (4, 33, {"with_logits": True})],
    ids=["group", "logits-of-a-prompt"],
)
def test_what_rows_the_kernel_cannot(heads, rows, static):
    q = jax.ShapeDtypeStruct((1, heads, rows, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, 128, 64), jnp.bfloat16)
    position = jax.ShapeDtypeStruct((1, rows), jnp.int32)
    reason = r"6[56] query rows must be in \[1, 64\]"
    said = _refusal(q, k, k, position, operation=decode_attention, **static)
    assert re.search(reason, said)


@needs_mosaic
def test_what_scores_the_kernel_cannot():
    run = functools.partial(solve, alpha=1.5, implementation="mosaic_gpu")
    for dtype, length, reason in (
        (jnp.float16, 2048, "float16 must be float32"),
        (jnp.float32, 1000, "1000 scores a row must be at least 1024"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(run, jax.ShapeDtypeStruct((2, length), dtype))


def _on(kind):
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@needs_mosaic
@pytest.mark.parametrize(
    ("kind", "is_hopper"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("NVIDIA L4", False),
    ],
)
def test_hopper_alone(kind, is_hopper):
    with _on(kind):
        reason = hopper.unsupported()
    assert reason == (None if is_hopper else f"{kind} must be a Hopper GPU")


def test_an_older_jax_is_refused(monkeypatch):
    """Where Mosaic GPU may not even be imported."""
    # The kernel is imported by now: what it knows of Mosaic GPU stays.
    monkeypatch.setattr(mosaic_gpu.hopper, "plgpu", None)
    assert re.search(r"jax \S+ must be 0.11 or newer", _refusal(*_shapes()))
