"""RefreshKV with its full cache in the host's memory: full steps stream it."""

import functools

import drive
import jax
import numpy as np
import pytest
from aot import layer, tpu
from moved import kinds
from tiny import TEXT, tiny_model

import kvjax
from kvjax import accounting, registry
from kvjax.methods.offload import offload
from kvjax.methods.refreshkv import refreshkv
from kvjax.methods.refreshkv import streamed as streamed_module
from kvjax.stores.counting import total
from kvjax.testing import check_method, subject

STREAM = drive.make_stream((1, 7, 40, 29), 14, heads=(4, 2), head_dim=8)
SPEC = drive.make_spec(STREAM, layer=7)
CAPACITY, BUDGET, ROW = 55, 8, 2 * 8 * 4  # of all heads of a token, bytes
SPECS = [
    "refreshkv",
    "refreshkv:schedule=fixed,stride=3",
    "refreshkv:schedule=fixed,stride=3,full_attend=false",
    "refreshkv:schedule=fixed,stride=2,refresh=false",
    "refreshkv:stride=2,threshold=0.2,qc_batch=any,self_mode=snapkv",
    "refreshkv:schedule=never",
    "quantize:bits=8+refreshkv:schedule=fixed,stride=3",
    "quantize:bits=4,prompt=quantized+refreshkv:schedule=fixed,stride=3",
]


def parsed(spec):
    return registry.parse(spec, **subject.SMALL)


def both(method, chunks=None, made=SPEC):
    return [drive.run(one, made, STREAM, chunks) for one in (offload(method), method)]


@pytest.mark.parametrize("spec", SPECS)
def test_is_the_method_bit_for_bit(spec):
    """Outputs, lists and proofs; and the small cache behind the last step.

    Of 4 bits XLA puts scales into other places of a full step's products: to rounding.
    """
    run, expected = both(parsed(spec), [(1, 7, 15, 4), (0, 0, 25, 25)])
    for ours, theirs in zip(
        jax.tree.leaves((run.prompt_out, run.out, run.diagnostics)),
        jax.tree.leaves((expected.prompt_out, expected.out, expected.diagnostics)),
        strict=True,
    ):
        if "bits=4" in spec and np.issubdtype(theirs.dtype, np.floating):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-6)
        else:
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(run.state.positions, expected.state.positions)
    assert kinds((run.state.store.k.host, run.state.store.v.host))["device"] == 0
    is_full = expected.diagnostics.refreshed.any()
    assert is_full == ("never" not in spec)


@pytest.mark.parametrize(
    ("spec", "dtype", "together"),
    [
        ("refreshkv:schedule=fixed,stride=3", "bfloat16", 2),
        ("quantize:bits=8+refreshkv:schedule=fixed,stride=3", "float32", 4),
    ],
)
def test_tokens_that_share_words_move_together(spec, dtype, together):
    """Chosen ones come with their neighbours, and are the method's all the same."""
    made = drive.make_spec(STREAM, 56, dtype, layer=7)
    run, expected = both(parsed(spec), made=made)
    np.testing.assert_array_equal(run.out, expected.out)
    np.testing.assert_array_equal(
        run.diagnostics.attended, expected.diagnostics.attended
    )
    for rows, ring, theirs in (
        (run.state.store.k, run.state.k, expected.state.k),
        (run.state.store.v, run.state.v, expected.state.v),
    ):
        assert rows.page_size == together
        moved = 4 * (56 + BUDGET * together)
        assert (total(rows.moved) == moved).all()
        is_held = expected.state.positions >= 0
        for a, b in zip(jax.tree.leaves(ring), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[is_held], b[is_held])


@pytest.mark.parametrize(
    ("options", "of_keys", "of_values"),
    [
        ("full_attend=true,kernel=7", 1, 1),
        ("full_attend=false,self_mode=snapkv,kernel=5", 1, 0),
        # The mean of weights needs their sums first: keys come twice.
        ("group_reduce=mean,self_mode=drop", 2, 1),
    ],
)
def test_several_blocks_are_one_cache(options, of_keys, of_values, monkeypatch):
    """To rounding, with the same tokens chosen; a last chunk of 55 - 52."""
    spec = f"refreshkv:schedule=fixed,stride=2,{options}"
    method = parsed(spec)
    monkeypatch.setattr(streamed_module, "BLOCK", 2)
    monkeypatch.setattr(streamed_module, "CHUNK", 4)
    run, expected = both(method)
    np.testing.assert_allclose(run.out, expected.out, rtol=2e-5, atol=2e-6)
    for name in ("attended", "refreshed", "exact"):
        np.testing.assert_array_equal(
            getattr(run.diagnostics, name), getattr(expected.diagnostics, name)
        )
    # Every other step is full. The longest row has 42, 44, ... 54 tokens then, that end
    # with a chunk of 4 or within it, and come in blocks of 2; then those that it chose.
    tokens = sum(range(42, 55, 2))
    for rows, times in ((run.state.store.k, of_keys), (run.state.store.v, of_values)):
        assert rows.unit == ROW
        assert (total(rows.moved) == times * tokens + 7 * BUDGET).all()
        np.testing.assert_array_equal(rows.asked, rows.moved)


