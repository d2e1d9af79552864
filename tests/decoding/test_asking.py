"""Questions asked of prompts that have ended: steps by hand, many on one, saved too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL, tiny_model

import kvjax
from kvjax import registry
from kvjax.decoding import asking, generate, reader, saved_prompt
from kvjax.decoding.sampling import Sampling, row_keys
from kvjax.files.arrays import DamagedError

MODEL = tiny_model(num_layers=1)
RNG = np.random.default_rng(5)
CONTEXTS = [RNG.integers(0, 256, size).tolist() for size in (45, 2, 70)]
QUESTIONS = [RNG.integers(0, 256, size).tolist() for size in (3, 9, 0)]
NEW = 8
ROOM = 9 + NEW
SAMPLED = Sampling(temperature=1.3, top_k=40)
PENALISED = SAMPLED._replace(repetition_penalty=1.2)
STEP = jax.jit(MODEL.decoder.decode_step, static_argnums=3)


def prefilled(method, contexts=CONTEXTS, model=MODEL):
    # Of whatever lengths, by one program.
    return reader.prefill(model, method, contexts, max_new_tokens=ROOM, longest=70)


def asked(method, begun, questions=QUESTIONS, model=MODEL, **options):
    given = {"max_new_tokens": NEW, "eos_ids": ()} | options
    found = asking.ask(model, method, begun, questions, **given)
    return [generation.tokens for generation in found]


def by_hand(method, row, question, temperature=0.0, seed=0):
    """One row alone: each token of the question a step, then each that is chosen."""
    decoder, params = MODEL.decoder, MODEL.params
    begun = prefilled(method, [CONTEXTS[row]])
    states, hidden, fed = begun.states, begun.hidden, list(CONTEXTS[row])
    waiting, found = list(question), []
    key = row_keys(seed, len(CONTEXTS))[row]
    while True:
        if waiting:
            token = waiting.pop(0)
        else:
            logits = decoder.logits(params, hidden)[0]
            token = int(logits.argmax())
            if temperature:
                own = jax.random.fold_in(key, len(found))
                kept = jnp.where(logits < jnp.sort(logits)[-40], -jnp.inf, logits)
                token = int(jax.random.categorical(own, kept / temperature))
            found.append(token)
        if len(found) == NEW:
            return found
        fed.append(token)
        newest = jnp.asarray([([0] * method.rows + fed)[-method.rows :]], jnp.int32)
        states, hidden = STEP(params, states, newest, method)
        hidden = hidden[:, -1]


@pytest.mark.parametrize("spec", ["snapkv", "retro+quest"])
def test_a_question_is_decoded_as_steps_by_hand_are(spec):
    """Ragged: a row chooses while another is still asked; one is asked nothing."""
    method = registry.parse(spec, **SMALL)
    expected = [by_hand(method, i, question) for i, question in enumerate(QUESTIONS)]
    begun = prefilled(method)
    assert asked(method, begun) == expected
    assert asked(method, begun, stream_every=5) == expected
    if spec == "snapkv":
        drawn = by_hand(method, 1, QUESTIONS[1], SAMPLED.temperature, seed=4)
        assert asked(method, begun, sampling=SAMPLED, seed=4)[1] == drawn


def test_what_is_exact_answers_as_if_it_had_seen_the_question():
    """With the penalty for what it was asked, and the keys that its tokens have."""
    method = registry.parse("snapkv:budget=128")
    whole = [[*a, *b] for a, b in zip(CONTEXTS, QUESTIONS, strict=True)]
    begun = prefilled(method)
    options = {"max_new_tokens": NEW, "eos_ids": (), "sampling": PENALISED}
    seen = generate.mentioned(CONTEXTS, MODEL.decoder.vocab_size)
    expected = generate.generate(MODEL, method, whole, **options)
    found = asking.ask(MODEL, method, begun, QUESTIONS, seen=seen, **options)
    assert found == expected  # their texts too


def test_one_prompt_answers_many_questions_each_as_if_alone(traces):
    """More questions than prompts, in two calls of one program; nothing is used up."""
    method = registry.parse("h2o", **SMALL)
    begun = prefilled(method)
    rows = [2, 0, 2, 2, 1]
    many = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[1], QUESTIONS[0][::-1], [7]]
    first = asked(method, begun, many, rows=rows, longest=12)
    compiled = traces["decode_step"]
    other = [[1, 2, 3, 4, 5], [], [6] * 9, [8], QUESTIONS[1]]
    asked(method, begun, other, rows=rows, longest=12)
    assert traces["decode_step"] == compiled
    assert asked(method, begun, many, rows=rows, longest=12) == first
    fresh = prefilled(method, [CONTEXTS[row] for row in rows])
    assert asked(method, fresh, many) == first
    assert len(set(map(tuple, first))) == len(first)
    # Without a copy, the same.
    assert asked(method, fresh, many, keep=False) == first
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(fresh.states))


def test_an_end_in_a_question_ends_nothing():
    method = registry.parse("full")
    begun = prefilled(method)
    said = asked(method, begun)
    end = said[0][3]
    # What is asked with it, and where it would have been said itself.
    for questions in ([[end, 1], [end] * 9, []], [row[:5] for row in said]):
        whole = asked(method, begun, questions)
        cut = [row[: row.index(end) + 1] if end in row else row for row in whole]
        assert asked(method, begun, questions, eos_ids=(end,)) == cut


class Shared(NamedTuple):
    """A state with weights that all rows share, as many as there are rows."""

    inner: object
    weights: jax.Array


def with_weights(inner):
    def init(spec, weights=None):
        weights = jnp.arange(len(CONTEXTS), dtype=jnp.float32)
        return Shared(inner.init(spec), weights)

    def prefill(state, q, k, v, lengths):
        own, out = inner.prefill(state.inner, q, k, v, lengths)
        return state._replace(inner=own), out

    def append(state, k, v):
        return state._replace(inner=inner.append(state.inner, k, v))

    def inspect_step(state, q):
        own, out, diagnostics = inner.inspect_step(state.inner, q)
        return state._replace(inner=own), out, diagnostics

    return inner._replace(
        init=init,
        prefill=prefill,
        finish=lambda state: state._replace(inner=inner.finish(state.inner)),
        append=append,
        inspect_step=inspect_step,
    )


def test_weights_that_rows_share_are_no_rows():
    """Though there are as many as rows; and of sizes that depend on rows only these."""
    method = with_weights(kvjax.full())
    begun = prefilled(method)
    for rows in ([2, 2, 0], [1, 0]):
        taken = asking.taken(method, begun, rows)
        for before, after in zip(begun.states, taken.states, strict=True):
            assert (
                after.inner.length.tolist()
                == before.inner.length[jnp.array(rows)].tolist()
            )
            assert after.weights.tolist() == [0, 1, 2]
            assert after.inner.spec.batch == len(rows)


def sized(inner=kvjax.full()):
    """A method whose arrays are larger the more rows there are."""
    plain = with_weights(inner)

    def init(spec, weights=None):
        room = jnp.zeros((spec.batch, 2 * spec.batch))
        return Shared(inner.init(spec), room)

    return plain._replace(init=init)


def test_mistakes_are_named_before_anything_runs():
    method, odd = kvjax.full(), sized()
    begun = prefilled(method)
    for arguments, options, message in [
        ((method, begun, []), {}, "questions is empty"),
        ((method, begun, [[1]]), {}, "1 questions are asked of 3 prompts: give `rows`"),
        (
            (method, begun, [[1]]),
            {"rows": [3]},
            r"rows=\[3\] must name one of 3 prompts",
        ),
        ((method, begun, [[1]]), {"rows": [0, 1]}, "for each of 1 questions"),
        ((method, begun, [[1], [], [999]]), {}, "row 2 .*id 999"),
        ((method, begun, QUESTIONS), {"max_new_tokens": 0}, "must be at least 1"),
        (
            (odd, prefilled(odd), [[1]]),
            {"rows": [0]},
            "depends on the number of rows: of 3",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            asking.stream(MODEL, *arguments, **options)
    assert not asking.allows_rows(odd, prefilled(odd), 2)
    assert asking.allows_rows(odd, prefilled(odd), 3)
    assert len(asked(odd, prefilled(odd))) == 3  # as many as were read


# --- kept on disk


@pytest.mark.parametrize("spec", ["snapkv", "offload:cache=8+quest"])
def test_a_finished_prompt_is_asked_from_disk_bit_for_bit(spec, tmp_path):
    """Arrays of the host too, whose rows are copied for each question."""
    method = registry.parse(spec, **SMALL)
    read = saved_prompt.read(MODEL, method, CONTEXTS, room=ROOM)
    ended = saved_prompt.finish(MODEL, method, read)
    assert ended.is_finished
    assert saved_prompt.finish(MODEL, method, ended) is ended
    options = {"eos_ids": (), "sampling": PENALISED, "seed": 3}
    expected = saved_prompt.ask(MODEL, method, ended, QUESTIONS, **options)
    assert [len(x.tokens) for x in expected] == [NEW] * 3  # what there is room for
    saved_prompt.save(tmp_path / "a", MODEL, ended, method_name=spec)
    found = saved_prompt.restore(tmp_path / "a", MODEL, method, method_name=spec)
    assert found.is_finished
    held = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)]
    assert held == [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(ended)]
    kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(found.states)]
    before = jax.tree.leaves(ended.states)
    assert kinds == [leaf.sharding.memory_kind for leaf in before]
    assert ("pinned_host" in kinds) == spec.startswith("offload")
    for _ in range(2):
        again = saved_prompt.ask(MODEL, method, found, QUESTIONS, **options)
        assert again == expected
    # Nothing asked, it goes on as what was not kept does.
    options |= {"max_new_tokens": ROOM}
    going_on = saved_prompt.generate(MODEL, method, found, **options)
    assert going_on == generate.generate(MODEL, method, CONTEXTS, **options)


def test_what_has_ended_takes_no_more_of_a_prompt(tmp_path):
    method, name = kvjax.full(), "full"
    model = MODEL
    read = saved_prompt.read(model, method, CONTEXTS, room=ROOM)
    with pytest.raises(ValueError, match="has not ended, and more of a prompt is read"):
        saved_prompt.ask(model, method, read, QUESTIONS)
    ended = saved_prompt.finish(MODEL, method, read)
    with pytest.raises(ValueError, match=r"have ended: .* with saved_prompt\.ask"):
        saved_prompt.extend(model, method, ended, [[1], [], []])
    message = "room for 17 tokens more, .* the 70 .* 18 are wanted: .* room=18"
    with pytest.raises(ValueError, match=message):
        saved_prompt.ask(model, method, ended, QUESTIONS, max_new_tokens=9)
    folder = tmp_path / "a"
    saved_prompt.save(folder, model, ended, method_name=name)
    with pytest.raises(
        ValueError, match="with method full and cannot go on with quest"
    ):
        saved_prompt.restore(folder, model, method, method_name="quest")
    # Arrays of the same shapes, and yet no prompt that may be read on.
    path = folder / saved_prompt.ABOUT
    written = path.read_text()
    path.write_text(written.replace('"finished": true,', ""))
    with pytest.raises(ValueError, match="has format 3, this kvjax reads 2"):
        saved_prompt.about(folder)
    path.write_text(
        written.replace('"finished": true,', "").replace('"format": 3', '"format": 2')
    )
    with pytest.raises(DamagedError, match="are not what was saved"):
        saved_prompt.about(folder)


def test_a_question_of_text_has_its_tokens_in_the_whole_text():
    model, method = MODEL, kvjax.full()
    read = saved_prompt.read(model, method, ["hello"], room=20)
    ended = saved_prompt.finish(MODEL, method, read)
    options = {"max_new_tokens": 5, "eos_ids": ()}
    texts = [" world", ", you"]
    found = saved_prompt.ask(model, method, ended, texts, rows=[0, 0], **options)
    whole = generate.generate(model, method, [f"hello{x}" for x in texts], **options)
    assert found == whole
