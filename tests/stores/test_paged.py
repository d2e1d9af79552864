"""Pages: tokens written anew, by the path of this CPU and by that of other devices."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kvjax.methods import quantize
from kvjax.methods.full import full
from kvjax.stores import buffers, paged
from pallas_kernels.shared import quantized


def test_writing_by_page_is_writing_by_token(monkeypatch):
    """A prompt, more of it, and a token behind two that get new keys."""
    stream = drive.make_stream((6, 20), 3, head_dim=4)
    spec = drive.make_spec(stream)

    def run(prompt, chunk, rows):
        store = paged.extend(paged.paged(spec, 4), *prompt)
        store = paged.extend(store, *chunk)
        return paged.revise(store, *rows, jnp.array([3, 2], jnp.int32))

    def inputs(start, lengths, size):
        return drive.chunk(stream, start, lengths, size=size)[1:]

    _, k, v = drive.step_inputs(stream, rows=3)
    arguments = (
        inputs((0, 0), (4, 18), 18),
        inputs((4, 18), (2, 2), 2),
        (k[2], v[2]),
    )
    by_token = jax.jit(run)(*arguments)
    monkeypatch.setattr(
        lax, "platform_dependent", lambda *given, cpu, default: default(*given)
    )
    by_page = jax.jit(lambda *given: run(*given))(*arguments)
    for one, other in zip(by_token, by_page, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    keys = paged.views(by_page)[1]
    for b, (length, past) in enumerate(((6, 2), (20, 1))):
        end = length + 1
        np.testing.assert_array_equal(by_page.length[b], end)
        # The last rows of the step, over what was there.
        rows = np.asarray(v[2])[b, :, -past - 1 :]
        np.testing.assert_array_equal(keys[b, :, end - past - 1 : end], rows)
        before = stream.v[b, :, : end - past - 1]
        np.testing.assert_array_equal(keys[b, :, : end - past - 1], before)


def test_a_store_without_extremes_is_the_same_but_for_them():
    """Written, revised and taken back; and it holds less by two vectors a page."""
    stream = drive.make_stream((6, 17), 3, head_dim=4)
    spec = drive.make_spec(stream)
    _, k, v = drive.step_inputs(stream, rows=3)
    prompt = drive.chunk(stream, (0, 0), (6, 17), size=17)[1:]

    def run(extremes):
        store = paged.extend(paged.paged(spec, 4, extremes=extremes), *prompt)
        store = paged.revise(store, k[2], v[2], jnp.array([3, 2], jnp.int32))
        return paged.rewind(store, jnp.array([2, 0], jnp.int32), 2)

    with_them, without = jax.jit(run, static_argnums=0), jax.jit(run, static_argnums=0)
    with_them, without = with_them(True), without(False)
    assert without.page_min is without.page_max is None
    np.testing.assert_array_equal(with_them.pages, without.pages)
    np.testing.assert_array_equal(with_them.length, without.length)
    less = buffers.num_bytes(with_them) - buffers.num_bytes(without)
    assert less == buffers.vector_bytes(spec, 2 * with_them.page_min.shape[2])


@pytest.mark.parametrize(("run", "elsewhere"), [(1, False), (4, False), (2, True)])
def test_keys_are_read_from_any_token_of_a_page(run, elsewhere, monkeypatch):
    """By lists of KV heads and of query heads; of quantised pages, as they are read.

    And as other devices read them.
    """
    if elsewhere:
        monkeypatch.setattr(
            lax, "platform_dependent", lambda *given, cpu, default: default(*given)
        )
    stream = drive.make_stream((20, 20), 1)
    spec = drive.make_spec(stream)
    prompt = drive.chunk(stream, (0, 0), (20, 20), size=20)[1:]
    plain = paged.extend(paged.paged(spec, 4, extremes=False), *prompt)
    storage = quantize.quantize(full(), bits=8).init.args[0].storage(spec.head_dim)
    parts = storage.parts("both")
    packed = quantized.encode(quantized.Layout(parts, spec.dtype), plain.pages)
    rng = np.random.default_rng(run)
    starts = 4 * rng.integers(0, 5, (2, 4, 7)) + rng.integers(0, 5 - run, (2, 4, 7))
    for pages in (plain.pages, packed):
        store = plain._replace(pages=pages)
        keys = np.asarray(paged.views(store._replace(pages=quantized.floats(pages)))[0])
        for heads in (2, 4):
            given = jnp.asarray(starts[:, :heads], jnp.int32)
            found = np.asarray(paged.keys_from(store, given, run))
            for b, h, i in np.ndindex(2, heads, 7):
                start = starts[b, h, i]
                wanted = keys[b, h * 2 // heads, start : start + run]
                np.testing.assert_array_equal(found[b, h, i], wanted)


@pytest.mark.parametrize(("dtype", "tile"), [(np.uint8, 32), (np.uint16, 128)])
def test_rows_in_whole_tiles_are_written_alone(dtype, tile):
    """Over the end of a tile and of a page; what has no page, and the rest, stays."""
    rng = np.random.default_rng(0)
    size = 2 * tile  # of a page
    pages = rng.integers(0, 256, (2, 2, 3, size, 5)).astype(dtype)
    rows = rng.integers(0, 256, (2, 2, 3, 5)).astype(dtype)
    positions = np.array([[tile], [2 * size]]) + np.arange(-1, 2)
    page = np.where([[True] * 3, [True, True, False]], positions // size, 3)
    expected = pages.copy()
    for b, t in np.ndindex(page.shape):
        if page[b, t] < 3:
            expected[b, :, page[b, t], positions[b, t] % size] = rows[b, :, t]
    written = buffers.write_in_tiles(
        jnp.asarray(pages),
        jnp.asarray(rows),
        jnp.asarray(page, jnp.int32),
        jnp.asarray(positions % size, jnp.int32),
        tile,
    )
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize(
    ("dtype", "page", "width", "tile"),
    [
        (jnp.uint8, 64, 256, 32),
        (jnp.uint8, 32, 128, 32),
        (jnp.uint8, 16, 256, None),
        (jnp.uint8, 128, 192, 128),
        (jnp.uint8, 64, 192, None),
        (jnp.uint16, 256, 2, 128),
        (jnp.uint16, 64, 2, None),
        (jnp.bfloat16, 128, 256, None),
    ],
)
def test_tiles_of_a_tpu(dtype, page, width, tile):
    """32 rows of bytes, 128 where rows lie as columns; pages that are whole tiles."""
    assert buffers.tile_of(page, width, dtype) == tile


@pytest.mark.parametrize("start", [[127, 128], [0, 255], [5, 256]])
@pytest.mark.parametrize("count", [[1, 1], [0, 1]])
def test_scales_in_slots_are_written_in_tiles_as_one_by_one(start, count, monkeypatch):
    """On a TPU as here; what lies past the end, or is none, is written nowhere."""
    rng = np.random.default_rng(0)
    slots, rows = (
        jnp.asarray(rng.integers(0, 1 << 16, (2, 3, size, 1)), buffers.SCALES)
        for size in (256, 1)
    )
    where = jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32)
    expected = buffers.write_run(slots, rows, *where)
    is_written = np.asarray(expected != slots).any((1, 2, 3))
    assert is_written.tolist() == [
        c and s < 256 for c, s in zip(count, start, strict=True)
    ]
    monkeypatch.setattr(
        lax, "platform_dependent", lambda *given, cpu, default, tpu: tpu(*given)
    )
    found = buffers.write_run(slots, rows, *where)
    np.testing.assert_array_equal(found, expected)
