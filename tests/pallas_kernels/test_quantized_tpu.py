"""Kernels for TPU over rows in 8 and 4 bits, against float64 loops over their numbers.

Scales of what must not be read are NaN, and codes as large as they can be.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import quantiser
from jax.experimental.pallas import tpu as pltpu
from listed_pages import IDS

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import tuning as decode_tuning
from pallas_kernels.page_attention import Surrogate, page_attention
from pallas_kernels.page_attention import tuning as page_tuning
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Format, Layout, Quantized

# Relative error of a row, at most three times the largest seen. Codes are exact, and
# weights alone are rounded to bfloat16, once they are multiplied by scales.
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3}
NAN = 0x7FC0  # of bfloat16
RACES = pltpu.InterpretParams(
    dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two pages, or of 128 slots."""

    def lookup(device_kind, dtype, head_dim, page_size):
        return page_tuning.Config(2 * page_size, 3)

    monkeypatch.setattr(page_tuning, "lookup", lookup)
    config = decode_tuning.Config(128, 3)
    monkeypatch.setattr(decode_tuning, "lookup", lambda *_: config)


def fmt(bits, size=128, group=32, turned=True):
    return Format(size, bits, size if bits == 8 else group, turned)


def draw(shape, seed=0):
    """Rows with a channel that stands out, and none around 0."""
    rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    rows[..., 3] *= 8
    return jnp.asarray(rows + 0.5)


@functools.partial(jax.jit, static_argnums=(1, 2))
def stored(rows, parts, dtype):
    return quantized.encode(Layout(parts, dtype), rows)


@jax.jit
def numbers(rows):
    """What is stored, turned where it is, in float32, which holds all of it."""
    parts = rows.layout.parts
    return quantized.numbers(rows._replace(layout=Layout(parts, "float32")))


def poisoned(rows, is_read):
    """The rows with a mask `rows.shape[:-1]` of what may be read."""
    return Quantized(
        jnp.where(is_read[..., None], rows.codes, np.uint8(0xFF)),
        jnp.where(is_read[..., None], rows.scales, np.uint16(NAN)),
        rows.layout,
    )


def turned(q, part):
    """Queries as they meet keys: rounded to their dtype, as they are for any code."""
    layout = Layout((part,), q.dtype)
    like = Quantized(jnp.zeros((1, 1), jnp.uint8), jnp.zeros((1, 1), "uint16"), layout)
    return np.asarray(quantized.turned(like, q).astype(jnp.float32))


def turned_back(out, part):
    size = out.shape[-1]
    return out @ quantiser.hadamard(size) if part.turned else out


def assert_close(actual, expected, dtype):
    out, lse = (np.asarray(x, np.float64) for x in actual[:2])
    size = np.linalg.norm(expected[0], axis=-1)
    error = np.linalg.norm(out - expected[0], axis=-1) / np.where(size == 0, 1, size)
    assert error.max() < TOLERANCE[dtype], error.max()
    tolerance = 1e-5 if dtype == "float32" else TOLERANCE[dtype]
    np.testing.assert_allclose(lse, expected[1], rtol=1e-6, atol=tolerance)
    return error


# --- listed pages


def pages_problem(
    keys, *, ids=IDS, positions=None, rows=1, heads=(4, 2), page_size=32, seed=0
):
    """Pages of which the first row sees six, and a seventh in part; the second one."""
    if positions is None:
        positions = [6 * page_size + 9, page_size + 9]
    size, ids = keys.size, np.asarray(ids, np.int32)
    positions = np.asarray(positions, np.int32).reshape(len(ids), rows)
    shape = len(ids), heads[1], 9, page_size
    both = jnp.concatenate([draw((*shape, size), seed + i) for i in range(2)], -1)
    q = draw((len(ids), heads[0], rows, size), 2) / 2
    return q, both, jnp.asarray(ids), jnp.asarray(positions)


