"""Prompts that are read twice: what the second reading sees, and that it happens."""

import collections
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tiny import SMALL, ByteTokenizer, dense, rotated, tiny_model, whole

import kvjax
from kvjax import registry
from kvjax.cost import planning
from kvjax.decoding import endless, generate, reader, saved_prompt, scoring
from kvjax.decoding.checks import check_prompts
from kvjax.evaluation import (
    asked_after,
    compare_runs,
    continuations,
    fidelity,
    together,
)
from kvjax.evaluation.kept_tokens import kept
from kvjax.evaluation.tasks import needles
from kvjax.interface import Rereading
from kvjax.rope import Rope

MODEL = tiny_model()
RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (45, 1, 70)]
CHUNK, BUDGET, NEW = 32, 16, 8
WORDS = list(b"Repeat the previous context:")
KVZIP = registry.parse("kvzip", budget=BUDGET, chunk=CHUNK)
SIZES = {"max_new_tokens": NEW, "chunk_size": 32}
OPTIONS = SIZES | {"eos_ids": ()}


def scores_by_hand(model, prompt, chunk=CHUNK, words=WORDS):
    """`(L, Hkv, prompt)`: each chunk a text of its own behind the prompt, all of it.

    Causal attention over the whole of that text is what the second reading is.
    """
    decoder, length = model.decoder, len(prompt)
    spec = decoder.cache_spec(1, 1)
    scores = np.zeros((decoder.num_layers, spec.num_kv_heads, length))
    for start in range(0, length, chunk):
        text = [*prompt, *words, *prompt[start : start + chunk]]

        def attention(layer, q, k, v, end=len(text)):
            turned, keys = (np.asarray(rotated(x), np.float64) for x in (q, k))
            keys = np.repeat(keys, spec.group, axis=1)
            logits = np.einsum("bhtd,bhsd->bhts", turned, keys) * spec.head_dim**-0.5
            logits = np.where(np.tril(np.ones(logits.shape[2:], bool)), logits, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            most = weights[0, :, length:end, :length].max(1)
            most = most.reshape(spec.num_kv_heads, spec.group, -1).max(1)
            scores[layer] = np.maximum(scores[layer], most)
            return dense(layer, q, k, v)

        whole(model, text, attention)
    return scores


def state_read(model, prompts, method=KVZIP, longest=0):
    """States before `finish`, read and read again."""
    reading = begun(model, prompts, method)
    return reader.reread(model, method, reading, prompts, longest)


def begun(model, prompts, method=KVZIP):
    longest = max(map(len, prompts))
    reading = reader.begin(model.decoder, method, len(prompts), longest, NEW)
    parts = reader.chunks(model.decoder, prompts, 32)
    return reader.read(model, method, reading, parts)


@pytest.fixture(scope="module")
def expected():
    return [scores_by_hand(MODEL, prompt) for prompt in PROMPTS]


def test_the_importance_is_that_of_texts_behind_the_prompt(expected):
    """Of three chunks, the last not whole; of a row with one; of a single token."""
    before = begun(MODEL, PROMPTS)
    found = state_read(MODEL, PROMPTS)
    np.testing.assert_array_equal(found.hidden, before.hidden)
    for row, prompt in enumerate(PROMPTS):
        for layer, state in enumerate(found.states):
            actual = np.asarray(state.scores[row])
            np.testing.assert_allclose(
                actual[:, : len(prompt)], expected[row][layer], atol=2e-5
            )
            assert not actual[:, len(prompt) :].any()
    for state, other in zip(found.states, before.states, strict=True):
        jax.tree.map(np.testing.assert_array_equal, state.store, other.store)


def test_what_is_kept_is_what_scored_highest(expected):
    read = generate.prefill(MODEL, KVZIP, PROMPTS, **SIZES)
    for row in range(3):
        for layer, state in enumerate(read.states):
            for head, scores in enumerate(expected[row][layer]):
                held = np.asarray(state.positions[row, head])
                best = np.argsort(-scores, kind="stable")[:BUDGET]
                assert held[held >= 0].tolist() == sorted(best.tolist())
    assert len(PROMPTS[0]) > BUDGET


class Begins(ByteTokenizer):
    """Puts a token before every text, and one behind it."""

    def encode(self, text):
        return [257, *text.encode(), 256]


def test_the_words_have_nothing_around_them(expected):
    model = MODEL._replace(tokenizer=Begins())
    found = state_read(model, PROMPTS)
    for state, layer in zip(found.states, expected[2], strict=True):
        np.testing.assert_allclose(state.scores[2, :, :70], layer, atol=2e-5)


def test_rows_and_room_change_nothing(expected):
    """A row alone, and where others' prompts may be longer than a chunk."""
    alone = state_read(MODEL, [PROMPTS[0]])
    roomy = state_read(MODEL, [PROMPTS[0]], longest=70)
    for layer in range(2):
        for found in (alone, roomy):
            actual = found.states[layer].scores[0, :, :45]
            np.testing.assert_allclose(actual, expected[0][layer], atol=2e-5)
    text = [generate.generate(MODEL, KVZIP, [p], **OPTIONS)[0] for p in PROMPTS]
    assert generate.generate(MODEL, KVZIP, PROMPTS, **OPTIONS) == text


# --- it happens, once a prompt


class Spy(NamedTuple):
    method: Any
    lengths: list  # of the chunks that were read again


def spied(method):
    """The method, which notes in every layer what it reads again."""
    noted = []

    def prefill(state, q, k, v, lengths):
        jax.debug.callback(lambda x: noted.append(x.tolist()), lengths)
        return method.reread.prefill(state, q, k, v, lengths)

    again = method.reread._replace(prefill=prefill)
    return Spy(method._replace(reread=again), noted)


def counted(noted):
    jax.effects_barrier()
    found = collections.Counter(map(tuple, noted))
    noted.clear()
    return found


W = len(WORDS)
ONCE = {(W + 32, W + 1, W + 32): 2, (W + 13, 0, W + 32): 2, (0, 0, W + 6): 2}


def test_every_way_to_a_prompts_end_reads_it_again_once():
    """Two layers, three chunks; and no part of the prompt is read again before."""
    method, noted = spied(KVZIP)
    expected = generate.generate(MODEL, method, PROMPTS, **OPTIONS)
    assert counted(noted) == ONCE
    assert expected == generate.generate(MODEL, KVZIP, PROMPTS, **OPTIONS)

    read = saved_prompt.read(MODEL, method, PROMPTS, room=NEW)
    assert not counted(noted)
    assert saved_prompt.generate(MODEL, method, read, eos_ids=()) == expected
    assert counted(noted) == ONCE

    read = saved_prompt.read(MODEL, method, PROMPTS, room=NEW)
    ended = saved_prompt.finish(MODEL, method, read)
    assert counted(noted) == ONCE
    for _ in range(2):
        assert saved_prompt.generate(MODEL, method, ended, eos_ids=()) == expected
    assert not counted(noted)

    alone = together.read(MODEL, [method], PROMPTS, **SIZES).take(0)
    assert counted(noted) == ONCE
    direct = generate.prefill(MODEL, method, PROMPTS, **SIZES)
    assert counted(noted) == ONCE
    jax.tree.map(np.testing.assert_array_equal, alone.states, direct.states)

    rows = [prompt[:40] for prompt in PROMPTS[::2]]
    for prompt_scores in (False, True):
        scoring.score(MODEL, method, rows, prefill=36, prompt_scores=prompt_scores)
        assert counted(noted) == {(W + 32, W + 32): 2, (W + 4, W + 4): 2}
    for read in (compare_runs.compile_reading, compare_runs.seconds_to_read):
        read(MODEL, method, PROMPTS[0], new_tokens=4)
        assert counted(noted) == {(W + 32,): 2, (W + 13,): 2}


def test_a_prompt_in_chunks_is_the_whole_prompt():
    whole = generate.generate(MODEL, KVZIP, PROMPTS, **OPTIONS | {"chunk_size": 128})
    assert generate.generate(MODEL, KVZIP, PROMPTS, **OPTIONS) == whole


def test_a_prefix_on_disk_goes_on_as_one_that_was_not_kept(tmp_path):
    expected = generate.generate(MODEL, KVZIP, PROMPTS, **OPTIONS)
    for name, is_finished in (("read", False), ("ended", True)):
        read = saved_prompt.read(MODEL, KVZIP, PROMPTS, room=NEW)
        if is_finished:
            read = saved_prompt.finish(MODEL, KVZIP, read)
        saved_prompt.save(tmp_path / name, MODEL, read, method_name="kvzip")
        found = saved_prompt.restore(tmp_path / name, MODEL, KVZIP, method_name="kvzip")
        assert found.is_finished == is_finished
        assert saved_prompt.generate(MODEL, KVZIP, found, eos_ids=()) == expected


def test_a_longer_prompt_is_read_again_as_a_whole():
    begin = [prompt[:30] for prompt in PROMPTS]
    rest = [prompt[30:] for prompt in PROMPTS]
    read = saved_prompt.read(MODEL, KVZIP, begin, room=NEW + 40)
    read = saved_prompt.extend(MODEL, KVZIP, read, rest)
    found = saved_prompt.generate(MODEL, KVZIP, read, max_new_tokens=NEW, eos_ids=())
    assert found == generate.generate(MODEL, KVZIP, PROMPTS, **OPTIONS)


def test_a_budget_of_the_whole_prompt_is_full_attention():
    method = registry.parse("kvzip:budget=80", chunk=CHUNK)
    expected = generate.generate(MODEL, "full", PROMPTS, **OPTIONS)
    assert generate.generate(MODEL, method, PROMPTS, **OPTIONS) == expected
    few = registry.parse("kvzip:budget=2", chunk=CHUNK)
    assert generate.generate(MODEL, few, PROMPTS, **OPTIONS) != expected


def test_no_program_is_made_for_every_prompt(traces):
    """Within a bucket all is compiled; the second reading is one program more."""
    generate.drop_programs()
    method = registry.parse("kvzip", budget=BUDGET, chunk=512)

    def go(length):
        prompt = RNG.integers(0, 256, length).tolist()
        generate.generate(MODEL, method, [prompt], **OPTIONS)

    go(145)  # prompts of 145..160 share a bucket, and 153..160 tokens in all
    first = dict(traces)
    assert first["run_layer"] == 2
    go(152)
    go(149)
    assert traces == first


# --- beside other layers, and other methods


@pytest.mark.parametrize(
    "spec", ["dense_layers:first=1+kvzip", "layer_budgets:beta=2+kvzip"]
)
def test_layers_of_their_own_see_what_all_see(spec, expected):
    """The importance does not depend on what becomes of other layers' caches."""
    method = registry.parse(spec, **SMALL | {"chunk": CHUNK})
    found = state_read(MODEL, PROMPTS, method)
    for layer in range(int("dense" in spec), 2):
        inner = found.states[layer].state
        for row, prompt in enumerate(PROMPTS):
            actual = inner.scores[row, :, : len(prompt)]
            np.testing.assert_allclose(actual, expected[row][layer], atol=2e-5)
    generate.generate(MODEL, method, PROMPTS, **OPTIONS)


def test_methods_that_read_together_leave_the_second_reading_to_its_own(expected):
    full = kvjax.full()
    reading = begun(MODEL, PROMPTS, together.reader((full, KVZIP)))
    found = reader.reread(
        MODEL, together.reader((full, KVZIP)), reading, PROMPTS
    ).states
    alone = begun(MODEL, PROMPTS, full).states
    for layer, (plain, ours) in enumerate(map(together.apart, found)):
        jax.tree.map(np.testing.assert_array_equal, plain, alone[layer])
        np.testing.assert_allclose(
            ours.scores[2, :, :70], expected[2][layer], atol=2e-5
        )
    other = registry.parse("kvzip:budget=16,chunk=8")
    with pytest.raises(ValueError, match="read again in 2 ways: read them apart"):
        together.reader((KVZIP, other))


def test_a_comparison_follows_what_the_second_reading_kept():
    windows = [RNG.integers(0, 256, 48).tolist() for _ in range(2)]
    sizes = {"new_tokens": NEW, "batch": 2, "chunk_size": 32}
    full = kvjax.full()
    truth = continuations.expect(MODEL, full, windows, **sizes)
    method, noted = spied(KVZIP)
    (followed,) = continuations.follow(MODEL, full, [method], windows, truth, **sizes)
    # Beside the reference, and not alone as well.
    assert counted(noted) == {(W + 32, W + 32): 2, (W + 8, W + 8): 2}
    predicted = continuations.predict(MODEL, KVZIP, windows, **sizes)
    np.testing.assert_allclose(followed.log_probs, predicted.log_probs, atol=1e-5)
    layers = continuations.layer_fidelity(MODEL, full, KVZIP, windows, **sizes)
    np.testing.assert_allclose(followed.layers.error, layers.error, atol=1e-5)
    # A first token in every list would be the choice of scores that are all 0.
    unread = KVZIP._replace(reread=None)
    zero = continuations.layer_fidelity(MODEL, full, unread, windows, **sizes)
    assert layers.dropped.mean() < zero.dropped.mean()


def test_beside_full_attention_a_method_reads_again_too():
    both = fidelity.side_by_side(kvjax.full(), KVZIP)
    found = generate.prefill(MODEL, both, PROMPTS, **SIZES).states
    alone = generate.prefill(MODEL, KVZIP, PROMPTS, **SIZES).states
    plain = generate.prefill(MODEL, "full", PROMPTS, **SIZES).states
    for layer, state in enumerate(found):
        np.testing.assert_array_equal(state.candidate.positions, alone[layer].positions)
        jax.tree.map(np.testing.assert_array_equal, state.reference, plain[layer])


def test_moments_of_a_text_are_prompts_that_end_there(expected):
    """What is read again at one moment is not there at the next."""
    found = kept(MODEL, KVZIP, PROMPTS[2], every=35, layer=1, head=1)
    assert found.times == [35, 70]
    for time, positions in zip(found.times, found.positions, strict=True):
        before = PROMPTS[2][: time - 1]
        (scores,) = [scores_by_hand(MODEL, before)[1, 1]]
        best = np.argsort(-scores, kind="stable")[:BUDGET]
        assert positions.tolist() == sorted([*best.tolist(), time - 1])


def test_moments_of_a_text_begin_with_its_first_token():
    """Of one token nothing was read before it, once or twice."""
    found = kept(MODEL, KVZIP, PROMPTS[2][:3], every=1)
    assert found.times == [1, 2, 3]
    assert [x.tolist() for x in found.positions] == [[0], [0, 1], [0, 1, 2]]


def test_an_endless_text_cannot_be_read_twice():
    ring = kvjax.cascade(budget=16)
    twice = ring._replace(reread=Rereading(ring.prefill, 4, "again:"))
    with pytest.raises(ValueError, match="ring reads a prompt twice, and no endless"):
        endless.check_method(MODEL, twice, "ring")


def test_a_plan_has_the_chunk_that_is_read_again():
    sizes = {"weights": planning.Weights(0, 0), "mlp_width": 48, "context": 4096}
    small, large = (
        planning.plan(MODEL.decoder, kvjax.kvzip(chunk=chunk), **sizes)
        for chunk in (256, 2048)
    )
    wide = (large.prompt_temporaries - small.prompt_temporaries) / (2048 - 512)
    spec = MODEL.decoder.cache_spec(1, 1)
    heads = (spec.num_q_heads + 2 * spec.num_kv_heads) * spec.head_dim
    assert wide == 4 * (2 * 32 + 3 * 48 + heads)
    assert large._replace(prompt_temporaries=0) == small._replace(prompt_temporaries=0)


# --- where it has no room


def ways_in(model, method, prompt):
    """Every way on which a prompt is read, and read again."""
    cut, window = len(prompt), [*prompt, 1, 2]
    kwargs = {"max_new_tokens": 1, "chunk_size": 32}
    sizes = {"new_tokens": 2, "batch": 1, "chunk_size": 32}
    example = needles.Example("", window[:-1], "1", 1, 0.0, asked_at=cut)
    return {
        "generate": lambda: generate.generate(model, method, [prompt], **kwargs),
        "prefill": lambda: generate.prefill(model, method, [prompt], **kwargs),
        "saved": lambda: saved_prompt.read(model, method, [prompt], room=1),
        "score": lambda: scoring.score(model, method, [window], prefill=cut),
        "kept": lambda: kept(model, method, window[: cut + 1], every=cut + 1),
        "predict": lambda: continuations.predict(model, method, [window], **sizes),
        "after": lambda: asked_after.answers(
            model, [method], [example], **sizes | {"new_tokens": 1}
        ),
    }


def narrow(tokens, **overrides):
    return tiny_model(num_layers=1, context=tokens, **overrides)


def test_a_second_reading_beyond_the_context_is_refused_before_anything_is_read(
    monkeypatch,
):
    """45 tokens, 28 of the words and 32 at once end at 105, whatever else follows."""
    prompt = PROMPTS[0]
    message = (
        "prompt 0 has 45 tokens; read again behind 28 of words, 32 at once, that is "
        "105, which exceeds the model's context of 104: give the method a smaller "
        "chunk than 32"
    )
    small = registry.parse("kvzip", budget=BUDGET, chunk=31)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "begin", None)  # nobody comes so far
        for way in ways_in(narrow(104), KVZIP, prompt).values():
            with pytest.raises(ValueError, match=message):
                way()
    check_prompts(narrow(104), small, [prompt], 1)
    check_prompts(narrow(105), KVZIP, [prompt], 1)


def test_a_longer_prompt_is_refused_before_it_is_read():
    model = narrow(104)
    read = saved_prompt.read(model, KVZIP, [PROMPTS[0][:40]], room=8)
    with pytest.raises(ValueError, match=r"prompt 0 has 45 tokens; .* that is 105"):
        saved_prompt.extend(model, KVZIP, read, [PROMPTS[0][40:]])


def test_a_second_reading_must_turn_as_the_first_did():
    """Under `dynamic` RoPE frequencies change beyond the original context."""
    sizes = {"kind": "dynamic", "factor": 4.0}
    for original, fits in ((105, True), (104, False)):
        model = tiny_model(
            num_layers=1, rope=Rope(8, original_context=original, **sizes)
        )
        if fits:
            found = state_read(model, [PROMPTS[0]])
            (expected,) = scores_by_hand(model, PROMPTS[0])
            actual = found.states[0].scores[0, :, :45]
            np.testing.assert_allclose(actual, expected, atol=2e-5)
            check_prompts(model, KVZIP, [PROMPTS[0]], 1)
            continue
        message = "exceeds the static length of its rope of 104: give"
        with pytest.raises(ValueError, match=message):
            generate.generate(model, KVZIP, [PROMPTS[0]], max_new_tokens=1)
