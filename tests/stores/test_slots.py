"""Buffers: what is written lands where it should, and nothing else changes."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.interface import CacheSpec
from kvjax.rope import Rope
from kvjax.stores import buffers, contiguous


def _loop_write(buffer, rows, slots, valid):
    buffer = buffer.copy()
    batch, heads, size = rows.shape[:3]
    for b in range(batch):
        for h in range(heads):
            for t in range(size):
                where = (b, t) if slots.ndim == 2 else (b, h, t)
                if valid[where] and 0 <= slots[where] < buffer.shape[2]:
                    buffer[b, h, slots[where]] = rows[b, h, t]
    return buffer


@pytest.mark.parametrize("per_head", [False, True])
def test_write_drops_what_does_not_fit(per_head):
    """Slots before, at and past the end, and rows that are not valid."""
    rng = np.random.default_rng(0)
    buffer = rng.standard_normal((2, 3, 7, 4)).astype(np.float32)
    rows = rng.standard_normal((2, 3, 5, 4)).astype(np.float32)
    slots = np.array([[6, 7, -1, 2, 100], [0, 1, -7, 8, 5]], np.int32)
    valid = np.array([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], bool)
    if per_head:
        shift = np.arange(3, dtype=np.int32)[None, :, None]
        slots = (slots[:, None] + shift).astype(np.int32)
        valid = np.broadcast_to(valid[:, None], slots.shape)
    arguments = [jnp.asarray(x) for x in (buffer, rows, slots, valid)]
    written = jax.jit(buffers.write)(*arguments)
    np.testing.assert_array_equal(written, _loop_write(buffer, rows, slots, valid))


def test_gather_reads_each_heads_own_slots():
    rng = np.random.default_rng(1)
    buffer = rng.standard_normal((2, 3, 7, 4)).astype(np.float32)
    slots = rng.integers(0, 7, (2, 3, 5)).astype(np.int32)
    slots[0, 0, 0] = -1
    expected = np.array(
        [[buffer[b, h, np.maximum(slots[b, h], 0)] for h in range(3)] for b in range(2)]
    )
    read = buffers.gather(jnp.asarray(buffer), jnp.asarray(slots))
    np.testing.assert_array_equal(read, expected)


def test_new_buffers_are_poisoned_in_tests():
    assert (np.asarray(buffers.allocate((2, 3), "float32")) > 1e29).all()
    assert (np.asarray(buffers.allocate((3,), "int32")) == 0).all()
    assert (np.asarray(buffers.allocate((3,), "float32", fill=2.0)) == 2.0).all()


def test_extend_past_the_end_is_dropped_not_clamped():
    stream = drive.make_stream((6,), 1, heads=(2, 1))
    spec = drive.make_spec(stream, capacity=4)
    q, k, v, lengths = drive.chunk(stream, [0], [6], size=6)
    del q
    store = contiguous.extend(contiguous.contiguous(spec), k, v, lengths)
    np.testing.assert_array_equal(store.v, v[:, :, :4])


def test_kv_bytes_counts_keys_and_values_of_all_rows_and_heads():
    spec = CacheSpec(3, 8, 2, 16, 100, "bfloat16", Rope(16))
    assert buffers.kv_bytes(spec, 10) == 2 * 3 * 2 * 10 * 16 * 2
    assert buffers.num_bytes({"a": jnp.zeros((3, 4), jnp.bfloat16)}) == 24


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", 0, r"CacheSpec.batch=0 must be at least 1"),
        ("num_q_heads", 3, r"num_q_heads=3 must be a multiple of num_kv_heads=2"),
        ("max_new_tokens", 101, r"max_new_tokens=101 must be in \[0, capacity=100\]"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(field, value, message):
    sizes = {"batch": 1, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    fields = {"capacity": 100, "dtype": "float32", "rope": Rope(8), "max_new_tokens": 0}
    with pytest.raises(ValueError, match=message):
        CacheSpec(**(sizes | fields | {field: value}))


@pytest.mark.parametrize("update", ["set", "min", "max"])
@pytest.mark.parametrize("size", [1, 3, 7], ids="T{}".format)
def test_a_run_is_written_token_by_token_and_never_clamped(size, update):
    """All forms, row by row (CPU) and scatters, against a loop; also past the end."""
    slots, starts = 5, np.array([0, 1, 3, 4, 5, 9], np.int32)
    rng = np.random.default_rng(size)
    counts = np.array([size, max(size - 1, 0), size, size, size, size], np.int32)
    buffer = rng.normal(size=(6, 2, slots, 3)).astype(np.float32)
    rows = rng.normal(size=(6, 2, size, 3)).astype(np.float32)
    combine = {"set": lambda old, new: new, "min": np.minimum, "max": np.maximum}
    expected = buffer.copy()
    for b in range(6):
        for t in range(counts[b]):
            if (slot := starts[b] + t) < slots:
                old, new = expected[b, :, slot], rows[b, :, t]
                expected[b, :, slot] = combine[update](old, new)
    arrays = [jnp.asarray(x) for x in (buffer, rows, starts, counts)]
    by_row = buffers.write_run(*arrays, update)
    run = starts[:, None] + np.arange(size, dtype=np.int32)
    valid = np.arange(size) < counts[:, None]
    np.testing.assert_array_equal(by_row, expected)
    for scatter in (buffers._scatter, buffers._scatters):
        scattered = scatter(*arrays[:2], jnp.asarray(run), jnp.asarray(valid), update)
        np.testing.assert_array_equal(scattered, expected)
