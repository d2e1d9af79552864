"""Generation over a mesh: the tokens of one device, and what devices tell counted."""

import jax
import numpy as np
import pytest
from tiny import tiny_model

import kvjax
from kvjax import parallel
from kvjax.cost import planning
from kvjax.decoding import endless, generate, loop, reader, scoring
from kvjax.interface import layer_specs
from models import llama

METHOD = "quest:budget=8,page_size=4"
PROMPTS = [list(range(5, 29)), list(range(40, 57))]


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=2, num_kv_heads=2, num_q_heads=4)


def over(model, mesh):
    decoder, places = llama.over(model.decoder, parallel.make(mesh))
    return model._replace(decoder=decoder, params=jax.device_put(model.params, places))


def answers(model):
    found = kvjax.generate(
        model, METHOD, PROMPTS, max_new_tokens=11, chunk_size=8, stream_every=4
    )
    return [one.tokens for one in found]


def test_tokens_are_those_of_one_device(model):
    """Chunks and blocks of steps run the programs of the first ones."""
    expected = answers(model)
    for mesh in ("data=2,tensor=2", "tensor=4"):
        steps, layer = loop.steps(generate.SAMPLED), reader._layer
        before = steps._cache_size(), layer._cache_size()
        assert answers(over(model, mesh)) == expected
        assert (steps._cache_size(), layer._cache_size()) == (
            before[0] + 1,
            before[1] + 1,
        )


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("tensor=4", {}),
        ("data=2,tensor=2", {"vocab_size": 261, "num_layers": 1}),
        ("tensor=4", {"copies": 3, "copy_window": 4, "num_layers": 1}),
        ("data=2,tensor=2", {"copies": 2, "num_layers": 1}),
    ],
)
def test_a_step_tells_what_the_plan_counts(mesh, sizes):
    """To the byte: no page, key or value among it.

    KV heads are on two devices each; or a vocabulary is split by its elements; or each
    token has copies.
    """
    spread = over(tiny_model(**{"num_layers": 2} | sizes), mesh)
    decoder, rule = spread.decoder, scoring._rule(False)
    method = kvjax.parse("phd+" * (decoder.copies is not None) + METHOD)
    states = jax.eval_shape(
        lambda: reader.finish_layers(
            method, reader.empty_states(decoder, method, 2, 32, 8)
        )
    )
    given = np.zeros((2, 4), np.int32)
    window, limit = np.zeros((2, 1), np.int32), np.int32(4)
    program = loop.steps(rule).lower(
        decoder, method, 4, spread.params, states, window, None, given, limit
    )
    text = program.compile().as_text()
    step = [line for line in text.splitlines() if "while/body" in line]
    found = parallel.compiled("\n".join(step))
    specs = layer_specs(decoder, 2, 64, 8)
    assert len(found) > 3
    counted = planning.exchanges(decoder, method, specs)
    assert sorted(found) == sorted((one.kind, one.bytes) for one in counted)


def test_what_runs_on_one_device_says_so(model):
    spread = over(model, "tensor=2")
    with pytest.raises(ValueError, match="an endless text runs on one device, and the"):
        endless.read(spread, "streaming_llm:budget=8", ["x"])
