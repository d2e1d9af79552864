"""Samples of claims: kept one by one, gone on with, the same however many at once."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from tiny import TEXT, tiny_model

import kvjax
from kvjax.evaluation import claims, continuations, fidelity
from kvjax.evaluation.claims import runner, samples, session
from kvjax.evaluation.claims.claim import (
    Claim,
    Measured,
    as_dict,
    in_whole,
    judge,
    of_dict,
)
from kvjax.evaluation.claims.measure import asked, layers, texts
from kvjax.evaluation.claims.papers import cascade, retro
from kvjax.evaluation.tasks import haystack

KEY = "toy", 1


def measured(value, low, high):
    return Measured(value, low, high, 5)


def a_claim(**changes) -> Claim:
    plain = claims.named(["retro-bytes"])[0]
    changes = dict(name="toy", measure=lambda s: measured(0.2, 0.1, 0.3)) | changes
    return dataclasses.replace(plain, **changes)


def made(first, last):
    return [10.0 * i for i in range(first, last)]


def test_what_a_kill_leaves_is_not_measured_again(tmp_path):
    asked_for = []

    def make(first, last):
        if first == 4:
            raise KeyboardInterrupt
        asked_for.append((first, last))
        return made(first, last)

    with pytest.raises(KeyboardInterrupt):
        samples.Samples(tmp_path).values(KEY, 5, make, batch=2)
    assert asked_for == [(0, 2), (2, 4)]
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["key"] == list(KEY)
    again, seen = samples.Samples(tmp_path), []
    again.report(lambda *counts: seen.append(counts), seen.append)
    found = again.values(
        KEY, 5, lambda a, b: seen.append((a, b)) or made(a, b), batch=2
    )
    assert found == made(0, 5)
    assert seen == [(4, 1), (4, 5), 1.0]
    assert again.reused[0] > 0
    # Fewer are the first of them, more go on; another key is measured by itself.
    assert again.values(KEY, 3, make, batch=2) == made(0, 3)
    longer = samples.Samples(tmp_path)
    assert longer.values(KEY, 9, lambda a, b: made(a, b), batch=4) == made(0, 9)
    assert longer.values(("toy", 2), 1, made, batch=4) == [0.0]
    assert len(list(tmp_path.iterdir())) == 2


def test_samples_that_are_no_json_say_what_to_do(tmp_path):
    samples.Samples(tmp_path).values(KEY, 1, made, batch=1)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-9])
    with pytest.raises(samples.DamagedError, match=r"is damaged .* remove it"):
        samples.Samples(tmp_path).values(KEY, 1, made, batch=1)
    with pytest.raises(ValueError, match="0 to 1 gave other counts"):
        samples.Samples().values(KEY, 1, lambda first, last: [1, 2], batch=1)


@pytest.mark.parametrize("context", session.CONTEXTS)
def test_sizes_fit_the_longest_input(context):
    for cut in session.CUTS:
        sizes = session.fitted(context, n=20, cut=cut)
        assert sizes.context + sizes.text_steps == context == sizes.layer_context
        assert sizes.cache << 4 == context == sizes.cascade_context
        assert 1 / 32 <= 1 / cut <= 1 / 4
        # Retrieval reads more than what it always reads.
        assert sizes.share * sizes.context >= 40
        assert sizes.share >= 1 / (4 * cut)
    # The papers' own: an eighth, and fifteen in a hundred.
    sizes = session.fitted(context, n=20)
    shared = session.session(lambda name: MODEL, kvjax.parse, "", sizes=sizes)
    assert retro._quest(shared).endswith(f"budget_ratio={retro.SHARE}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 0, 8), "n=0 and batch=4 must be at least 1"),
        ((40, 1, 4), "context=40 must be a multiple of 16"),
        ((64, 1, 9), r"cut=9 in \[2, context / 8\]"),
    ],
)
def test_sizes_that_fit_nothing(arguments, message):
    context, n, cut = arguments
    with pytest.raises(ValueError, match=message):
        session.fitted(context, n=n, cut=cut)


# The same numbers, batch by batch.

MODEL = tiny_model(num_layers=1)
SIZES = session.QUICK._replace(
    layer_context=96,
    layer_windows=3,
    layer_steps=4,
    context=64,
    windows=3,
    text_steps=16,
    examples=3,
    cache=16,
    cascade_stride=16,
    cascade_context=96,
    cascade_windows=3,
    keys=3,
    thorough=True,
)


def toy(batch, folder=None, model=MODEL, **changes):
    return session.session(
        lambda name: model,
        kvjax.parse,
        TEXT * 4,
        sizes=SIZES._replace(batch=batch, **changes),
        samples=samples.Samples(folder),
    )


@pytest.fixture(scope="module")
def at_once():
    return toy(None)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return toy(2, tmp_path_factory.mktemp("samples"))


NAME = session.SOFTMAX
QUEST = "quest:budget=16,page_size=4"


def test_layers_lose_the_same_a_window_at_a_time(at_once, by_two):
    whole, parts = (layers.run(one, NAME, QUEST) for one in (at_once, by_two))
    for name, expected in whole.found._asdict().items():
        actual = getattr(parts.found, name)
        np.testing.assert_allclose(actual, expected, atol=2e-6, err_msg=name)
    assert parts[1:] == whole[1:]
    ends = {"num_sinks": 2, "tail": 4}
    expected = layers.entropies(at_once, NAME, **ends)
    np.testing.assert_allclose(
        layers.entropies(by_two, NAME, **ends), expected, rtol=1e-5
    )


def test_text_is_predicted_the_same_two_windows_at_a_time(at_once, by_two):
    found = texts.log_probs(by_two, NAME, QUEST)
    np.testing.assert_allclose(
        found, texts.log_probs(at_once, NAME, QUEST), rtol=1e-4, atol=1e-4
    )
    # The divergence is what kvjax compare says.
    windows = texts.windows(by_two, NAME)
    logits = [
        continuations.predict(
            MODEL, kvjax.parse(spec), windows, new_tokens=16, batch=3
        ).logits
        for spec in ("full", QUEST)
    ]
    expected = fidelity.agreement(*logits).kl.mean(1)
    assert expected.min() > 1e-6
    np.testing.assert_allclose(
        texts.divergence(by_two, NAME, QUEST), expected, rtol=1e-3, atol=1e-7
    )


def test_keys_and_pages_are_the_same_two_windows_at_a_time():
    """In two layers: keys of the first know nothing of attention."""
    model = tiny_model(num_layers=2)
    both = toy(None, model=model), toy(2, model=model)
    for measure in (retro.key_errors, retro._ages, retro._nats):
        expected, found = (measure(one, retro._retro(one, 2)) for one in both)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)
    assert retro.key_errors(both[1], retro._retro(both[1], 2)).min() > 1e-4


def test_cascades_are_the_same_two_rows_at_a_time(at_once, by_two):
    spec = cascade._cascade(at_once)
    expected, found = (texts.nats_while_read(one, spec) for one in (at_once, by_two))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    expected, found = (cascade._recalled(one, spec, 2) for one in (at_once, by_two))
    np.testing.assert_array_equal(found, expected)


def test_the_right_answer_is_fed_behind_its_prompt(by_two):
    examples: list[Any] = asked.examples(by_two, NAME, "passkey")
    # One answers with less than the others beside it.
    examples[1] = examples[1]._replace(answer=examples[1].answer[:2], answer_tokens=2)
    found = asked.nats(by_two, NAME, "passkey", "full")
    for example, nats in zip(examples, found, strict=True):
        whole = haystack.whole(MODEL.tokenizer, example)
        scored = kvjax.score(MODEL, kvjax.full(), [whole], prefill=8).log_probs
        expected = -scored[0, len(example.prompt) - 1 :].mean()
        assert nats == pytest.approx(expected, rel=1e-4)
        assert len(whole) <= 80
    # More examples begin with those of fewer.
    more = asked.examples(toy(2, examples=4), NAME, "passkey")
    assert more[0] == examples[0]
    assert more[2] == examples[2]
    assert len(more) == 4


def test_a_question_that_comes_after_is_measured_by_itself(by_two):
    asked_when = {}
    for question in ("seen", "after"):
        before = set(by_two.samples._folder.iterdir())
        options = {"question": question}
        found = asked.asked_scores(by_two, NAME, "passkey", QUEST, **options)
        assert found.shape == (3,)
        (file,) = set(by_two.samples._folder.iterdir()) - before
        asked_when[question] = json.loads(file.read_text())["key"]
    assert asked_when["seen"] != asked_when["after"]


# Claims on another model.


def test_a_model_has_the_roles_of_its_attention():
    def judged(alpha):
        shared = toy(2)._replace(models=session.roles("mine", alpha))
        names = ["entmax-dropped", "cascade-memory", "refresh-training"]
        rows = runner.run(claims.on("mine", names), shared)
        return {row.claim.name: row for row in rows}

    soft, sparse = judged(1.0), judged(1.5)
    assert soft["cascade-memory"].verdict == "reproduced"
    assert "attends by softmax" in soft["entmax-dropped"].reason
    assert "trained in RefreshKV's setting" in soft["refresh-training"].reason
    assert "claim is about softmax" in sparse["cascade-memory"].reason
    assert "claim is about softmax" in sparse["entmax-dropped"].reason  # beside Quest


def test_claims_on_another_model_say_so_and_not_why_the_embedded_ones_fail():
    every = claims.on("my model")
    assert [one.name for one in every[: len(claims.ALL)]] == [
        one.name for one in claims.ALL
    ]
    assert len({one.name for one in every}) == len(every) > len(claims.ALL)
    for one in every:
        assert not one.because
        assert one.command == f"kvjax reproduce --model 'my model' --claim {one.name}"
        assert "embedded" not in one.note
    of = dict(model="my model", because={})
    assert dataclasses.replace(claims.MORE[0], **of) in every
    assert not {one.name for one in claims.MORE} & {one.name for one in claims.ALL}


def test_a_row_is_read_as_it_was_written():
    claim = a_claim()
    for found in (measured(0.2, 0.1, 0.3), in_whole(-0.2, 7)):
        row = judge(claim, found, 1.5, 2.5)
        assert of_dict(claim, json.loads(json.dumps(as_dict(row)))) == row


def test_a_row_that_stands_is_not_measured_and_a_misfit_stops_no_other():
    def misfit(session):
        raise ValueError("context=64 is too short.")

    def broken(session):
        raise AssertionError("measured again")

    chosen = [a_claim(name="misfit", measure=misfit), a_claim(measure=broken)]
    stands = {"toy": judge(chosen[1], measured(0.2, 0.1, 0.3))}
    rows = runner.run(chosen, toy(2), earlier=stands, is_tolerant=True)
    assert rows[1] is stands["toy"]
    assert rows[0].verdict == "not measured"
    assert rows[0].reason.endswith("on this model: context=64 is too short.")
    with pytest.raises(ValueError, match="too short"):
        runner.run(chosen, toy(2), earlier=stands)

    def damaged(session):
        raise samples.DamagedError("a file is damaged.")

    # Nothing to do with the model: whoever runs it has to know.
    with pytest.raises(samples.DamagedError):
        runner.run([a_claim(measure=damaged)], toy(2), is_tolerant=True)