def check_pages(
    keys, values, problem, dtype="float32", mask=None, interpret=True, **options
):
    q, both, ids, positions = problem
    q = q.astype(dtype)
    pages = stored(both, (keys, values), dtype)
    is_read = np.zeros(pages.shape[:4], bool)
    per_head = ids.shape[1] // pages.shape[1]
    for b, h, i in np.ndindex(ids.shape):
        if ids[b, h, i] >= 0 and (mask is None or mask[b, h, i].any()):
            is_read[b, h // per_head, ids[b, h, i]] = True
    token = np.arange(is_read[0, 0].size).reshape(is_read.shape[2:])
    last = np.asarray(positions).max(1)[:, None, None, None]
    run = functools.partial(
        page_attention,
        sm_scale=0.1,
        implementation="mosaic_tpu",
        interpret=interpret,
        **{k: v for k, v in options.items() if k != "initial"},
    )
    held = poisoned(pages, jnp.asarray(is_read & (token <= last)))
    more = (jnp.asarray(mask),) if mask is not None else (None,)
    found = jax.jit(run)(q, held, ids, positions, *more, options.get("initial"))
    initial = options.pop("initial", None)
    if initial is not None:  # turned, as what is added to it
        initial = turned_back(np.asarray(initial[0], float), values), initial[1]
    expected = oracles.page_attention(
        turned(q, keys),
        np.asarray(numbers(pages), float),
        np.asarray(ids),
        np.asarray(positions),
        mask,
        sm_scale=0.1,
        initial=initial,
        **options,
    )
    expected = turned_back(expected[0], values), expected[1]
    assert_close(found, expected, dtype)


@pytest.mark.parametrize(
    ("keys", "values", "page_size", "dtype"),
    [
        (fmt(8), fmt(8, turned=False), 32, "float32"),
        (fmt(4, group=64), fmt(4, turned=False), 128, "float32"),
        (fmt(8, 64), fmt(8, 64), 96, "bfloat16"),
        (fmt(8), fmt(4), 128, "bfloat16"),
    ],
    ids=["int8", "int4", "D64", "K8V4"],
)
def test_pages_of_every_format(keys, values, page_size, dtype):
    """Pages past a row's position are listed and not read; one list is empty."""
    problem = pages_problem(keys, page_size=page_size)
    check_pages(keys, values, problem, dtype)


def test_masks_rows_and_other_tokens():
    """A list a query head; T rows, one of which sees nothing; the first tokens hidden.

    What other tokens gave comes back as it was, though values are turned.
    """
    keys, values = fmt(4), fmt(4)
    ids = [[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]]
    problem = pages_problem(keys, ids=ids, positions=[[-1, 40, 100]], rows=3)
    mask = np.random.default_rng(5).random((1, 4, 4, 3)) < 0.8
    initial, _ = oracles.beside(problem)
    check_pages(keys, values, problem, mask=mask, initial=initial, first_position=21)


def test_copies_of_pages_do_not_race():
    """Copies as late as they may be, into memory that holds NaN; races are an error."""
    keys, values = fmt(4), fmt(4)
    problem = pages_problem(keys)
    check_pages(keys, values, problem, "bfloat16", interpret=RACES)


# --- a contiguous cache


def check_slots(
    keys,
    values,
    *,
    positions,
    dtype="float32",
    slots=384,
    heads=(4, 2),
    held=None,
    interpret=True,
    with_logits=False,
    **options,
):
    positions = np.asarray(positions, np.int32)
    shape = len(positions), heads[1], slots, keys.size
    k, v = (
        stored(draw(shape, i), (part,), dtype) for i, part in enumerate((keys, values))
    )
    q = (draw((len(positions), heads[0], positions.shape[1], keys.size), 2) / 2).astype(
        dtype
    )
    slot = np.arange(slots)
    is_read = np.ones((len(positions), slots), bool)
    if held is None:
        is_read = slot <= positions.max(1, keepdims=True)
        if options.get("window") is not None:
            first = np.maximum(positions.min(1) - options["window"] + 1, 0)
            is_read &= slot >= first[:, None] // 128 * 128
    is_read = jnp.asarray(np.broadcast_to(is_read[:, None], shape[:3]))
    run = functools.partial(
        decode_attention,
        sm_scale=0.1,
        implementation="mosaic_tpu",
        interpret=interpret,
        with_logits=with_logits,
        **options,
    )
    given = None if held is None else jnp.asarray(held, jnp.int32)
    out, lse, *logits = jax.jit(run)(
        q, poisoned(k, is_read), poisoned(v, is_read), jnp.asarray(positions), given
    )
    expected, expected_lse, expected_logits = oracles.decode_attention(
        turned(q, keys),
        *(np.asarray(numbers(x), float) for x in (k, v)),
        positions,
        slot[None, None] if held is None else held,
        0.1,
        **options,
    )
    expected = turned_back(expected, values), expected_lse
    error = assert_close((out, lse), expected, dtype)
    assert len(logits) == with_logits
    for found in logits:
        np.testing.assert_allclose(found, expected_logits, atol=1e-5)
    return error


@pytest.mark.parametrize(
    ("keys", "values", "dtype"),
    [
        (fmt(8), fmt(4, group=128), "float32"),
        (fmt(4), fmt(4, group=64, turned=False), "bfloat16"),
        (fmt(8, 64), fmt(4, 64), "float32"),
        (fmt(8, 64, turned=False), fmt(8, 64, turned=False), "bfloat16"),
    ],
    ids=["K8V4", "int4", "D64-K8V4", "D64-int8"],
)
def test_slots_of_every_format(keys, values, dtype):
    """None is seen; the last of a block, the first of the next, the last of all."""
    check_slots(keys, values, positions=[[-1], [127], [128], [383]], dtype=dtype)


def test_slots_with_rows_a_window_and_logits():
    options = {"window": 130, "soft_cap": 3.0, "with_logits": True}
    check_slots(fmt(4), fmt(8), positions=[[-1, 140, 150], [360, 370, 383]], **options)


def test_slots_that_hold_positions_of_their_own():
    held = np.stack([np.random.default_rng(i).permutation(384) - 8 for i in range(4)])
    held = np.maximum(held.reshape(2, 2, 384), -1)
    check_slots(fmt(4), fmt(4), positions=[[200], [310]], held=held, window=250)


def test_rounded_weights_err_as_with_floats():
    """Of 4 bits too, whose numbers are small differences of large ones.

    Offsets that were taken off by weights as they were before they were rounded to meet
    codes would err by 1e-3 in the mean.
    """
    values = fmt(4, turned=False)
    error = check_slots(fmt(8), values, positions=[[383], [250]], dtype="bfloat16")
    assert error.mean() < 7e-4


def test_copies_of_slots_do_not_race():
    check_slots(
        fmt(8), fmt(4), positions=[[140], [383]], dtype="bfloat16", interpret=RACES
    )


# --- what cannot be


def abstract(shape, parts, dtype="float32"):
    rows = jnp.zeros((*shape, sum(part.size for part in parts)))
    return jax.eval_shape(lambda: quantized.encode(Layout(parts, dtype), rows))


@pytest.mark.parametrize(
    ("keys", "slots", "rows", "reason"),
    [
        (fmt(8), 200, 1, "200 slots of quantised rows must be a multiple of 128"),
        (fmt(8), 256, 65, "130 query rows a quantised KV head must be at most 128"),
        (fmt(4), 256, 33, "66 query rows, 288 with one for each of 4 groups"),
        (fmt(8, 80), 256, 1, "80 bytes of codes a row must be a multiple of 32"),
    ],
    ids=["slots", "rows", "groups", "width"],
)
def test_what_the_kernel_of_slots_cannot(keys, slots, rows, reason):
    k = abstract((1, 2, slots), (keys,))
    q = jnp.zeros((1, 4, rows, keys.size))
    at = jnp.zeros((1, rows), jnp.int32)
    run = functools.partial(decode_attention, sm_scale=1.0)
    jax.eval_shape(run, q, k, k, at)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(run, implementation="mosaic_tpu"), q, k, k, at)


