"""Pages in the host's memory: the method without them, bit for bit, and what moves."""

import functools
import itertools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import layer, tpu
from moved import Cache, kinds
from tiny import TEXT, tiny_model

import kvjax
from kvjax import accounting, registry
from kvjax.methods.offload import offload
from kvjax.methods.quest import quest
from kvjax.stores import buffers
from kvjax.stores.counting import total
from kvjax.testing import subject

PAGE, BUDGET, CACHE = 4, 8, 12
STREAM = drive.make_stream((1, 7, 40, 29), 14, heads=(4, 2), head_dim=8)
SPEC = drive.make_spec(STREAM, layer=7)
QUEST = quest(budget=BUDGET, page_size=PAGE)
SLOTS = BUDGET // PAGE + CACHE // PAGE
PAGE_BYTES = PAGE * 2 * 8 * 4


def parsed(spec):
    return registry.parse(spec, **subject.SMALL)


@pytest.mark.parametrize(
    ("spec", "alpha"),
    [
        ("quest", 1.0),
        ("quest:budget=16,per=query,recent=2", 1.0),
        ("refresh:stride=3+quest", 1.0),
        ("quantize:bits=4+quest", 1.0),
        ("quantize:values=4,prompt=quantized+quest", 1.0),
        ("entmaxkv:selector=gaussian,per=query,budget=16", 1.5),
    ],
)
def test_is_the_method_bit_for_bit(spec, alpha):
    """Outputs, lists and proofs; pages fill, and are evicted and read again."""
    made = drive.make_spec(STREAM, layer=7, alpha=alpha)
    method = parsed(spec)
    chunks = [(1, 7, 15, 4), (0, 0, 25, 25)]  # one ends, and begins, within a page
    run, expected = (
        drive.run(one, made, STREAM, chunks)
        for one in (offload(method, cache=PAGE), method)
    )
    for ours, theirs in zip(
        jax.tree.leaves((run.prompt_out, run.out, run.diagnostics)),
        jax.tree.leaves((expected.prompt_out, expected.out, expected.diagnostics)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    pages = getattr(run.state, "store", run.state).pages
    assert (total(pages.moved)[2:] > 4).all()
    assert (total(pages.moved) < total(pages.asked)).any()
    assert kinds(pages.host)["device"] == 0


# --- what moves, by a cache in plain Python


@functools.cache
def stepped():
    """The state behind every step, and the pages that each listed."""
    method = offload(QUEST, cache=CACHE)
    state, _ = drive.prefill(method, SPEC, STREAM)
    state = jax.jit(method.finish)(state)
    step = jax.jit(functools.partial(drive.step, method))
    states, listed = [state], []
    for inputs in zip(*drive.step_inputs(STREAM), strict=True):
        state, (_, diagnostics) = step(state, inputs)
        states.append(state)
        attended = np.asarray(diagnostics.attended)
        listed.append(attended.reshape(*attended.shape[:2], -1, PAGE).max(-1) // PAGE)
    return states, listed


def test_the_pages_that_move_are_those_of_a_cache_in_python():
    """Slot by slot, each row and head at every step; the newest page is free."""
    states, listed = stepped()
    for b, prompt in enumerate(STREAM.prompts):
        caches = [Cache(SLOTS) for _ in range(2)]
        for step, state in enumerate(states[1:]):
            length = prompt + step + 1
            newest = (length - 1) // PAGE
            for head, cache in enumerate(caches):
                pages = [int(p) for p in listed[step][b, head]]
                cache.ask([p for p in pages if p not in (-1, newest)], length)
                np.testing.assert_array_equal(state.pages.held[b, head], cache.held)
                np.testing.assert_array_equal(state.pages.used[b, head], cache.used)
            for count, name in (
                (state.pages.asked, "asked"),
                (state.pages.moved, "moved"),
            ):
                assert total(count)[b] == sum(getattr(x, name) for x in caches)


def test_slots_hold_the_pages_that_they_say():
    """Full ones as the host has them; the newest is in the last slot."""
    states, _ = stepped()
    whole = drive.run(QUEST, SPEC, STREAM).state.pages
    pages = states[-1].pages
    for b, prompt in enumerate(STREAM.prompts):
        length = prompt + STREAM.steps
        full, rest = divmod(length, PAGE)
        np.testing.assert_array_equal(
            pages.host.rows[b, :, :full], whole[b, :, :full], err_msg=f"row {b}"
        )
        np.testing.assert_array_equal(
            pages.slots[b, :, -1, :rest], whole[b, :, full, :rest]
        )
        for head, slot in np.ndindex(2, SLOTS):
            page = int(pages.held[b, head, slot])
            if page >= 0:
                np.testing.assert_array_equal(
                    pages.slots[b, head, slot], whole[b, head, page]
                )


def test_a_page_that_is_not_missing_is_not_read_again():
    """Other numbers in the host under a page that the device holds change nothing."""
    states, _ = stepped()
    method = offload(QUEST, cache=CACHE)
    before, after = states[-2], states[-1]
    host = np.array(before.pages.host.rows)
    for b, head, page in np.ndindex(*host.shape[:3]):
        if page in before.pages.held[b, head]:
            host[b, head, page] = np.nan
    rows = jax.device_put(host, before.pages.host.rows.sharding)
    spoiled = before._replace(
        pages=before.pages._replace(host=before.pages.host._replace(rows=rows))
    )
    inputs = [x[-1] for x in drive.step_inputs(STREAM)]
    step = jax.jit(functools.partial(drive.step, method))
    state, (out, _) = step(spoiled, inputs)
    np.testing.assert_array_equal(out, step(before, inputs)[1][0])
    np.testing.assert_array_equal(state.pages.held, after.pages.held)


# --- bytes


def test_the_device_holds_no_more_for_a_longer_text():
    """But for summaries: the host has the pages."""
    method, found = offload(QUEST, cache=CACHE), []
    for capacity in (256, 512):
        made = drive.make_spec(STREAM, capacity=capacity, layer=7)
        state = jax.jit(lambda s=made: method.finish(method.init(s)))()
        assert state.pages.host.rows.sharding.memory_kind == "pinned_host"
        assert accounting.state_bytes(method, made) == sum(kinds(state).values())
        ((_, held),) = accounting.held(method, [made])
        assert held._asdict() == {
            "device": kinds(state)["device"],
            "host": kinds(state)["pinned_host"],
        }
        found.append(kinds(state))
    rows, added = 4 * 2, 256 // PAGE
    assert found[1]["pinned_host"] - found[0]["pinned_host"] == rows * added * (
        PAGE_BYTES
    )
    assert found[1]["device"] - found[0]["device"] == rows * added * 2 * 8 * 4


def test_bytes_over_the_link_are_at_most_those_read():
    traffic = offload(QUEST).traffic(SPEC, 40)
    listed = BUDGET // PAGE * SPEC.num_kv_heads * SPEC.batch * PAGE_BYTES
    assert traffic == QUEST.traffic(SPEC, 40)._replace(link=listed)
    states, _ = stepped()
    for before, after in itertools.pairwise(states):
        moved = (total(after.pages.moved) - total(before.pages.moved)).sum()
        assert moved * PAGE_BYTES <= traffic.link


def test_a_tpu_holds_no_more_for_a_longer_text():
    """By its compiler's counts at 32K and 1M: two vectors a page, and nothing else."""
    pytest.importorskip("libtpu", reason=tpu.REASON)
    method, found = offload(quest(budget=2048), cache=2048), {}
    for context in (1 << 15, 1 << 20):
        memory = layer.memory_of_step(method, context)
        pages = 2 * 8 * context * 128 * 2
        assert memory.host_argument_size_in_bytes == pages
        assert memory.host_alias_size_in_bytes == pages
        assert memory.host_temp_size_in_bytes == 0
        assert accounting.held(method, [layer.spec(context)])[0][1].host == pages
        summaries = 2 * 8 * context // 16 * 128 * 2
        found[context] = (
            memory.argument_size_in_bytes - summaries,
            memory.temp_size_in_bytes,
        )
    small, large = found.values()
    assert small == large
    slots = 8 * (128 + 128 + 1) * 16 * 256 * 2
    assert small[0] < slots + 100_000
    assert small[1] < 4_000_000  # a copy of the slots would be 17 MB


# --- a model, and refusals


def test_a_model_generates_the_same():
    """In real memories, from the prompt's first chunk to the last step."""
    texts, inner = [TEXT[:400], TEXT[:90]], "quest:budget=32,page_size=8"
    ours, theirs = (
        kvjax.generate(
            tiny_model(),
            f"dense_layers:first=1+{spec}",
            texts,
            max_new_tokens=24,
            chunk_size=128,
        )
        for spec in (f"offload:cache=16+{inner}", inner)
    )
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]


def test_what_cannot_be_offloaded_is_refused(unchecked_shapes):
    for spec in (
        "full",
        "h2o",
        "retro+quest",
        "entmaxkv:certified=true",
        "offload+quest",
        "dense_layers+quest",
        "quantize:residual=4+quest",
    ):
        with pytest.raises(ValueError, match=r"and Method\('.*'\) evicts, reads m"):
            offload(parsed(spec))
    for spec in ("retro+offload+quest", "refresh+offload+quest"):
        with pytest.raises(ValueError, match="wrap quest itself"):
            parsed(spec)
    with pytest.raises(ValueError, match=r"put quantize inside: .offload\+quantize"):
        parsed("quantize+offload+quest").init(SPEC)
    with pytest.raises(ValueError, match="cache=-1 must be at least 0 tokens"):
        offload(QUEST, cache=-1)
    with pytest.raises(ValueError, match="memory='gpu' must be one of pinned_host"):
        offload(QUEST, memory="gpu")


def test_the_cache_is_no_larger_than_the_text():
    method = offload(QUEST, cache=10_000)
    made = drive.make_spec(STREAM, capacity=54, layer=7)
    state = jax.eval_shape(lambda: method.finish(method.init(made)))
    assert state.pages.slots.shape[2] == 14 + 1
    held = buffers.num_bytes(state.pages.host)
    assert held == 4 * 2 * 14 * PAGE_BYTES
    assert state.pages.dtype == jnp.float32
