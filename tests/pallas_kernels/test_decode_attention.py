"""Attention of a few rows against float64 loops: positions, rings, windows, blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import (
    decode_attention,
    decode_logits,
    mosaic_tpu,
    reference,
    tuning,
)
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Format, Layout, WithNewest

# Relative error of a row of the kernel; at most three times the largest seen.
TOLERANCE = {"float32": 3e-6, "bfloat16": 5e-3}
BLOCK_TOKENS = 16


def _problem(batch, heads, rows, slots, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, heads[0], rows, head_dim),
        (batch, heads[1], slots, head_dim),
        (batch, heads[1], slots, head_dim),
    ]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _check(q, k, v, query_positions, held, key_positions, sm_scale=0.3, **options):
    attend = functools.partial(decode_attention, sm_scale=sm_scale, **options)
    if key_positions is not None:
        key_positions = np.asarray(key_positions, np.int32)
    positions = np.asarray(query_positions, np.int32)
    out, lse, *logits = jax.jit(attend)(q, k, v, positions, key_positions)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    with_logits = options.pop("with_logits", False)
    expected = oracles.decode_attention(
        q, k, v, query_positions, held, sm_scale, **options
    )
    np.testing.assert_allclose(out, expected[0], atol=3e-6)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)
    assert len(logits) == with_logits
    for found in logits:
        np.testing.assert_allclose(found, expected[2], atol=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)], ids=["G1", "G4", "G3"])
@pytest.mark.parametrize("window", [None, 4])
def test_contiguous_slots(heads, window):
    """First and last position; one row sees no key and gives (0, -inf)."""
    q, k, v = _problem(3, heads, 2, 9, 6)
    query_positions = np.array([[0, 1], [7, 8], [-1, 3]])
    _check(q, k, v, query_positions, np.arange(9)[None, None], None, window=window)


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (1, 1)])
def test_positions_of_a_ring_in_any_order(shape):
    q, k, v = _problem(2, (4, 2), 1, 7, 4)
    held = np.stack([np.random.default_rng(i).permutation(7) + 3 for i in range(4)])
    held = held.reshape(2, 2, 7)[: shape[0], : shape[1]]
    held = np.where(held > 7, -1, held)
    _check(q, k, v, np.array([[6], [9]]), held, held)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_blocks_agree_with_one_pass(monkeypatch, blocked, given):
    """Whole blocks, a rest, rows that end in each of them; tiles of two rows."""
    monkeypatch.setattr(reference, "BLOCK", 4 if blocked else 64)
    monkeypatch.setattr(reference, "TILE", 2)
    monkeypatch.setattr(reference, "DENSE_ROWS", 2)
    q, k, v = _problem(2, (4, 2), 5, 14, 4)
    query_positions = np.array([[-1, 0, 3, 4, 13], [2, 7, 8, 11, 12]])
    held = np.arange(14)[None, None]
    _check(q, k, v, query_positions, held, held if given else None)
    _check(q, k, v, query_positions, held, held if given else None, window=3)
    options = {"soft_cap": 0.7, "with_logits": not blocked}
    _check(q, k, v, query_positions, held, held if given else None, **options)


def test_tiles_keep_positions_that_differ_from_row_to_row(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 4)
    monkeypatch.setattr(reference, "DENSE_ROWS", 2)
    monkeypatch.setattr(reference, "TILE", 2)
    q, k, v = (jnp.asarray(x) for x in _problem(2, (4, 2), 5, 14, 4))
    query_positions = jnp.asarray([[3, 4, 9, 12, 13], [2, 7, 8, 11, 12]], jnp.int32)
    held = np.stack([np.random.default_rng(i).permutation(14) for i in range(5)])
    held = np.broadcast_to(held[None, None], (2, 1, 5, 14)).astype(np.int32)
    out, lse = reference.decode_attention(
        q, k, v, query_positions, jnp.asarray(held), sm_scale=0.3
    )
    for row in range(5):
        expected = oracles.decode_attention(
            *(np.asarray(x) for x in (q[:, :, [row]], k, v)),
            np.asarray(query_positions[:, [row]]),
            held[:, :, row],
            0.3,
        )
        np.testing.assert_allclose(out[:, :, [row]], expected[0], atol=3e-6)
        np.testing.assert_allclose(lse[:, :, [row]], expected[1], atol=1e-5)


def test_half_precision_accumulates_in_single():
    """Two thousand equal weights: a bfloat16 sum would stop at 256."""
    ones = jnp.ones((1, 1, 2000, 4), jnp.bfloat16)
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    out, lse = decode_attention(
        q, ones, ones, jnp.full((1, 1), 1999, jnp.int32), sm_scale=1.0
    )
    np.testing.assert_allclose(out, 1.0, rtol=1e-3)
    np.testing.assert_allclose(lse, np.log(2000.0), rtol=1e-6)


def test_logits_are_scaled_and_masked():
    q, k, _ = _problem(2, (4, 2), 2, 5, 4)
    query_positions = np.array([[0, 4], [2, -1]])
    logits = decode_logits(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(query_positions), sm_scale=0.7
    )
    for b, h, t, s in np.ndindex(2, 4, 2, 5):
        expected = -np.inf
        if s <= query_positions[b, t]:
            expected = 0.7 * float(np.dot(q[b, h, t], k[b, h // 2, s]))
        np.testing.assert_allclose(logits[b, h, t, s], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", [{"soft_cap": 0.0}, {"window": 0}], ids=str)
def test_bounds_must_be_positive(bound):
    q, positions = jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"=0(\.0)? must be positive"):
        decode_attention(q, q, q, positions, sm_scale=1.0, **bound)


def _kinds():
    """Shapes of rows in floats, quantised, and so with the newest beside."""
    floats = jax.ShapeDtypeStruct((1, 2, 128, 128), jnp.float32)
    layout = Layout((Format(128, 8, 128),), "float32")
    rows = jax.eval_shape(functools.partial(quantized.encode, layout), floats)
    at = jax.ShapeDtypeStruct((1, 20), jnp.int32)
    newest = jax.ShapeDtypeStruct((1, 2, 20, 128), jnp.float32)
    return {"floats": floats, "rows": rows, "beside": WithNewest(rows, newest, at)}


def _attend(k, v, **options):
    q = jax.ShapeDtypeStruct((1, 2, 1, 128), jnp.float32)
    at = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    run = functools.partial(decode_attention, sm_scale=1.0, **options)
    return jax.eval_shape(run, q, k, v, at)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ("rows", "beside", "k and v are Quantized and WithNewest: both must"),
        ("beside", "rows", "k and v are WithNewest and Quantized: both must"),
    ],
)
def test_the_newest_are_beside_keys_and_values_or_neither(keys, values, message):
    kinds = _kinds()
    with pytest.raises(ValueError, match=message):
        _attend(kinds[keys], kinds[values])


@pytest.mark.parametrize("kernel", ["mosaic_tpu", "mosaic_gpu"])
@pytest.mark.parametrize(
    ("keys", "values", "reason"),
    [
        ("rows", "floats", "keys are quantised and values floats"),
        ("floats", "rows", "keys are floats and values quantised"),
    ],
)
def test_kernels_take_both_quantised_or_neither(keys, values, reason, kernel):
    """Left to choose, the reference runs: it reads each as it is stored."""
    kinds = _kinds()
    _attend(kinds[keys], kinds[values])
    with pytest.raises(NotImplementedError, match=reason):
        _attend(kinds[keys], kinds[values], implementation=kernel)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 1, 4), (1, 2, 5, 4), (1, 2, 5, 4)), r"query heads 3.*KV heads 2"),
        (((1, 2, 1, 4), (1, 2, 5, 4), (1, 2, 6, 4)), r"shapes disagree.*5.*6"),
        (((1, 2, 1, 4), (1, 2, 5, 8), (1, 2, 5, 8)), r"shapes disagree"),
    ],
)
def test_errors_name_the_shapes(shapes, message):
    q, k, v = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, v, jnp.zeros((1, 1), jnp.int32), sm_scale=1.0)


def _check_kernel(
    *,
    heads=(4, 2),
    slots=40,
    head_dim=128,
    positions,
    held=None,
    window=None,
    soft_cap=None,
    with_logits=False,
    dtype="float32",
    interpret=True,
):
    """The kernel against the loops, NaN in every slot that it has no reason to read."""
    positions = np.asarray(positions, np.int32)
    problem = _problem(len(positions), heads, positions.shape[1], slots, head_dim)
    q, k, v = (jnp.asarray(x, dtype) for x in problem)
    slot = np.arange(slots)
    unread = np.full((1, slots), False)
    if held is None:
        unread = slot > positions.max(1, keepdims=True)
        if window is not None:
            first = np.maximum(positions.min(1, keepdims=True) - window + 1, 0)
            unread |= slot < first // BLOCK_TOKENS * BLOCK_TOKENS
    poisoned = [jnp.where(unread[:, None, :, None], jnp.nan, x) for x in (k, v)]
    run = functools.partial(
        decode_attention,
        sm_scale=0.2,
        window=window,
        soft_cap=soft_cap,
        with_logits=with_logits,
        implementation="mosaic_tpu",
        interpret=interpret,
    )
    given = None if held is None else jnp.asarray(held, jnp.int32)
    out, lse, *logits = jax.jit(run)(q, *poisoned, jnp.asarray(positions), given)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    inputs = [np.asarray(x.astype(jnp.float32)) for x in (q, k, v)]
    own = slot[None, None] if held is None else held
    expected, expected_lse, expected_logits = oracles.decode_attention(
        *inputs, positions, own, 0.2, window, soft_cap
    )
    size = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(out - expected, axis=-1) / np.where(size == 0, 1, size)
    assert error.max() < TOLERANCE[dtype]
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=TOLERANCE[dtype])
    assert len(logits) == with_logits
    for found in logits:
        np.testing.assert_allclose(found, expected_logits, atol=TOLERANCE[dtype])


@pytest.fixture
def small_blocks(monkeypatch):
    """So that 40 slots are two whole blocks and a half."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(BLOCK_TOKENS, 3))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((4, 2), 128, "float32"),
        ((8, 1), 256, "bfloat16"),
        ((1, 1), 128, "float32"),
    ],
    ids="{}".format,
)
def test_kernel_reads_up_to_each_row_s_position(heads, head_dim, dtype):
    """None, within a block, the last of one, the first of the next, the last slot."""
    positions = [[-1], [14], [15], [16], [39]]
    _check_kernel(
        heads=heads,
        head_dim=head_dim,
        positions=positions,
        dtype=dtype,
        with_logits=dtype == "bfloat16",
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 5])
def test_kernel_with_several_rows(window):
    """Rows of one head end in different blocks; the window begins in a later one."""
    _check_kernel(
        positions=[[-1, 3, 17], [33, 36, 38]],
        window=window,
        with_logits=True,
        soft_cap=None if window else 1.5,
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 6])
def test_kernel_with_a_prompt_in_tiles(monkeypatch, window):
    """Seven rows of two heads, in tiles of three: each reads up to its own last row."""
    monkeypatch.setattr(mosaic_tpu, "MAX_ROWS", 4)
    monkeypatch.setattr(mosaic_tpu, "TILE_ROWS", 6)
    _check_kernel(
        positions=[[-1, 3, 14, 15, 16, 17, 18], [20, 21, 22, 36, 37, 38, 39]],
        window=window,
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(2, 2), (1, 1)], ids="{}".format)
def test_kernel_with_positions_of_its_slots(shape):
    """A ring in any order, empty slots, and a window."""
    held = [np.random.default_rng(i).permutation(40) - 8 for i in range(4)]
    held = np.maximum(np.stack(held).reshape(2, 2, 40)[: shape[0], : shape[1]], -1)
    _check_kernel(positions=[[20], [31]], held=held, window=25, with_logits=True)


