"""Methods that read a prompt together end up where each of them would alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL, tiny_model

import kvjax
from kvjax import accounting, registry
from kvjax.decoding import reader
from kvjax.decoding.generate import continued, prefill
from kvjax.decoding.reader import bucket
from kvjax.evaluation import (
    compare,
    compare_inputs,
    continuations,
    fidelity,
    together,
)
from kvjax.interface import layer_specs

MODEL = tiny_model(num_layers=2)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (70, 33)]
OPTIONS = {"max_new_tokens": 8, "chunk_size": 32}
EXACT = [
    name for name in registry.names(1.0) if registry.parse(name, **SMALL).exact_prompt
]


def text_of(method, read):
    events = continued(MODEL, method, read, max_new_tokens=8, eos_ids=())
    while True:
        try:
            next(events)
        except StopIteration as end:
            return [generation.tokens for generation in end.value]


@pytest.fixture(scope="module")
def read():
    methods = [registry.parse(name, **SMALL) for name in EXACT]
    found = together.read(MODEL, methods, PROMPTS, **OPTIONS)
    taken = map(found.take, range(len(methods)))
    return dict(zip(EXACT, zip(methods, taken, strict=True), strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_each_method_has_what_it_would_have_alone(read, name):
    method, found = read[name]
    alone = prefill(MODEL, method, PROMPTS, **OPTIONS)
    assert jax.tree.structure(found.states) == jax.tree.structure(alone.states)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        written = np.abs(b) < 1e20  # of the slots some hold poison
        a, b = np.where(written, a, 0), np.where(written, b, 0)
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert text_of(method, found) == text_of(method, alone)


def test_another_normaliser_than_the_models_reads_alone():
    assert kvjax.entmax_full().exact_prompt
    assert not kvjax.entmax_full(alpha=1.5).exact_prompt
    assert not registry.parse("dense_layers+entmax_full:alpha=1.5").exact_prompt


def test_methods_that_read_together_decode_one_by_one():
    both = together.reader((kvjax.full(), kvjax.quest(budget=16, page_size=4)))
    spec = MODEL.decoder.cache_spec(1, 8)
    query = jnp.zeros((1, spec.num_q_heads, 1, spec.head_dim))
    with pytest.raises(TypeError, match="decode one by one"):
        both.decode_step(both.init(spec), query)


def test_a_method_whose_prompt_is_not_exact_is_followed_on_its_own():
    """Its predictions are of what its own prompt left, not of full attention's."""
    windows = [RNG.integers(0, 256, 48).tolist() for _ in range(2)]
    sizes = {"new_tokens": 8, "batch": 2, "chunk_size": 32}
    method = kvjax.streaming_llm(budget=12, num_sinks=2)
    full = kvjax.full()
    truth = continuations.expect(MODEL, full, windows, **sizes)
    (followed,) = continuations.follow(MODEL, full, [method], windows, truth, **sizes)
    expected = continuations.predict(MODEL, method, windows, **sizes)
    np.testing.assert_allclose(followed.log_probs, expected.log_probs, atol=1e-5)
    agreement = fidelity.agreement(truth.continued.predicted.logits, expected.logits)
    np.testing.assert_allclose(followed.agreement.kl, agreement.kl, atol=1e-5)
    led = together.read(
        MODEL, [kvjax.full(), method], [w[:40] for w in windows], **OPTIONS
    )
    other = continuations._predicted(
        MODEL, method, led.take(1), np.array([w[40:] for w in windows], np.int32)
    )
    assert np.abs(other.log_probs - expected.log_probs).max() > 1e-3