def test_steps_in_between_move_nothing():
    """Not a number in the whole of the host changes no small step, and shows in a
    full one."""
    method = offload(parsed("refreshkv:schedule=fixed,stride=3"))
    state, _ = drive.prefill(method, SPEC, STREAM)
    state = jax.jit(method.finish)(state)
    step = jax.jit(functools.partial(drive.step, method))
    inputs = list(zip(*drive.step_inputs(STREAM), strict=True))

    def spoiled(rows):
        host = np.full(rows.shape, np.nan, np.float32)
        place = jax.device_put(host, rows.host.rows.sharding)
        return rows._replace(host=rows.host._replace(rows=place))

    store = state.store._replace(k=spoiled(state.store.k), v=spoiled(state.store.v))
    other = state._replace(store=store)
    for index, is_full in enumerate([False, False, True]):
        state, (out, _) = step(state, inputs[index])
        other, (found, _) = step(other, inputs[index])
        moved = total(state.store.k.moved)
        if is_full:
            assert not np.isfinite(found).all()
            assert (moved == CAPACITY + BUDGET).all()
        else:
            np.testing.assert_array_equal(out, found)
            assert not moved.any()


def test_the_host_has_every_token():
    """As it came: values; and keys as they are without it."""
    run, expected = both(parsed("refreshkv"))
    for b, prompt in enumerate(STREAM.prompts):
        end = prompt + STREAM.steps
        for ours, theirs in (
            (run.state.store.v.host.rows, STREAM.v),
            (run.state.store.k.host.rows, expected.state.store.k),
        ):
            np.testing.assert_array_equal(ours[b, :, :end], theirs[b, :, :end])


# --- bytes


def test_the_device_holds_no_more_for_a_longer_text():
    method = offload(parsed("refreshkv"))
    found = []
    for capacity in (256, 512):
        made = drive.make_spec(STREAM, capacity=capacity, layer=7)
        ((_, held),) = accounting.held(method, [made])
        assert held.host == 4 * capacity * 2 * ROW
        found.append(held.device)
    assert found[0] == found[1]


def test_bytes_over_the_link_are_those_of_full_steps_at_their_share():
    """40 tokens of four rows, and the 8 that are chosen, every third step."""
    link = {
        options: offload(parsed(f"refreshkv:stride=3{options}")).traffic(SPEC, 40).link
        for options in (
            "",
            ",full_attend=false",
            ",refresh=false",
            ",schedule=never",
            ",group_reduce=mean",
        )
    }
    keys, chosen = 4 * 40 * ROW, 4 * BUDGET * 2 * ROW
    assert link == {
        "": (2 * keys + chosen) // 3,
        ",full_attend=false": (keys + chosen) // 3,
        ",refresh=false": 2 * keys // 3,
        ",schedule=never": 0,
        ",group_reduce=mean": (3 * keys + chosen) // 3,
    }
    assert offload(parsed("refreshkv"), memory="device").traffic(SPEC, 40).link == 0


def test_a_tpu_holds_no_more_for_a_longer_text():
    """By its compiler's counts at 32K and 1M: nothing grows with it, on the device."""
    pytest.importorskip("libtpu", reason=tpu.REASON)
    method, arguments, temporaries = offload(refreshkv(budget=2048)), [], []
    for context in (1 << 15, 1 << 20):
        memory = layer.memory_of_step(method, context)
        assert memory.host_alias_size_in_bytes == 2 * 8 * context * 128 * 2
        assert memory.host_temp_size_in_bytes == 0
        arguments.append(memory.argument_size_in_bytes)
        temporaries.append(memory.temp_size_in_bytes)
    assert arguments[0] == arguments[1]
    # Logits of 32 heads in float32 would be 128 bytes a token.
    assert temporaries[0] == temporaries[1] < 16_000_000


# --- a model, and the contract


def test_a_model_generates_the_same():
    texts, inner = [TEXT[:400], TEXT[:90]], "refreshkv:budget=32,stride=3,threshold=1"
    ours, theirs = (
        kvjax.generate(tiny_model(), spec, texts, max_new_tokens=24, chunk_size=128)
        for spec in (f"offload+{inner}", inner)
    )
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]


def offloaded_refreshkv(*, budget: int = 8, stride: int = 4, kernel: int = 3):
    made = refreshkv(budget=budget, stride=stride, kernel=kernel, schedule="fixed")
    return offload(made, memory="device")


def test_keeps_the_contract():
    checked = check_method(offloaded_refreshkv)
    assert "a_step_writes_in_place" in checked
    assert "rows_do_not_see_each_other" in checked
