"""Rows in 8 and 4 bits: against a quantiser of NumPy's, and operations that read them.

What an operation makes of quantised rows is what it makes of their numbers.
"""

import functools

import jax
import jax.numpy as jnp
import listed_pages
import ml_dtypes
import numpy as np
import pytest
import quantiser
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decode_attention import (
    decode_attention,
    decode_logits,
    weighted_values,
)
from pallas_kernels.entmax import entmax_attention
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.received_attention import received_attention
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Format, Layout, Quantized, WithNewest

INT8 = functools.partial(Format, bits=8)


def fmt(size, bits, turned=False, group=None):
    return Format(size, bits, size if bits == 8 else group or min(32, size), turned)


def empty(*parts, dtype="float32"):
    """A buffer of one row."""
    codes, scales = sum(p.codes for p in parts), quantized.room_for_scales(parts)
    return Quantized(
        jnp.zeros((1, codes), jnp.uint8),
        jnp.zeros((1, scales), jnp.uint16),
        Layout(parts, dtype),
    )


def store(rows, *parts):
    return _store(empty(*parts, dtype=rows.dtype), jnp.asarray(rows))


_store = jax.jit(quantized.stored)
floats = jax.jit(quantized.floats)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- numbers


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16), (4, 64)])
def test_rows_are_those_of_another_quantiser(bits, group, turned):
    """And with that not only close: code by code, as scales are the same bits."""
    rows = draw((3, 50, 64)) * np.geomspace(1e-3, 1e3, 50)[:, None].astype(np.float32)
    rows[..., 5] *= 30  # one channel that stands out
    part = fmt(64, bits, turned, group)
    read = np.asarray(floats(store(rows, part)))
    expected = quantiser.read_again(rows, bits, part.group, turned)
    largest = np.abs(expected).max(-1, keepdims=True)
    np.testing.assert_allclose(read / largest, expected / largest, atol=2e-6)


def test_a_row_of_keys_and_values_is_both():
    keys, values = draw((4, 64)), draw((4, 64), 1)
    parts = fmt(64, 8), fmt(64, 4, turned=True)
    both = store(np.concatenate([keys, values], -1), *parts)
    assert both.shape == (4, 128)
    assert both.codes.shape == (4, 64 + 32)
    # Five scales in room for eight, which a TPU has not to lay out anew.
    assert both.scales.shape == (4, 8)
    assert not np.asarray(both.scales)[:, 1 + 4 :].any()
    halves = quantized.split(both)
    for half, rows, part in zip(halves, (keys, values), parts, strict=True):
        alone = floats(store(rows, part))
        np.testing.assert_array_equal(floats(half), alone)
    whole = jnp.concatenate([floats(half) for half in halves], -1)
    np.testing.assert_array_equal(floats(both), whole)


@pytest.mark.parametrize("size", [64, 80, 96, 6, 7])
def test_the_transform_is_orthonormal_and_its_own_inverse(size):
    matrix = quantized.hadamard(size).astype(float)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)


def test_an_outlier_costs_a_turned_row_less():
    """What rotation is for: of one huge channel, others keep little else."""
    rows = draw((200, 64))
    rows[:, 7] = 60
    error = {}
    for turned in (False, True):
        read = np.asarray(floats(store(rows, fmt(64, 4, turned, 64))))
        error[turned] = np.linalg.norm((read - rows)[:, :7])
    assert error[True] < 0.5 * error[False]


row = st.lists(
    st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)
    | st.sampled_from([0.0, 1e-45, 1.0, 3e38]),
    min_size=16,
    max_size=16,
)


@settings(deadline=None, database=None, derandomize=True)
@given(row, st.sampled_from([8, 4]), st.booleans())
def test_any_row_is_read_near_what_it_was(numbers, bits, turned):
    """Zeros, equal numbers, outliers, the largest floats: no NaN, and no infinity."""
    rows = np.asarray([numbers, [numbers[0]] * 16, [0.0] * 16], np.float32)
    part = fmt(16, bits, turned, 16)
    read = np.asarray(floats(store(rows, part)), float)
    assert np.isfinite(read).all()
    np.testing.assert_array_equal(read[2], 0.0)
    kept = np.clip(rows.astype(float), -quantized.LARGEST, quantized.LARGEST)
    turn = quantiser.hadamard(16) if turned else np.eye(16)
    stored = kept @ turn
    span = np.abs(stored).max(-1) / 127
    if bits == 4:  # an offset is rounded by up to 2**-7, and so is a scale
        low, high = stored.min(-1), stored.max(-1)
        span = (high - low + np.abs(low) * 2**-7) / 15
    step = span[:, None] * (1 + 2**-7)
    gap = np.abs(read @ turn - stored)
    rounding = 1e-5 * np.abs(stored).max(-1, keepdims=True) + 2e-37
    assert (gap <= 0.5005 * step + rounding).all()


