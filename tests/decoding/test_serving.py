"""Rows that end take the next prompt: each says what it says among all the others."""

import numpy as np
import pytest
from tiny import SMALL, tiny_model

from kvjax import registry
from kvjax.decoding import asking, finite, generate, loop
from kvjax.decoding.sampling import Sampling
from kvjax.decoding.serving import serve_rows

MODEL = tiny_model(num_layers=1)
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (45, 2, 70, 9, 31, 64, 17)]
NEW = 24
SAMPLED = Sampling(temperature=1.3, top_k=40, repetition_penalty=1.2)


def served(method, prompts=PROMPTS, model=MODEL, **options):
    options = {"batch": 3, "max_new_tokens": NEW, "eos_ids": ()} | options
    found = list(serve_rows(model, method, prompts, **options))
    assert sorted(index for index, _ in found) == list(range(len(found)))
    return found


def together(method, **options):
    options = {"max_new_tokens": NEW, "eos_ids": ()} | options
    return generate.generate(MODEL, method, PROMPTS, **options)


@pytest.fixture(scope="module")
def ends():
    """Two tokens that end some answers early, some late, one at once, others never."""
    said = [row.tokens for row in together("quest", **OPTIONS)]
    ends = said[4][0], next(x for x in said[0][8:] if x not in said[0][:8])
    sizes = [
        min([row.index(end) for end in ends if end in row], default=NEW) for row in said
    ]
    assert min(sizes) == 0
    assert max(sizes) == NEW
    assert len(set(sizes)) > 3, sizes
    return ends


OPTIONS = {"sampling": SAMPLED, "seed": 3}


@pytest.mark.parametrize(
    "spec", ["offload+quest", "refreshkv", "cascade", "retro+quest"]
)
def test_rows_say_what_they_say_among_all(spec, ends):
    method = registry.parse(spec, **SMALL)
    expected = together(method, eos_ids=ends, **OPTIONS)
    found = served(method, eos_ids=ends, **OPTIONS)
    assert [said for _, said in sorted(found)] == expected
    # Those that end at once and early come before the row that began with them.
    order = [index for index, _ in found]
    assert order != sorted(order)


def test_how_many_rows_there_are_changes_nothing(ends):
    method = registry.parse("quest", **SMALL)
    expected = together(method, eos_ids=ends, **OPTIONS)
    for options in ({"batch": 1}, {"batch": 16}, {"batch": 4, "stream_every": 3}):
        found = served(method, eos_ids=ends, **OPTIONS, **options)
        assert [said for _, said in sorted(found)] == expected


def test_stop_strings_free_a_row():
    whole = together("full")
    stop = whole[0].text[5:7], whole[2].text[3:5]
    expected = together("full", stop=stop)
    assert {said.finish_reason for said in expected} == {"stop", "length"}
    assert [said for _, said in sorted(served("full", stop=stop))] == expected


def test_nothing_compiles_again(traces):
    method = registry.parse("snapkv", **SMALL)
    served(method, PROMPTS[:4], longest=70)
    programs = loop.steps(generate.SAMPLED), asking.written
    before = dict(traces), [program._cache_size() for program in programs]
    served(method, iter(PROMPTS[::-1]), longest=70)
    assert (dict(traces), [x._cache_size() for x in programs]) == before


def test_a_prompt_is_asked_for_when_a_row_is_free():
    asked = []

    def prompts():
        for prompt in PROMPTS:
            asked.append(len(prompt))
            yield prompt

    first = next(serve_rows(MODEL, "full", prompts(), batch=2, longest=70))
    assert first[0] in (0, 1)
    assert len(asked) == 3  # the third waits


def test_what_cannot_be_served_is_refused():
    for arguments, options, message in (
        (["full", iter(PROMPTS)], {}, "longest=0: give the most"),
        (["full", iter(PROMPTS)], {"longest": 60}, "prompt 2 .*70 tokens.*longest=70"),
        (["full", iter([[1], []])], {"longest": 9}, "prompt 1 has no tokens"),
        (["full", iter([[1], [999]])], {"longest": 9}, "row 1 holds token id 999"),
        (["full", PROMPTS], {"batch": 0}, "batch=0 must be at least 1"),
        (["full", [*PROMPTS, []]], {}, "prompt 7 has no tokens"),
        (["full", PROMPTS], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ):
        with pytest.raises(ValueError, match=message):
            list(serve_rows(MODEL, *arguments, **options))
    # Of a list, before any work.
    with pytest.raises(ValueError, match="row 1 holds token id 999"):
        serve_rows(MODEL, "full", [[1], [999]])
    with pytest.raises(TypeError, match="prompts is one text: put it in a list"):
        serve_rows(MODEL, "full", "abc", longest=9)
    with pytest.raises(ValueError, match="prompts is empty"):
        serve_rows(MODEL, "full", [])
    assert list(serve_rows(MODEL, "full", iter([]), longest=3)) == []


def test_logits_that_are_no_numbers_name_the_prompt():
    said = together("full")[2].tokens
    for token, where in ((8, "at token 1 of prompt 1"), (said[4], "at token 6 of")):
        embedding = MODEL.params["embedding"].at[token].set(np.nan)
        params = MODEL.params | {"embedding": embedding}
        broken = MODEL._replace(params=params)
        prompts = [[1, 2, 3], [7, 8, 9]] if token == 8 else PROMPTS[2:3]
        with pytest.raises(finite.NotFiniteError, match=where):
            served("full", prompts, model=broken)
