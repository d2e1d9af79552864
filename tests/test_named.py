"""Methods as spec strings, and what models and methods say of themselves."""

import functools

import jax
import numpy as np
import pytest
from tiny import tiny_model

import kvjax
from kvjax import registry
from kvjax.decoding import endless, generate, saved_prompt, scoring, timing

MODEL = tiny_model(num_layers=1)
PROMPT = list(range(60))
SPEC = "streaming_llm:budget=16"
OPTIONS = {"max_new_tokens": 5, "eos_ids": ()}


def test_a_spec_is_the_method_it_describes():
    method = registry.parse(SPEC)
    assert registry.as_method(SPEC) is method
    assert registry.as_method(method) is method
    expected = generate.generate(MODEL, method, [PROMPT], **OPTIONS)
    assert generate.generate(MODEL, SPEC, [PROMPT], **OPTIONS) == expected
    pieces = generate.stream(MODEL, SPEC, [PROMPT], **OPTIONS)
    assert "".join(text for _, text in pieces) == expected[0].text

    def rest(events):
        while True:
            try:
                next(events)
            except StopIteration as end:
                return end.value

    read = generate.prefill(MODEL, SPEC, [PROMPT], max_new_tokens=5)
    assert rest(generate.continued(MODEL, SPEC, read, **OPTIONS)) == expected
    kept = saved_prompt.read(MODEL, SPEC, [PROMPT[:50]], room=15)
    kept = saved_prompt.extend(MODEL, SPEC, kept, [PROMPT[50:]])
    assert saved_prompt.generate(MODEL, SPEC, kept, **OPTIONS) == expected
    np.testing.assert_array_equal(
        scoring.score(MODEL, SPEC, [PROMPT], prefill=40).log_probs,
        scoring.score(MODEL, method, [PROMPT], prefill=40).log_probs,
    )
    with pytest.raises(ValueError, match="text is empty"):
        list(endless.read(MODEL, SPEC, [""]))


def test_the_same_spec_compiles_once():
    generate.generate(MODEL, "quest:budget=16", [PROMPT], **OPTIONS)
    with timing.timed() as clock:
        generate.generate(MODEL, "quest:budget=16", [PROMPT], **OPTIONS)
    assert not clock.compilations


def test_what_is_no_method_is_an_error(unchecked_shapes):
    del unchecked_shapes
    with pytest.raises(ValueError, match="did you mean 'quest'"):
        generate.generate(MODEL, "qest", [PROMPT])
    with pytest.raises(TypeError, match=r"method=3 must be a kvjax\.Method, or"):
        generate.generate(MODEL, 3, [PROMPT])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (registry.parse("quest:budget=128"), "Method('quest:budget=128')"),
        (
            registry.parse("dense_layers:first=2+quest", budget=64, window=4),
            "Method('dense_layers:first=2+quest:budget=64')",
        ),
        (kvjax.tova(budget=77), "Method('tova:budget=77')"),
    ],
)
def test_a_method_says_what_it_is_in_a_line(method, expected):
    assert repr(method) == expected


def test_every_method_knows_its_name():
    for name in registry.names():
        assert repr(registry.get(name)()).startswith(
            (f"Method('{name}'", f"Method('{name}:")
        )


def test_a_method_in_another_is_spelled_as_it_is():
    """What its text needs escaped is escaped once, in the representation."""

    def of(*bound):
        return kvjax.full()._replace(traffic=functools.partial(counted, *bound))

    inner = of(r"a\b")
    assert inner.spec_text() == r"test_named:folder=a\b"
    assert of(inner).spec_text() == r"test_named+test_named:folder=a\b"
    assert repr(of(inner)) == r"Method('test_named+test_named:folder=a\\b')"
    assert registry.parse(SPEC).spec_text() == SPEC


def counted(folder, spec, length): ...


def test_a_model_says_what_it_is_in_a_line():
    said = repr(MODEL)
    count = sum(leaf.size for leaf in jax.tree.leaves(MODEL.params))
    assert said == (
        f"LanguageModel('tiny', LlamaDecoder, {count:,} parameters (float32), "
        "1 layers, context 4,096, vocabulary 260)"
    )
    assert "parameters, 1 layers" in repr(MODEL._replace(params=None)).replace("0 ", "")