@pytest.mark.parametrize(
    ("parts", "page_size", "rows", "has_surrogate", "reason"),
    [
        ((fmt(8), fmt(8)), 16, 1, False, "P=16 .* must be a multiple of 32"),
        ((fmt(8), fmt(4)), 64, 1, False, "192 bytes of codes a row .* not P=64"),
        ((fmt(4, 384),) * 2, 32, 1, False, "D=384 in rows of 384 bytes must be a mult"),
        ((fmt(4), fmt(8)), 128, 33, False, "66 query rows, 288 with one for each of"),
        ((fmt(8), fmt(8)), 128, 1, True, "surrogate needs the numbers of keys"),
    ],
    ids=["pages", "width", "D", "groups", "surrogate"],
)
def test_what_the_kernel_of_pages_cannot(parts, page_size, rows, has_surrogate, reason):
    size = parts[0].size
    pages = abstract((1, 2, 9, page_size), parts)
    q, ids = jnp.zeros((1, 4, rows, size)), jnp.zeros((1, 2, 3), jnp.int32)
    surrogate = None
    if has_surrogate:
        surrogate = Surrogate(
            jnp.zeros((1, 2, 3, size)), jnp.zeros((1, 2, 3)), jnp.zeros((1, 4, 1, 3))
        )
    at = jnp.zeros((1, rows), jnp.int32)
    arguments = q, pages, ids, at, None, None, surrogate
    run = functools.partial(page_attention, sm_scale=1.0)
    jax.eval_shape(run, *arguments)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(run, implementation="mosaic_tpu"), *arguments)
