"""Rows in the host's memory: what is written, and attention to what comes back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import layer, tpu

from kvjax import accounting
from kvjax.methods.offload import offload
from kvjax.methods.quest import quest
from kvjax.methods.token_select import token_select
from kvjax.stores import hosted
from pallas_kernels.decode_attention import decode_attention, streamed_attention
from pallas_kernels.decode_attention.reference import BLOCK
from pallas_kernels.shared import quantized


def buffer(page_size, tokens, width=6, heads=2, batch=3, seed=0):
    """Random rows in pages, or in slots where a page is one token."""
    rng = np.random.default_rng(seed)
    shape = (batch, heads, tokens, width)
    if page_size > 1:
        shape = (batch, heads, tokens // page_size, page_size, width)
    return rng.standard_normal(shape).astype(np.float32)


def by_token(rows):
    return np.asarray(rows).reshape(*rows.shape[:2], -1, rows.shape[-1])


@pytest.mark.parametrize("memory", ["pinned_host", "device"])
@pytest.mark.parametrize("page_size", [1, 4, 12])
@pytest.mark.parametrize("size", [1, 5, 30])
def test_writes_rows_and_nothing_beside_them(memory, page_size, size):
    """At odd places, fewer than there are, and up to the end and past it."""
    before = buffer(page_size, 48)
    fresh = buffer(1, size, seed=1)
    for start in ([0, 3, 47], [12, 11, 40]):
        for count in ([size, 0, 1], [0, size, size]):
            args = [jnp.asarray(x, jnp.int32) for x in (start, count)]
            made = jax.jit(hosted.write)(
                hosted.place(jnp.asarray(before), memory), fresh, *args
            )
            assert made.rows.sharding.memory_kind == memory
            expected = by_token(before).copy()
            for b in range(3):
                end = min(start[b] + count[b], 48)
                expected[b, :, start[b] : end] = fresh[b, :, : end - start[b]]
            np.testing.assert_array_equal(by_token(made.rows), expected)


@pytest.mark.parametrize(("tokens", "together"), [(48, 2), (47, 1)])
def test_tokens_that_share_words_are_written_together(tokens, together):
    """Two of bfloat16: what lies beside them comes and goes as it was."""
    before, fresh = buffer(1, tokens), buffer(1, 3, seed=1)
    narrow = jnp.asarray(before, "bfloat16")
    away = hosted.place(narrow, "pinned_host")
    assert hosted.page_size_of(away) == together
    start = jnp.asarray([0, 5, tokens - 2], jnp.int32)
    count = jnp.asarray([3, 1, 3], jnp.int32)
    made = jax.jit(hosted.write)(away, jnp.asarray(fresh, "bfloat16"), start, count)
    expected = np.asarray(narrow, np.float32)
    fresh = np.asarray(jnp.asarray(fresh, "bfloat16"), np.float32)
    expected[0, :, :3], expected[1, :, 5] = fresh[0], fresh[1, :, 0]
    expected[2, :, tokens - 2 :] = fresh[2, :, :2]
    np.testing.assert_array_equal(np.asarray(made.rows, np.float32), expected)


@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_blocks_are_the_tokens_of_their_slots(page_size):
    """Whole blocks, and what is left behind the last."""
    rows = buffer(page_size, 1200, heads=1, batch=2)
    away = hosted.place(jnp.asarray(rows), "pinned_host")
    take = jax.jit(hosted.block, static_argnums=2)
    for start, size in [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 1200 - 2 * BLOCK)]:
        for source in (away, jnp.asarray(rows)):
            found = take(source, jnp.int32(start), size)
            assert found.sharding.memory_kind == "device"
            np.testing.assert_array_equal(
                found, by_token(rows)[:, :, start : start + size]
            )


# --- attention to blocks


def case(slots, rows, *, heads=(4, 2), head_dim=8, bits=None, seed=0):
    """Queries at the end of a text of two rows, keys and values, and positions."""
    rng = np.random.default_rng(seed)

    def draw(heads, tokens, scale=1.0):
        x = scale * rng.standard_normal((2, heads, tokens, head_dim))
        return jnp.asarray(x, jnp.float32)

    q, k, v = draw(heads[0], rows, 2.0), draw(heads[1], slots), draw(heads[1], slots)
    if bits is not None:
        part = quantized.Format(head_dim, bits, head_dim, bits == 4)
        layout = quantized.Layout((part,), jnp.dtype("float32"))
        k, v = quantized.encode(layout, k), quantized.encode(layout, v)
    end = np.array([slots - 3, slots // 2 + 1])
    positions = jnp.asarray(end[:, None] - rows + np.arange(rows), jnp.int32)
    return q, k, v, positions


def streamed(q, k, v, positions, where=("pinned_host", "pinned_host")):
    k, v = (
        x if memory is None else hosted.place(x, memory)
        for x, memory in zip((k, v), where, strict=True)
    )
    attend = jax.jit(functools.partial(hosted.attend, sm_scale=0.3))
    return attend(q, k, v, positions)


def in_float64(q, k, v, positions):
    """Attention of each row to the keys up to its own position, one by one."""
    q, k, v = (np.asarray(quantized.floats(x), np.float64) for x in (q, k, v))
    outs = np.zeros(q.shape)
    for b, h, t in np.ndindex(*q.shape[:3]):
        end, kv = int(positions[b, t]) + 1, h // (q.shape[1] // k.shape[1])
        logits = 0.3 * k[b, kv, :end] @ q[b, h, t]
        weights = np.exp(logits - logits.max())
        outs[b, h, t] = weights @ v[b, kv, :end] / weights.sum()
    return outs


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("where", [("pinned_host",) * 2, (None, "pinned_host")])
@pytest.mark.parametrize(("slots", "rows"), [(300, 7), (1300, 40), (2048, 300)])
def test_is_attention_to_the_whole_bit_for_bit(slots, rows, where, bits):
    """Where that goes by blocks too; with keys on the device also."""
    inputs = case(slots, rows, bits=bits)
    expected = jax.jit(functools.partial(decode_attention, sm_scale=0.3))(*inputs)
    found = streamed(*inputs, where=where)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    if slots < 2048:
        gap = np.abs(np.asarray(found[0]) - in_float64(*inputs))
        assert gap.max() < 3e-6


def test_few_rows_are_attended_for_to_rounding():
    q, k, v, positions = case(1500, 3)
    out, lse = streamed(q, k, v, positions)
    _, whole = decode_attention(q, k, v, positions, sm_scale=0.3)
    assert np.abs(np.asarray(out) - in_float64(q, k, v, positions)).max() < 2e-6
    np.testing.assert_allclose(lse, whole, rtol=1e-6)


def test_blocks_behind_the_last_query_do_not_come():
    """What is not a number there shows nowhere."""
    q, k, v, positions = case(4 * BLOCK, 40)
    early = positions - positions.max() + 2 * BLOCK - 1
    early = jnp.maximum(early, 0)
    expected = streamed(q, k, v, early)
    k, v = (x.at[:, :, 2 * BLOCK :].set(jnp.nan) for x in (k, v))
    for ours, theirs in zip(streamed(q, k, v, early), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # One token later the third block is needed.
    assert not np.isfinite(streamed(q, k, v, early + 1)[0]).all()


def test_blocks_come_once_whatever_the_rows():
    """Traced once for whole blocks and once for the rest, however many tiles."""
    q, k, v, positions = case(1300, 900)
    sizes = []

    def take(start, size):
        sizes.append(size)
        return hosted.block(k, start, size), hosted.block(v, start, size)

    jax.make_jaxpr(lambda: streamed_attention(q, take, 1300, positions, sm_scale=0.3))()
    assert sizes == [BLOCK, BLOCK, 1300 - 2 * BLOCK]  # the first for shapes alone


# --- a chunk of a prompt


def test_a_tpu_never_holds_the_prompt():
    """By its compiler's counts at 32K and 1M tokens: two vectors a page, no more."""
    pytest.importorskip("libtpu", reason=tpu.REASON)
    method = offload(quest(budget=2048), cache=2048)
    for context in (1 << 15, 1 << 20):
        memory = layer.memory_of_chunk(method, context, 1024)
        held = accounting.held(method, [layer.spec(context)])[0][0]
        assert held.host == 2 * 8 * context * 128 * 2
        assert memory.host_argument_size_in_bytes == held.host
        assert memory.host_alias_size_in_bytes == held.host
        assert memory.host_temp_size_in_bytes == 0
        summaries = 2 * 8 * context // 16 * 128 * 2
        assert held.device == summaries + 4
        chunk = (32 + 2 * 8) * 1024 * 128 * 2
        assert memory.argument_size_in_bytes < summaries + chunk + 4096
        # Extremes of pages are copied to be written; of keys and values, 134 MB and
        # 4.3 GB, nothing is.
        assert memory.temp_size_in_bytes < summaries / 2 + 16_000_000


def test_a_tpu_holds_keys_alone_of_a_prompt_whose_values_are_away():
    pytest.importorskip("libtpu", reason=tpu.REASON)
    method = offload(token_select(budget=2048), cache=2048)
    for context in (1 << 15, 1 << 17):
        memory = layer.memory_of_chunk(method, context, 1024)
        held = accounting.held(method, [layer.spec(context)])[0][0]
        assert held.host == 8 * context * 128 * 2
        assert memory.host_alias_size_in_bytes == held.host
        assert memory.host_temp_size_in_bytes == 0
        keys = 8 * context * 128 * 2
        assert held.device < keys + 20_000
        # A chunk is written to a copy of the keys, in float32: as without it.
        assert memory.temp_size_in_bytes < 2 * keys + 10_000_000
