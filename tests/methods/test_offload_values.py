"""Values in the host's memory, of methods that look at every key: what moves."""

import functools
import itertools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moved import Cache, kinds
from tiny import TEXT, tiny_model

import kvjax
from kvjax import accounting, registry
from kvjax.interface import Method
from kvjax.methods.offload import offload
from kvjax.methods.token_select import token_select
from kvjax.methods.topk_completion import topk_completion
from kvjax.stores.counting import total
from kvjax.stores.offloaded import Offloaded
from kvjax.testing import check_method, subject

CACHE = 5
STREAM = drive.make_stream((1, 7, 40, 29), 14, heads=(4, 2), head_dim=8)
SPEC = drive.make_spec(STREAM, layer=7)
CAPACITY = 55
VALUE = 8 * 4  # bytes
SPECS = [
    "token_select",
    "token_select:threshold=0.9",
    "quantize:bits=4+token_select",
    "topk_completion:features=2",
    "topk_completion:per=query,lam=0",
    "topk_completion:feature_map=mean,num_outliers=1,window=3",
    "topk_completion:feature_map=moment,window=0,charge=none",
    "quantize:values=4,prompt=quantized+topk_completion:feature_map=mean",
]


def parsed(spec):
    return registry.parse(spec, **subject.SMALL)


def values(state) -> Offloaded:
    """What of a state lies in the host's memory."""
    return getattr(state, "store", state).v


@pytest.mark.parametrize(
    ("spec", "dtype", "capacity", "together"),
    [(spec, "float32", CAPACITY, 1) for spec in SPECS]
    + [
        # Two values of bfloat16 share words, and four of bytes.
        ("token_select", "bfloat16", 56, 2),
        ("topk_completion:per=query,lam=0", "bfloat16", 54, 2),
        ("quantize:bits=8+token_select", "bfloat16", 56, 4),
        ("token_select", "bfloat16", CAPACITY, 1),
    ],
)
def test_is_the_method_bit_for_bit(spec, dtype, capacity, together):
    """Outputs, lists and proofs, over prompts in chunks and values that are evicted."""
    method, made = parsed(spec), drive.make_spec(STREAM, capacity, dtype, layer=7)
    chunks = [(1, 7, 15, 4), (0, 0, 25, 25)]
    run, expected = (
        drive.run(one, made, STREAM, chunks)
        for one in (offload(method, cache=CACHE), method)
    )
    for ours, theirs in zip(
        jax.tree.leaves((run.prompt_out, run.out, run.diagnostics)),
        jax.tree.leaves((expected.prompt_out, expected.out, expected.diagnostics)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    held = values(run.state)
    assert held.page_size == together
    assert (total(held.moved)[2:] > 4).all()
    assert (total(held.moved) < total(held.asked)).any()
    assert kinds(held.host)["device"] == 0


# --- what moves, by a cache in plain Python


@functools.cache
def stepped(spec):
    """The values behind every step, and what each attended to, without offloading."""
    method = parsed(spec)
    plain = drive.run(method, SPEC, STREAM)
    away = offload(method, cache=CACHE)
    state, _ = drive.prefill(away, SPEC, STREAM)
    state = jax.jit(away.finish)(state)
    step = jax.jit(functools.partial(drive.step, away))
    states = [state]
    for inputs in zip(*drive.step_inputs(STREAM), strict=True):
        states.append(step(states[-1], inputs)[0])
    return states, plain.diagnostics.attended


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        # Of 8 tokens: all of the budget.
        ("token_select", 8),
        # 2 sinks, 1 of the tail, 4 generated, and of each of the two query heads that
        # share values the 5 that are left of 8.
        ("topk_completion:lam=0,per=query,window=4", 2 + 1 + 4 + 2 * 5),
    ],
)
def test_the_values_that_move_are_those_of_a_cache_in_python(spec, most):
    """Slot by slot, each row and head at every step; the newest token is free."""
    states, attended = stepped(spec)
    slots = min(most + CACHE, CAPACITY)
    for b, prompt in enumerate(STREAM.prompts):
        caches = [Cache(slots) for _ in range(2)]
        for step, state in enumerate(states[1:]):
            length, held = prompt + step + 1, values(state)
            lists = attended[step, b].reshape(2, -1)
            for head, cache in enumerate(caches):
                tokens = {int(t) for t in lists[head]}
                cache.ask(tokens - {-1, length - 1}, length)
                np.testing.assert_array_equal(held.held[b, head], cache.held)
            assert total(held.asked)[b] == sum(cache.asked for cache in caches)
            assert total(held.moved)[b] == sum(cache.moved for cache in caches)


def test_the_host_has_every_value_and_no_key():
    """As it came, token by token, the newest too."""
    states, _ = stepped("token_select")
    state = states[-1]
    for b, prompt in enumerate(STREAM.prompts):
        end = prompt + STREAM.steps
        np.testing.assert_array_equal(
            state.v.host.rows[b, :, :end], STREAM.v[b, :, :end], err_msg=f"row {b}"
        )
    assert kinds(state)["pinned_host"] == 4 * 2 * CAPACITY * VALUE
    assert state.k.sharding.memory_kind == "device"


