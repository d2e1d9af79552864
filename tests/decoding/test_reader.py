"""The one reader of prompts: chunks, buckets, layer by layer, and where it ends."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tiny import SMALL, tiny_model, whole

import kvjax
from kvjax import interface, registry
from kvjax.decoding import reader
from kvjax.decoding.generate import drop_programs, generate, prefill
from kvjax.decoding.reader import bucket
from kvjax.rope import Rope

MODEL = tiny_model()
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (45, 1, 70)]


def test_bucket_wastes_at_most_an_eighth():
    sizes = [bucket(tokens) for tokens in range(1, 5000)]
    for tokens, size in enumerate(sizes, start=1):
        assert tokens <= size <= tokens * 1.125
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 90  # nine octaves of eight, and the first fifteen
    assert [bucket(size) for size in sizes] == sizes


def test_nothing_is_traced_again_within_a_bucket(traces):
    method = kvjax.full()
    drop_programs()  # other tests read by the same ones

    def go(length, new):
        prompt = RNG.integers(0, 256, length).tolist()
        options = {"max_new_tokens": new, "chunk_size": 64}
        done = generate(MODEL, method, [prompt], eos_ids=(), **options)
        assert len(done[0].tokens) == new

    go(145, 38)  # prompts of 145..160 share a bucket, so do 37..40 new tokens
    first = dict(traces)
    assert first["run_layer"] == 1  # for all three chunks, and every layer
    assert first["decode_step"] > 0
    go(152, 37)
    go(150, 40)
    assert traces == first


class Whole(NamedTuple):
    """A model that cannot run a layer alone."""

    decoder: Any

    def __getattr__(self, name):
        if name in ("embed", "layer_params", "run_layer", "normalise"):
            raise AttributeError(name)
        return getattr(self.decoder, name)


@pytest.mark.parametrize(
    "spec",
    [
        *("full", "quest", "snapkv", "streaming_llm", "topk_completion"),
        "dense_layers:first=1+h2o",
    ],
)
def test_prompts_are_read_alike_by_layers_and_as_a_whole(spec):
    """Layers that differ have programs of their own: by their rope, or their state."""
    model = tiny_model(num_layers=3, unrotated_layers=(1,))
    method = registry.parse(spec, **SMALL)
    whole = model._replace(decoder=Whole(model.decoder))
    assert isinstance(model.decoder, interface.LayerwiseLM)
    assert not isinstance(whole.decoder, interface.LayerwiseLM)
    by_layer, at_once = (
        prefill(one, method, PROMPTS, max_new_tokens=8, chunk_size=32)
        for one in (model, whole)
    )
    # Specs, with the number of their layer, are part of the structure.
    assert jax.tree.structure(by_layer.states) == jax.tree.structure(at_once.states)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        (by_layer.states, by_layer.hidden),
        (at_once.states, at_once.hidden),
    )


def test_prefill_ends_at_each_rows_last_token():
    done = prefill(MODEL, kvjax.full(), PROMPTS, max_new_tokens=4, chunk_size=16)
    for row, prompt in enumerate(PROMPTS):
        hidden = whole(MODEL, prompt)[len(prompt) - 1]
        np.testing.assert_allclose(np.asarray(done.hidden)[row], hidden, atol=2e-4)
        assert np.asarray(done.recent)[row].tolist() == prompt[-1:]
    assert np.asarray(done.states[0].length).tolist() == [len(p) for p in PROMPTS]


def test_dynamic_rope_gets_a_long_prompt_in_one_chunk():
    rope = Rope(8, kind="dynamic", factor=2.0, original_context=32)
    model = tiny_model(rope=rope)
    assert len(list(reader.chunks(model.decoder, [[1] * 70], 16))) == 1
    assert len(list(reader.chunks(model.decoder, [[1] * 32], 16))) == 2
    options = {"max_new_tokens": 12, "eos_ids": ()}
    whole = generate(model, "full", PROMPTS, **options)
    assert generate(model, "full", PROMPTS, chunk_size=16, **options) == whole


def test_layers_share_the_program_that_ends_a_prompt():
    traced = []
    method = kvjax.snapkv(budget=8, window=4)

    def finish(state):
        traced.append(state)
        return method.finish(state)

    model = tiny_model(num_layers=3)
    watched = method._replace(finish=finish)
    read = prefill(model, watched, PROMPTS, max_new_tokens=4)
    assert len(traced) == 1
    assert [state.spec.layer for state in read.states] == [0, 1, 2]

    # Each layer ends its own prompt.
    reading = reader.begin(model.decoder, method, 3, 70, 4)
    parts = reader.chunks(model.decoder, PROMPTS, 512)
    states = reader.read(model, method, reading, parts).states
    assert [state.store.spec.layer for state in states] == [0, 1, 2]
    for ended, state in zip(read.states, states, strict=True):
        expected = jax.tree.leaves(method.finish(state))
        for a, b in zip(jax.tree.leaves(ended), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
