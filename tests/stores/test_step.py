"""The parts that methods share: a prompt read in chunks, and what a step says."""

import drive
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.rope import Rope
from kvjax.stores import buffers, contiguous, paged, step

PROMPTS = (1, 4, 11)
CHUNKS = [(1, 3, 5), (0, 1, 0), (0, 0, 6)]


@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_a_prompt_in_chunks_is_attended_to_in_full(kind):
    stream = drive.make_stream(PROMPTS, 0)
    spec = drive.make_spec(stream, capacity=12)
    state = contiguous.contiguous(spec) if kind == "slots" else paged.paged(spec, 4)
    outs = [[] for _ in PROMPTS]
    for lengths, inputs in zip(
        CHUNKS, drive.prompt_inputs(stream, CHUNKS), strict=True
    ):
        state, out = step.prefill(state, *inputs)
        for row, count, part in zip(outs, lengths, np.asarray(out), strict=True):
            row.append(part[:, :count])
    assert state.length.tolist() == list(PROMPTS)
    for b, row in enumerate(outs):
        expected = oracles.full(stream.row(b)).out.swapaxes(0, 1)
        drive.assert_rows_close(np.concatenate(row, axis=1), expected)


def test_the_newest_rows_lie_in_a_ring():
    """Chunks of any lengths, longer than the ring too: as one row at a time."""
    size, rows = 3, np.arange(20.0, dtype=np.float32)
    ring = jnp.full((2, 1, size, 1), -1.0)
    length = np.zeros(2, np.int32)
    for counts in ((2, 0), (1, 5), (4, 1), (0, 2)):
        positions = length[:, None] + np.arange(6, dtype=np.int32)
        length = length + np.array(counts, np.int32)
        ring = buffers.write_newest(
            ring,
            jnp.asarray(rows[positions][:, None, :, None]),
            jnp.asarray(positions),
            jnp.asarray(length),
        )
        held = np.asarray(buffers.newest_positions(jnp.asarray(length), size))
        for b, end in enumerate(length):
            newest = sorted(range(max(0, end - size), end))
            assert sorted(p for p in held[b] if p >= 0) == newest
            for slot, position in enumerate(held[b]):
                expected = rows[position] if position >= 0 else -1.0
                assert ring[b, 0, slot, 0] == expected


def test_a_step_is_exact_where_it_lists_every_token():
    length = jnp.array([3, 5], jnp.int32)
    attended = jnp.array([[[0, 1, 2]] * 2, [[2, 3, 4], [-1, 3, 4]]], jnp.int32)
    lse = jnp.zeros((2, 4, 1))
    diagnostics = step.diagnose(attended, lse, length)
    assert diagnostics.exact.tolist() == [[True] * 4, [False] * 4]
    assert diagnostics.refreshed.tolist() == [True, False]
    # Rotated anew by frequencies that have changed, all tokens are not enough.
    rope = Rope(8, theta=100.0, kind="dynamic", factor=4.0, original_context=2)
    spec = drive.make_spec(drive.make_stream((3, 5), 0), rope=rope)
    later = step.diagnose(attended, lse, length, spec)
    assert not later.exact.any()
    assert later.refreshed.tolist() == [True, False]
