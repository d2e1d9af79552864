"""Pages: tokens written anew, by the path of this CPU and by that of other devices."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kvjax.stores import buffers, paged


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