@pytest.mark.parametrize("spec", ["quest", "retro+quest", "streaming_llm"])
def test_layers_lose_what_a_whole_model_side_by_side_says(spec):
    """Layers stepped one by one against the model run with both methods inside."""
    windows = np.array([RNG.integers(0, 256, 48) for _ in range(2)], np.int32)
    method = registry.parse(spec, budget=16)
    if spec != "streaming_llm":
        method = registry.parse(spec.replace("quest", "quest:page_size=4"), budget=16)
    found = continuations.layer_fidelity(
        MODEL, kvjax.full(), method, windows.tolist(), new_tokens=8, batch=2
    )
    both = fidelity.side_by_side(kvjax.full(), method)
    begun = prefill(MODEL, both, windows[:, :40].tolist(), max_new_tokens=8)
    states = fidelity.teacher_forced(
        MODEL.decoder, both, MODEL.params, begun.states, windows[:, 40:-1], begun.recent
    )
    for a, b in zip(found, fidelity.layers(states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert found.error.max() > 1e-3


def test_a_method_is_traced_once_whatever_it_reads_with():
    traced, snap = [], registry.parse("snapkv", **SMALL)

    def prefill(*arguments):
        traced.append(len(arguments))
        return snap.prefill(*arguments)

    counted = snap._replace(prefill=prefill)
    # Budgets of layers make layers of several kinds.
    budgets = registry.parse("layer_budgets+snapkv", **SMALL)
    specs = layer_specs(tiny_model(num_layers=4).decoder, 1, 64, 8)
    full, norm = kvjax.full(), registry.parse("knorm", **SMALL)
    for others in ((full,), (full, budgets), (norm,)):
        together.kept((*others, counted), specs)
    assert len(traced) == 1


SETTINGS = compare_inputs.Settings(context=64, new_tokens=8, windows=8, batch=2)
METHODS = {
    name: registry.parse(name, **SMALL)
    for name in ("full", "snapkv", "streaming_llm", "quest", "h2o")
}


def grouped(room, **more):
    methods = METHODS | more
    return compare.groups(MODEL.decoder, methods, methods["full"], SETTINGS, room)


def test_groups_fill_the_room_and_others_are_alone():
    whole = ["full", "snapkv", "quest", "h2o"]
    assert grouped(1 << 30) == [whole, ["streaming_llm"]]
    assert grouped(0) == [["full"], ["snapkv"], ["quest"], ["h2o"], ["streaming_llm"]]
    snap = bytes_of("snapkv")
    # Of two rows each: what both keep, which is all but SnapKV's newest queries, once,
    # and two copies of the larger; room for one more, to the byte.
    programs = 2 * 2 * compare.PROGRAMS
    assert grouped(2 * (snap + 2 * snap) + programs)[0] == ["full", "snapkv"]
    assert grouped(2 * (snap + 2 * snap) + programs - 1)[0] == ["full"]


def bytes_of(name):
    sizes = SETTINGS.context, SETTINGS.new_tokens
    return accounting.bytes_of_prompt(METHODS[name], MODEL.decoder, *sizes)


def test_a_method_that_reads_its_prompt_again_is_alone():
    """Though its prompt is exact: the others would wait."""
    names = ("full", "kvzip", "quest")
    methods = {name: registry.parse(name, **SMALL) for name in names}
    assert methods["kvzip"].exact_prompt
    found = compare.groups(
        MODEL.decoder, methods, methods["full"], SETTINGS, room=1 << 30
    )
    assert found == [["full", "quest"], ["kvzip"]]
    # Two of them, which read in two ways, are sized and asked one by one.
    ways = [registry.parse("kvzip", **SMALL | {"chunk": size}) for size in (8, 16)]
    both = dict(zip("ab", ways, strict=True))
    assert compare.batch_that_fits(MODEL.decoder, both, SETTINGS, 1 << 30) == 8
    assert grouped(1 << 30, **both)[-2:] == [["a"], ["b"]]


def test_the_batch_leaves_room_for_methods_to_read_together():
    def batch(room, **changes):
        settings = compare_inputs.Settings(
            **({"context": 64, "new_tokens": 8, "windows": 8} | changes)
        )
        return compare.batch_that_fits(MODEL.decoder, METHODS, settings, room)

    assert batch(1 << 30) == 8
    assert batch(1 << 30, windows=3) == 2
    assert batch(1) == 1
    exact = [METHODS[name] for name in ("full", "snapkv", "quest", "h2o")]
    group = compare.bytes_together(MODEL.decoder, exact, SETTINGS)
    programs = 4 * 2 * compare.PROGRAMS
    assert batch(2 * group + programs) == 2
    assert batch(2 * group + programs - 1) == 1


def test_what_several_methods_keep_is_there_once():
    """The cache of every token, whole; of SnapKV and H2O beside it their statistics."""
    names = "full", "snapkv", "h2o"
    spec = MODEL.decoder.cache_spec(2, 64)
    methods = tuple(METHODS[name] for name in names)
    joint = together.reader(methods).init(spec)
    alone = [method.init(spec) for method in methods]
    (full, *others) = [sum(x.nbytes for x in jax.tree.leaves(one)) for one in alone]
    statistics = alone[1].queries.nbytes + alone[2].scores.nbytes
    assert sum(others) == 2 * full + statistics
    assert sum(x.nbytes for x in jax.tree.leaves(joint)) == full + statistics
    # Quest has the same tokens in pages, and these are its own.
    wider = together.reader((*methods, METHODS["quest"])).init(spec)
    quest = sum(x.nbytes for x in jax.tree.leaves(METHODS["quest"].init(spec)))
    more = sum(x.nbytes for x in jax.tree.leaves(wider)) - full - statistics
    assert 0.9 * quest < more <= quest


def test_what_is_taken_is_used_up_alone():
    """Decoding gives its buffers away: those of another method stay as they are."""
    methods = [METHODS["full"], METHODS["h2o"], METHODS["full"]]
    read = together.read(MODEL, methods, PROMPTS, **OPTIONS)
    expected = text_of(methods[0], prefill(MODEL, methods[0], PROMPTS, **OPTIONS))
    for place in (0, 2, 0):
        assert text_of(methods[0], read.take(place)) == expected
    evicting = text_of(methods[1], prefill(MODEL, methods[1], PROMPTS, **OPTIONS))
    assert text_of(methods[1], read.take(1)) == evicting
    both = read.take(0), read.take(2)  # held while they are compared
    first, second = (
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(one.states)} for one in both
    )
    assert not first & second


def changed(change, least=0):
    """Full attention that attends exactly, and keeps values changed in long chunks."""
    full = kvjax.full()

    def read(state, q, k, v, lengths):
        _, out = full.prefill(state, q, k, v, lengths)
        kept = change(v) if q.shape[2] > least else v
        return full.prefill(state, q, k, kept, lengths)[0], out

    return full._replace(prefill=read)


@pytest.mark.parametrize(
    "change",
    [lambda v: v * 2, lambda v: jnp.roll(v, 1, -1), lambda v: v.at[..., 0].set(0.0)],
    ids=["scaled", "rolled", "cut"],
)
def test_other_numbers_in_equal_places_are_kept_apart(change):
    methods = [kvjax.full(), changed(change)]
    options = OPTIONS | {"chunk_size": 128}  # what is changed is not attended to
    read = together.read(MODEL, methods, PROMPTS, **options)
    for place, method in enumerate(methods):
        alone = prefill(MODEL, method, PROMPTS, **options)
        for a, b in zip(*map(jax.tree.leaves, (read.take(place), alone)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    values = [read.take(place).states[0].v for place in (0, 1)]
    assert np.abs(values[0] - values[1]).max() > 0.1


def test_what_parts_in_long_chunks_alone_is_told_by_the_chunks_that_are_read():
    methods = kvjax.full(), changed(lambda v: v * 2, least=20)
    for chunk_size in (24, 16):  # the chunk that will be read tells
        read = together.read(
            MODEL, methods, PROMPTS, **(OPTIONS | {"chunk_size": chunk_size})
        )
        values = [read.take(place).states[0].v for place in (0, 1)]
        assert (np.abs(values[0] - values[1]).max() > 0.1) == (chunk_size == 24)
    short = together.reader(methods, 16)
    begun = reader.begin(MODEL.decoder, short, 2, 70, 8)
    parts = reader.cut(PROMPTS, 24)
    with pytest.raises(ValueError, match="a chunk of 24 tokens parts what is equal"):
        reader.read(MODEL, short, begun, parts)


@pytest.mark.parametrize("name", ["offload+quest", "offload+token_select"])
def test_what_lies_in_the_hosts_memory_is_taken_there(name):
    """And it is not counted as an accelerator's."""
    method = registry.parse(name, budget=16)
    read = together.read(MODEL, [METHODS["full"], method], PROMPTS, **OPTIONS)
    alone = prefill(MODEL, method, PROMPTS, **OPTIONS)

    def kinds(states):
        return [x.sharding.memory_kind for x in jax.tree.leaves(states)]

    assert kinds(read.take(1).states) == kinds(alone.states)
    assert "pinned_host" in kinds(alone.states)
    assert text_of(method, read.take(1)) == text_of(method, alone)


def test_an_accelerators_memory_holds_no_pages_of_the_host(monkeypatch):
    method = registry.parse("offload+quest", budget=16)
    specs = [MODEL.decoder.cache_spec(1, 64)]
    (whole,) = together.kept([method], specs)
    ((_, host),) = [prompt for prompt, _ in accounting.held(method, specs)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (device,) = together.kept([method], specs)
    assert host > 0
    assert sum(whole.values()) - sum(device.values()) == host


def test_prompts_of_several_lengths_are_read_by_one_program(traces):
    method = kvjax.full()
    assert bucket(40) != bucket(60)  # or one program would serve them anyway
    reader.drop_programs()
    for size in (60, 40, 64):
        prefill(MODEL, method, [PROMPTS[0][:size]], longest=64, **OPTIONS)
    assert traces == {"run_layer": 1}


def test_making_room_for_longer_prompts_changes_no_token():
    method = kvjax.quest(budget=16, page_size=4)
    alone = prefill(MODEL, method, PROMPTS, **OPTIONS)
    roomy = prefill(MODEL, method, PROMPTS, longest=120, **OPTIONS)
    assert text_of(method, roomy) == text_of(method, alone)
