"""Questions asked after their context: each context read once, the answers the same."""

import json
import threading

import pytest
from tiny import SMALL, TEXT, tiny_model

import kvjax
from kvjax import registry
from kvjax.decoding import asking, generate, reader
from kvjax.evaluation import asked_after, compare_runs, one_task
from kvjax.evaluation.tasks import needles
from kvjax.evaluation.tasks import own as tasks_own

MODEL = tiny_model(num_layers=1)
FULL, SNAPKV = kvjax.full(), registry.parse("snapkv", **SMALL)
QUESTIONS = {
    "The key is under the mat. " * 3: ["Where?", "What is under the mat?", "Who?"],
    "A short text.": ["How long?"],
    "Numbers: 1, 2, 3, 4, 5.": ["How many?", "And then?"],
}


@pytest.fixture(scope="module")
def questions():
    """In turn about one text and another."""
    lines = [
        json.dumps({"context": context, "question": asked[i], "answer": "mat"})
        for i in range(3)
        for context, asked in QUESTIONS.items()
        if i < len(asked)
    ]
    return tasks_own.parse("\n".join(lines), "t")


@pytest.fixture(scope="module")
def examples(questions):
    return tasks_own.prompts(MODEL.tokenizer, questions, context=200, new_tokens=6)


def count_reading(monkeypatch):
    """The rows of every batch of contexts that is read."""
    batches, really = [], asked_after.together.read_checked

    def read(model, methods, prompts, options):
        batches.append([bytes(prompt).decode() for prompt in prompts])
        return really(model, methods, prompts, options)

    monkeypatch.setattr(asked_after.together, "read_checked", read)
    return batches


@pytest.fixture(scope="module")
def alone(examples):
    """Each question after a reading of its own, the context alone in the batch."""

    def answer(method, example):
        context, question = (
            example.prompt[: example.asked_at],
            example.prompt[example.asked_at :],
        )
        sizes = {"max_new_tokens": 50, "longest": 80}
        begun = reader.prefill(MODEL, method, [context], **sizes)
        (said,) = asking.ask(
            MODEL, method, begun, [question], max_new_tokens=6, longest=30
        )
        return said.text

    return [[answer(method, x) for x in examples] for method in (FULL, SNAPKV)]


def test_every_context_is_read_once_for_all_methods(examples, alone, monkeypatch):
    expected = alone
    assert expected[0] != expected[1]
    read = count_reading(monkeypatch)
    told, done = [], []
    found = compare_runs.retrieve(
        MODEL,
        [FULL, SNAPKV],
        examples,
        new_tokens=6,
        batch=2,
        question="after",
        on_answers=lambda *answer: told.append(answer),
        progress=done.append,
    )
    assert [one.answers for one in found] == expected
    assert [one.scores for one in found] == [
        [example.score(text) for example, text in zip(examples, said, strict=True)]
        for said in expected
    ]
    first, second, third = QUESTIONS
    assert read == [[first, second], [third, first]]  # the last fills the batch up
    assert sorted(told) == sorted(
        (place, index, [text])
        for place, said in enumerate(expected)
        for index, text in enumerate(said)
    )
    assert done == sorted(done)
    assert done[-1] == 1


def test_answers_come_as_they_are_given(examples, monkeypatch):
    """What was answered is not lost if a later question is cut short."""
    fed, really = [], asked_after.feeding.feed

    def feed(*arguments, **options):
        fed.append(threading.current_thread())
        return really(*arguments, **options)

    monkeypatch.setattr(asked_after.feeding, "feed", feed)
    asked = {}
    for threads in (1, 2):
        fed.clear()
        asked[threads] = []
        asked_after.answers(
            MODEL,
            [SNAPKV],
            examples,
            new_tokens=6,
            batch=2,
            threads=threads,
            on_answer=lambda *_, told=asked[threads]: told.append(len(fed)),
        )
    main = threading.main_thread()
    assert len(asked[1]) == len(asked[2]) == len(examples)
    assert asked[1][0] == 1
    assert asked[1] == sorted(asked[1])
    assert asked[2][0] > 1
    assert all(thread is not main for thread in fed)


def test_full_attention_answers_as_if_it_had_seen_the_question(monkeypatch):
    """And what has a context of its own is not copied, the last batch filled up too."""
    made = needles.passkey(MODEL.tokenizer, TEXT, context=300, n=3)
    monkeypatch.setattr(asking, "taken", None)
    seen, after = (
        compare_runs.retrieve(
            MODEL, [FULL], made, question=question, new_tokens=6, batch=2
        )[0]
        for question in ("seen", "after")
    )
    assert after == seen


def test_a_task_asks_after_its_context(questions, alone):
    options = {"context": 200, "new_tokens": 6, "questions": questions, "batch": 2}
    run = one_task.run("own", MODEL, SNAPKV, FULL, "", question="after", **options)
    assert run["question"] == "after"
    assert [example["answer"] for example in run["examples"]] == alone[1]


def test_the_context_may_be_filled_to_the_last_token():
    """By each example: a long context and another's long question are no example."""
    model = tiny_model(num_layers=1, context=64)
    lines = [
        {"context": "c" * 50, "question": "q", "answer": "a"},
        {"context": "c" * 20, "question": "q" * 36, "answer": "a"},
    ]
    questions = tasks_own.parse("\n".join(map(json.dumps, lines)), "t")
    made = tasks_own.prompts(model.tokenizer, questions, context=64, new_tokens=6)
    sizes = {"new_tokens": 6, "batch": 2, "question": "after"}
    (found,) = compare_runs.retrieve(model, [FULL], made, **sizes)
    whole = [example.prompt for example in made]
    said = generate.generate(model, FULL, whole, max_new_tokens=6)
    assert found.answers == [generation.text for generation in said]
    sizes["new_tokens"] = 12
    with pytest.raises(ValueError, match=r"prompt 0 has 53 tokens; .*=12 .* of 64"):
        compare_runs.retrieve(model, [FULL], made, **sizes)


def test_mistakes_are_named(examples):
    sizes = {"new_tokens": 6, "batch": 2}
    bare = [examples[0], examples[1]._replace(asked_at=0)]
    for given, options, message in [
        (bare, {"question": "after"}, "example 1 has no context that could be read"),
        (examples, {"question": "late"}, "question='late' must be one of seen, after"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare_runs.retrieve(MODEL, [FULL], given, **sizes, **options)
    for task in one_task.PREDICTION:
        with pytest.raises(ValueError, match=f"--task {task} asks nothing"):
            one_task.check_question(task, "after")