def extremes(dtype):
    """Rows of 128: zeros, equal numbers, the largest of both signs, one outlier."""
    most = float(jnp.finfo(dtype).max)
    signs = np.where(np.random.default_rng(0).random(128) < 0.5, -1.0, 1.0)
    rows = np.stack([signs * 0, signs * 0 + 5.3, signs * most, signs, signs * 0 - most])
    rows[3, 40] = -most
    return jnp.asarray(rows, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("part", [fmt(128, 8), fmt(128, 4), fmt(128, 4, True, 128)])
def test_the_largest_numbers_of_a_dtype_are_read_as_finite(part, dtype):
    """Within half a step of what is kept of them; zeros are zeros."""
    rows = extremes(dtype)
    read = np.asarray(floats(store(rows, part)), np.float64)
    assert np.isfinite(read).all()
    np.testing.assert_array_equal(read[0], 0)
    most = min(float(jnp.finfo(dtype).max), quantized.LARGEST)
    kept = np.clip(np.asarray(rows, np.float64), -most, most)
    unit = np.abs(kept).max(1)
    steps = {8: 1 / 254, 4: 1 / 15}[part.bits] * (1 + 2**-6) + 2**-8
    gap = np.abs(read - kept).max(1)
    if not part.turned:
        assert (gap <= steps * unit).all()
    elif dtype != "float16":  # which has no room for what a transform adds up
        assert (np.linalg.norm(read - kept, axis=1) <= 2 * unit).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_to_rows_of_zeros_and_extremes(bits):
    """A scale of 0 is a number as any: what is seen is averaged, and never NaN."""
    part, most = fmt(64, bits), 1e30
    rows = np.zeros((1, 1, 600, 64), np.float32)
    k, values = rows.copy(), rows.copy()
    values[..., 300:, :] = most
    arrays = store(k, part), store(values, part), jnp.full((1, 2), 599, jnp.int32)
    q = jnp.full((1, 2, 2, 64), 1e30, jnp.float32)
    out, lse = jax.jit(lambda q, *x: decode_attention(q, *x, sm_scale=1.0))(q, *arrays)
    np.testing.assert_allclose(out, most / 2, rtol=2e-2)
    np.testing.assert_allclose(lse, np.log(600), rtol=1e-6)


def test_what_bfloat16_holds_is_what_is_stored():
    """Numbers are read in the cache's dtype, and rounded to it before."""
    rows = draw((9, 64))
    rounded = rows.astype(ml_dtypes.bfloat16)
    part = fmt(64, 8)
    one = store(rounded, part)
    assert floats(one).dtype == jnp.bfloat16
    wide = store(rounded.astype(np.float32), part)
    np.testing.assert_array_equal(one.codes, wide.codes)


@pytest.mark.parametrize(
    "part", [fmt(64, 8), fmt(64, 4, group=16), fmt(64, 4, group=64), fmt(96, 4)]
)
def test_products_with_codes_are_those_with_numbers(part):
    """Of a group that is in both halves of the bytes too; and of a row of zeros."""
    rows = draw((40, part.size)) * np.geomspace(1e-2, 1e2, 40)[:, None]
    rows[7] = 0
    kept = store(rows.astype(np.float32), part)
    read = np.asarray(floats(kept), np.float64)
    q, weights = draw((3, part.size), 1), draw((3, 40), 2)
    for found, a, b in (
        (jax.jit(quantized.times_keys)(q, kept), q, read.T),
        (jax.jit(quantized.weighted_sum)(weights, kept), weights, read),
    ):
        scale = np.abs(a) @ np.abs(b)
        assert (np.abs(found - a @ b) <= 2e-6 * scale).all()


# --- operations

FORMATS = {
    "int8": (fmt(64, 8), fmt(64, 8)),
    "K8V4": (fmt(64, 8, turned=True), fmt(64, 4, turned=True)),
    "int4": (fmt(64, 4, turned=True), fmt(64, 4, turned=True)),
}


def same(operation, kept, numbers):
    once = jax.jit(operation)
    found, expected = once(*kept), once(*numbers)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def cache(parts, slots, seed=0):
    """Keys and values of two heads, stored and as they are read."""
    rows = draw((2, 2, 2, slots, 64), seed)
    kept = [store(x, part) for x, part in zip(rows, parts, strict=True)]
    return kept, [floats(x) for x in kept]


@pytest.mark.parametrize(
    ("name", "rows", "slots"),
    [("int8", 1, 1100), ("K8V4", 40, 1100), ("int4", 3, 1100), ("K8V4", 1, 100)],
)
def test_attention_reads_what_is_stored(name, rows, slots):
    """One block and several, whole and cut; few rows and many; with logits too."""
    q = jnp.asarray(draw((2, 4, rows, 64), 2))
    at = jnp.asarray([[slots - 1], [slots // 2]]) - jnp.arange(rows)[::-1]
    kept, numbers = cache(FORMATS[name], slots)
    for options in ({}, {"with_logits": True}, {"window": 30, "soft_cap": 5.0}):
        attend = functools.partial(decode_attention, q, sm_scale=0.3, **options)
        same(
            lambda k, v, attend=attend: attend(k, v, at.astype(jnp.int32)),
            kept,
            numbers,
        )
    held = np.random.default_rng(3).integers(-1, slots, (2, 2, slots))
    held = jnp.asarray(held, jnp.int32)
    at = at.astype(jnp.int32)
    same(lambda k, v: decode_attention(q, k, v, at, held, sm_scale=0.3), kept, numbers)
    same(lambda k, v: decode_logits(q, k, at, held, sm_scale=0.3), kept, numbers)


@pytest.mark.parametrize(("name", "slots"), [("K8V4", 1100), ("int4", 100)])
def test_other_sums_over_a_cache_read_what_is_stored(name, slots):
    q = jnp.asarray(draw((2, 4, 3, 64), 2))
    at = jnp.full((2, 3), slots - 1, jnp.int32)
    kept, numbers = cache(FORMATS[name], slots)
    lse = jnp.asarray(draw((2, 4, 3), 4)) + 5
    weights = jax.nn.softmax(jnp.asarray(draw((2, 2, 6, slots), 5)))
    same(lambda k, v: weighted_values(weights, v), kept, numbers)
    same(
        lambda k, v: entmax_attention(q, k, v, at, alpha=1.5, sm_scale=0.3),
        kept,
        numbers,
    )
    same(lambda k, v: received_attention(q, k, lse, at, sm_scale=0.3), kept, numbers)


@pytest.mark.parametrize(("name", "lists"), [("K8V4", 2), ("int4", 4)])
def test_listed_pages_read_what_is_stored(name, lists):
    ids = np.asarray(listed_pages.IDS)
    ids = ids.repeat(lists // 2, axis=1)
    q, pages, ids, at = listed_pages.draw(head_dim=64, ids=ids, positions=[140, 77])
    kept = store(np.asarray(pages), *FORMATS[name])
    numbers = floats(kept)
    same(lambda x: page_attention(q, x, ids, at, sm_scale=0.3), [kept], [numbers])
    same(
        lambda x: page_entmax(q, x, ids, at, sm_scale=0.3, alpha=1.5), [kept], [numbers]
    )


def test_a_kernel_that_takes_arrays_alone_is_not_asked():
    kept, _ = cache(FORMATS["int8"], 128)
    q, at = jnp.zeros((2, 4, 1, 64)), jnp.zeros((2, 1), jnp.int32)
    run = functools.partial(received_attention, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu .* are quantised"):
        run(q, kept[0], jnp.zeros((2, 4, 1)), at, sm_scale=1.0)


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_no_copy_of_the_cache_in_floats(name, with_logits):
    """Blocks are read one at a time: logits and positions alone grow with the cache."""
    heads, sizes = 4, (16_384, 65_536)
    attend = functools.partial(decode_attention, sm_scale=0.3, with_logits=with_logits)

    def held(slots):
        def abstract(part):
            shape = 1, heads, slots
            return Quantized(
                jax.ShapeDtypeStruct((*shape, part.codes), jnp.uint8),
                jax.ShapeDtypeStruct((*shape, part.scales), jnp.uint16),
                Layout((part,), "float32"),
            )

        arrays = (
            jax.ShapeDtypeStruct((1, heads, 1, 64), jnp.float32),
            *map(abstract, FORMATS[name]),
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
        )
        program = jax.jit(attend).lower(*arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = map(held, sizes)
    more = 4 * (sizes[1] - sizes[0])
    assert many - few <= more * (1 + 3 * heads * with_logits)


# --- the newest tokens beside what is stored

RESIDUAL = 4


def beside(kept, came, last):
    """Stored rows, and beside them those of tokens up to `last (B,)` as they came."""
    size = RESIDUAL + quantized.SPARE
    at = last[:, None] - (last[:, None] - np.arange(size)) % size
    newest = np.take_along_axis(came, np.maximum(at, 0)[:, None, :, None], axis=2)
    at = jnp.asarray(np.maximum(at, -1), jnp.int32)
    return WithNewest(kept, jnp.asarray(newest), at)


def is_new(position, query, last):
    """Whether a query there reads that token as it came."""
    first = max(query - RESIDUAL, last - RESIDUAL - quantized.SPARE)
    return (position > first) & (position <= query)


def problem(slots=60, last=(41, 3)):
    """Keys and values as they came and as they are read; a query far behind, and one
    of no token."""
    last = np.asarray(last)
    came = draw((2, 2, 2, slots, 64))
    kept = [store(x, p) for x, p in zip(came, FORMATS["K8V4"], strict=True)]
    at = np.maximum(last[:, None] - np.asarray([25, 5, 1, 0]), -1)
    read = [np.asarray(floats(x)) for x in kept]
    rows = [beside(x, y, last) for x, y in zip(kept, came, strict=True)]
    return draw((2, 4, 4, 64), 2), rows, came, read, at, last


@functools.partial(jax.jit, static_argnames="kernel")
def read_newest(q, rows, positions, held, kernel):
    attend = functools.partial(
        decode_attention,
        *(q, *rows, positions, held),
        sm_scale=0.3,
        soft_cap=9.0,
        implementation=kernel,
        interpret=kernel is not None,
    )
    logits = decode_logits(q, rows[0], positions, held, sm_scale=0.3)
    attended = attend(with_logits=True)
    return attended, attend() if kernel is None else attended[:2], logits


@pytest.mark.parametrize(
    ("by_slots", "slots", "kernel"),
    [(False, 60, None), (True, 60, None), (True, 128, "mosaic_tpu")],
)
def test_a_query_reads_the_newest_up_to_it_as_they_came(by_slots, slots, kernel):
    """Tokens in any slots, in some heads not all of them; the logits beside."""
    q, rows, came, read, at, last = problem(slots)
    where = np.broadcast_to(np.arange(slots), (2, 2, slots))
    held = None
    if by_slots:
        rng = np.random.default_rng(6)
        where = np.stack([[rng.permutation(slots) for _ in range(2)] for _ in range(2)])
        where[:, 1, ::3] = -1
        held = jnp.asarray(where, jnp.int32)

        def moved(x):
            index = jnp.asarray(np.maximum(where, 0))[..., None]
            return jnp.take_along_axis(x, index, axis=2)

        rows = [x._replace(rows=jax.tree.map(moved, x.rows)) for x in rows]
    positions = jnp.asarray(at, jnp.int32)
    q = jnp.asarray(q)
    found = read_newest(q, rows, positions, held, kernel)
    q, ((out, lse, logits), plain, uncapped) = jax.tree.map(np.asarray, (q, found))
    for one, other in zip(plain, (out, lse), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for b, h, t in np.ndindex(2, 4, 4):
        tokens, query = where[b, h // 2], at[b, t]
        seen = (tokens >= 0) & (tokens <= query)
        new = is_new(tokens, query, last[b])[:, None]
        index = np.maximum(tokens, 0)
        keys, values = (
            np.where(new, x[b, h // 2, index], y[b, h // 2, index]).astype(float)
            for x, y in zip(came, read, strict=True)
        )
        wanted = 0.3 * keys @ q[b, h, t].astype(float)
        np.testing.assert_allclose(uncapped[b, h, t][seen], wanted[seen], atol=2e-5)
        assert np.isneginf(uncapped[b, h, t][~seen]).all()
        wanted = 9 * np.tanh(wanted / 9)
        np.testing.assert_allclose(logits[b, h, t][seen], wanted[seen], atol=2e-5)
        assert np.isneginf(logits[b, h, t][~seen]).all()
        weights = np.where(seen, np.exp(wanted), 0)
        total = weights.sum()
        expected = weights @ values / max(total, 1e-300)
        np.testing.assert_allclose(out[b, h, t], expected, atol=2e-5)
        with np.errstate(divide="ignore"):  # a query that sees nothing
            np.testing.assert_allclose(lse[b, h, t], np.log(total), atol=2e-5)


def pages_problem(lists, size=8, last=(41, 3)):
    """Lists that lack three pages, and one of them the newest; behind other tokens."""
    q, _, came, read, at, last = problem(8 * size, last)
    rng = np.random.default_rng(8)
    both = np.concatenate(came, -1)
    kept = store(both, *FORMATS["K8V4"])
    by_page = jax.tree.map(lambda x: x.reshape(2, 2, 8, size, -1), kept)
    pages = beside(by_page, both, last)
    ids = np.stack([[rng.permutation(8) for _ in range(lists)] for _ in range(2)])
    ids = np.where(
        ids == (last // size)[:, None, None], ids, np.where(ids < 3, -1, ids)
    )
    ids[0, 1] = np.where(ids[0, 1] == last[0] // size, -1, ids[0, 1])
    mask = rng.random((*ids.shape, 4)) < 0.7
    initial = draw((2, 4, 4, 64), 9), draw((2, 4, 4), 10)
    arrays = q, pages, ids.astype(np.int32), at.astype(np.int32), mask, initial
    return jax.tree.map(jnp.asarray, arrays), came, read, last


@pytest.mark.parametrize(
    ("lists", "size", "last", "kernel"),
    [
        (2, 8, (41, 3), None),
        (4, 8, (41, 3), None),
        (2, 128, (655, 3), "mosaic_tpu"),
    ],
)
def test_listed_pages_read_the_newest_up_to_a_query(lists, size, last, kernel):
    """Of the pages that its list has and its mask lets through, behind other tokens."""
    arrays, came, read, last = pages_problem(lists, size, last)
    q, _, ids, at, mask, initial = jax.tree.map(np.asarray, arrays)
    named = {"implementation": kernel, "interpret": kernel is not None}
    attend = functools.partial(page_attention, sm_scale=0.3, first_position=3, **named)
    out, lse = jax.jit(attend)(*arrays)
    for b, h, t in np.ndindex(2, 4, 4):
        query, which = at[b, t], h * lists // 4
        seen = mask[b, which, :, t] & (ids[b, which] >= 0)
        listed = set(ids[b, which][seen].tolist())
        tokens = np.asarray(
            [p for p in range(3, query + 1) if p // size in listed], int
        )
        new = is_new(tokens, query, last[b])[:, None]
        keys, values = (
            np.where(new, x[b, h // 2, tokens], y[b, h // 2, tokens]).astype(float)
            for x, y in zip(came, read, strict=True)
        )
        weights = np.exp(0.3 * keys @ q[b, h, t].astype(float))
        before = np.exp(float(initial[1][b, h, t]))
        total = weights.sum() + before
        expected = (weights @ values + before * initial[0][b, h, t]) / total
        np.testing.assert_allclose(out[b, h, t], expected, atol=2e-5)
        np.testing.assert_allclose(lse[b, h, t], np.log(total), atol=2e-5)


def test_what_does_not_take_two_parts_says_so():
    q, rows, _, _, at, _ = problem()
    arrays = jnp.asarray(q), *rows, jnp.asarray(at, jnp.int32)
    with pytest.raises(NotImplementedError, match="window=8 over rows with the newest"):
        decode_attention(*arrays, sm_scale=1.0, window=8)
    with pytest.raises(TypeError, match="read in two parts"):
        quantized.floats(rows[0])


def test_a_kernel_asked_for_by_name_reads_what_is_stored():
    q, rows, _, _, at, _ = problem()
    named = {"sm_scale": 1.0, "implementation": "mosaic_tpu"}
    attend, over_pages = (
        functools.partial(jax.eval_shape, functools.partial(f, **named))
        for f in (decode_attention, page_attention)
    )
    with pytest.raises(NotImplementedError, match="60 slots of quantised rows"):
        attend(jnp.asarray(q), *rows, jnp.asarray(at, jnp.int32))
    arrays, *_ = pages_problem(2)
    with pytest.raises(NotImplementedError, match="P=8 of quantised pages"):
        over_pages(*arrays)