def test_a_value_that_is_not_missing_is_not_read_again():
    """Other numbers in the host under a value that the device holds change nothing."""
    states, _ = stepped("token_select")
    method = offload(parsed("token_select"), cache=CACHE)
    before, after = states[-2], states[-1]
    host = np.array(before.v.host.rows)
    for b, head, token in np.ndindex(*host.shape[:3]):
        if token in before.v.held[b, head]:
            host[b, head, token] = np.nan
    rows = jax.device_put(host, before.v.host.rows.sharding)
    spoiled = before._replace(
        v=before.v._replace(host=before.v.host._replace(rows=rows))
    )
    inputs = [x[-1] for x in drive.step_inputs(STREAM)]
    step = jax.jit(functools.partial(drive.step, method))
    state, (out, _) = step(spoiled, inputs)
    np.testing.assert_array_equal(out, step(before, inputs)[1][0])
    np.testing.assert_array_equal(state.v.held, after.v.held)


# --- bytes


@pytest.mark.parametrize("spec", ["token_select", "topk_completion:lam=0"])
def test_a_longer_text_adds_its_values_to_the_host(spec):
    method, found = offload(parsed(spec), cache=CACHE), []
    for capacity in (256, 512):
        made = drive.make_spec(STREAM, capacity=capacity, layer=7)
        state = jax.jit(lambda s=made: method.finish(method.init(s)))()
        ((_, held),) = accounting.held(method, [made])
        assert held._asdict() == {
            "device": kinds(state)["device"],
            "host": kinds(state)["pinned_host"],
        }
        found.append(held)
    assert found[1].host - found[0].host == 4 * 2 * 256 * VALUE
    assert found[1].device - found[0].device == 4 * 2 * 256 * VALUE  # of keys


def test_bytes_over_the_link_are_at_most_those_of_the_values_read():
    inner = parsed("token_select")
    traffic = offload(inner).traffic(SPEC, 40)
    assert traffic == inner.traffic(SPEC, 40)._replace(link=4 * 2 * 8 * VALUE)
    # Of bfloat16 each may come with one beside it, in half the bytes.
    narrow = drive.make_spec(STREAM, 56, "bfloat16", layer=7)
    assert offload(inner).traffic(narrow, 40).link == traffic.link
    assert offload(inner, memory="device").traffic(SPEC, 40).link == 0
    states, _ = stepped("token_select")
    for before, after in itertools.pairwise(states):
        moved = (total(after.v.moved) - total(before.v.moved)).sum()
        assert moved * after.v.unit <= traffic.link
    assert states[0].v.unit == VALUE


def test_the_values_of_a_quantised_cache_move_as_they_are_stored():
    """4 bits of 8 numbers, and a scale and an offset of 2 bytes: 8 bytes a value."""
    method = offload(parsed("quantize:keys=8,values=4+token_select"))
    state = jax.eval_shape(lambda: method.finish(method.init(SPEC)))
    assert values(state).unit == 8
    assert method.traffic(SPEC, 40).link == 4 * 2 * 8 * 8


# --- a model, the contract, and refusals


@pytest.mark.parametrize(
    "inner", ["token_select:budget=32", "topk_completion:budget=48,feature_map=mean"]
)
def test_a_model_generates_the_same(inner):
    """In real memories, from the prompt's first chunk to the last step."""
    texts = [TEXT[:400], TEXT[:90]]
    ours, theirs = (
        kvjax.generate(tiny_model(), spec, texts, max_new_tokens=24, chunk_size=128)
        for spec in (f"offload:cache=16+{inner}", inner)
    )
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]


def offloaded_token_select(*, budget: int = 8, num_sinks: int = 2, window: int = 4):
    made = token_select(budget=budget, num_sinks=num_sinks, window=window)
    return offload(made, cache=4, memory="device")


def offloaded_completion(
    *, budget: int = 8, num_sinks: int = 2, tail: int = 1, lam: float = 1.0
) -> Method:
    made = topk_completion(
        budget=budget, num_sinks=num_sinks, tail=tail, lam=lam, feature_map="mean"
    )
    return offload(made, cache=4, memory="device")


@pytest.mark.parametrize("factory", [offloaded_token_select, offloaded_completion])
def test_keeps_the_contract(factory):
    checked = check_method(factory)
    for name in (
        "rows_do_not_see_each_other",
        "a_prompt_that_ended_serves_many_questions",
        "a_step_writes_in_place",
    ):
        assert name in checked


def test_more_than_one_token_is_refused():
    method = offload(token_select())
    state = jax.eval_shape(lambda: method.finish(method.init(SPEC)))
    kv = jax.ShapeDtypeStruct((4, 2, 2, 8), jnp.float32)
    with pytest.raises(ValueError, match="2 tokens cannot be written at once"):
        jax.eval_shape(method.append, state, kv, kv)