def test_kernel_with_fewer_slots_than_a_block():
    _check_kernel(positions=[[5]], slots=8)
    _check_kernel(positions=[[5]], slots=8, held=np.arange(8)[None, None, ::-1])


@pytest.mark.usefixtures("small_blocks")
def test_copies_do_not_race():
    """Copies as late as they may be, into memory that holds NaN; races are an error."""
    interpret = pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
    )
    _check_kernel(
        positions=[[20], [39]], dtype="bfloat16", interpret=interpret, with_logits=True
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head_dim": 64}, "D=64 must be a multiple of 128"),
        ({"slots": 20}, "20 slots"),
        ({"rows": 65, "with_logits": True}, "130 query rows"),
        ({"group": 300}, "300 query heads"),
        ({"dtype": jnp.float16}, "float16"),
    ],
    ids=["D64", "slots", "rows", "group", "dtype"],
)
def test_what_the_kernel_cannot(changed, reason):
    """It says so by name, and left to choose, the reference runs."""
    sizes = {"head_dim": 128, "slots": 24, "rows": 1, "dtype": jnp.float32} | changed
    dtype = sizes.pop("dtype")
    heads = (2 * sizes.get("group", 2), 2)
    problem = _problem(1, heads, sizes["rows"], sizes["slots"], sizes["head_dim"])
    arguments = [jax.ShapeDtypeStruct(x.shape, dtype) for x in problem]
    arguments.append(jax.ShapeDtypeStruct((1, sizes["rows"]), jnp.int32))
    with_logits = sizes.get("with_logits", False)
    run = functools.partial(decode_attention, sm_scale=0.2, with_logits=with_logits)
    jax.eval_shape(run, *arguments)
    with pytest.raises(NotImplementedError, match=f"decode_attention: .*{reason}"):
        jax.eval_shape(functools.partial(run, implementation="mosaic_tpu"), *arguments)
