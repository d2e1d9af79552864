"""Questions of the user's: what a line may be, and which replies are right."""

import json

import pytest
from tiny import ByteTokenizer, byte_tokenizer, tiny_model

import kvjax
from kvjax.evaluation import one_task
from kvjax.evaluation.tasks import own as tasks_own


def lines(*objects):
    return "\n".join(
        x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in objects
    )


WHERE = {"context": "The key is under the mat.", "question": "Where?", "answer": "mat"}


def test_a_line_is_a_question():
    given = lines(
        WHERE | {"id": 7},
        "",
        {"question": "2 + 2 =", "answer": ["4", "four"]},
        WHERE | {"context": "one\u2028line\r"},
    )
    first, second, third = tasks_own.parse(given, "tasks.jsonl")
    assert first.text == "The key is under the mat.\n\nWhere?"
    assert first.answers == ("mat",)
    assert (second.text, second.answers) == ("2 + 2 =", ("4", "four"))
    assert second.where == "tasks.jsonl, line 3"
    assert third.text == "one\u2028line\r\n\nWhere?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t has no line: give one JSON object a question"),
        (lines(WHERE, "{"), "t, line 2: is no JSON: Expecting property name"),
        (lines("[1]"), "t, line 1: is a list, and must be an object"),
        (lines("[" * 100_000), "t, line 1: is no JSON"),
        (lines("1" * 5000), "t, line 1: is no JSON"),
        (lines({"context": "x", "answer": "y"}), "has no question, only context, ans"),
        (lines({"context": "x", "question": "y"}), "has no answer, only context, que"),
        (lines({}), "has no question, only nothing"),
        (lines(WHERE | {"question": " "}), "question=' ' must be a text that says"),
        (lines(WHERE | {"context": 3}), "context=3 must be a text"),
        (lines(WHERE | {"context": None}), "context=None must be a text"),
        (lines(WHERE | {"answer": []}), r"answer=\[\] must be a text"),
        (lines(WHERE | {"answer": ["a", 5]}), r"answer=\['a', 5\] must be a text"),
        (
            lines(WHERE | {"answer": "\\ud800"}).replace("\\\\", "\\"),
            "answer holds half",
        ),
        (
            lines({"Context": "x", "question": "y", "answer": "z"}),
            "has 'Context': write 'context'",
        ),
    ],
)
def test_a_line_that_is_none_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        tasks_own.parse(text, "t")


def own(*answers, is_chat=False):
    return tasks_own.Own("", [], answers[0], answers, 9, is_chat)


@pytest.mark.parametrize(
    ("answers", "reply", "score"),
    [
        (["mat"], "Under the mat.", 1),
        (["mat"], "\n\n  Under the MAT", 1),
        (["mat"], "Mathematics", 0),
        (["mat"], "a doormat", 0),
        (["mat"], "Nowhere.\nUnder the mat.", 0),
        (["4", "four"], "It is four", 1),
        (["4"], "It is 42", 0),
        (["door  mat"], "the door\tmat, then", 1),
        (["$5"], "it costs $5.", 1),
        (["北京"], "答案是北京。", 1),
        (["a.b"], "axb", 0),
        (["東京"], "東京です", 1),
        (["Jos"], "José", 0),
        (["Jos"], "Jose\u0301", 0),
        (["José"], "It was JOSE\u0301.", 1),
        (["мир"], "мирный", 0),
        (["3"], "3.14", 0),
        (["3"], "It is 3.", 1),
        (["3"], "3, 4", 1),
        (["14"], "3.14", 0),
        (["3"], "-3", 0),
        (["3"], "x=\u22123", 0),
        (["-3"], "It is -3", 1),
        (["12"], "10-12", 1),
        (["12"], "at 12:30", 0),
        (["30"], "at 12:30", 0),
        (["12:30"], "at 12:30", 1),
        (["1"], "1,500", 0),
        (["500"], "1,500", 0),
        (["$5"], "$5.99", 0),
        (["$5"], "-$5", 0),
        (["$5"], "it is $5, then", 1),
    ],
)
def test_a_reply_is_right_if_it_says_an_answer(answers, reply, score):
    assert own(*answers).score(reply) == score


def test_in_a_chat_the_whole_turn_is_the_reply():
    assert own("mat").score("Let me see.\nUnder the mat.") == 0
    assert own("mat", is_chat=True).score("Let me see.\nUnder the mat.") == 1


def test_prompts_are_the_tokens_of_the_text_or_of_the_template():
    questions = tasks_own.parse(lines(WHERE), "t")
    sizes = {"context": 100, "new_tokens": 9}
    (plain,) = tasks_own.prompts(ByteTokenizer(), questions, **sizes)
    assert bytes(plain.prompt).decode() == plain.text == questions[0].text
    tokenizer = byte_tokenizer()
    (asked,) = tasks_own.prompts(tokenizer, questions, **sizes, is_chat=True)
    assert asked.text == f"<user>{questions[0].text}"
    assert asked.prompt == tokenizer.apply_chat_template(
        [{"role": "user", "content": questions[0].text}]
    )
    with pytest.raises(ValueError, match="no chat template: leave chat out"):
        tasks_own.prompts(ByteTokenizer(), questions, **sizes, is_chat=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((40, 8), "t, line 2: its prompt has 33 tokens; .*=8 that exceeds context=40"),
        ((50, 2), "t, line 2: its answer takes 3 tokens, more than new_tokens=2"),
    ],
)
def test_a_line_that_does_not_fit_is_named(sizes, message):
    short = {"question": "a", "answer": "b"}
    questions = tasks_own.parse(lines(short, WHERE), "t")
    with pytest.raises(ValueError, match=message):
        tasks_own.prompts(
            ByteTokenizer(), questions, context=sizes[0], new_tokens=sizes[1]
        )


def test_questions_are_a_task():
    model = tiny_model(num_layers=1)
    questions = tasks_own.parse(lines(WHERE, {"question": "a", "answer": "b"}), "t")
    kept = []
    result = one_task.run(
        "own",
        model,
        kvjax.full(),
        kvjax.full(),
        "",
        context=60,
        new_tokens=6,
        questions=questions,
        on_answer=lambda *answer: kept.append(answer),
    )
    assert result["accuracy"]["n"] == 2
    replies = [example["answer"] for example in result["examples"]]
    assert [(index, said) for index, _, said in kept] == list(enumerate(replies))
    assert [example.answer for _, example, _ in kept] == ["mat", "b"]
    # What greedy decoding says after each prompt.
    from kvjax.decoding.generate import generate

    prompts = [question.text for question in questions]
    said = generate(model, kvjax.full(), prompts, max_new_tokens=6)
    assert replies == [generation.text for generation in said]


def test_questions_about_one_text_share_its_tokens():
    other = WHERE | {"question": "What?", "answer": "key"}
    questions = tasks_own.parse(
        lines(WHERE, other, {"question": "a", "answer": "b"}), "t"
    )
    sizes = {"context": 100, "new_tokens": 9}
    for tokenizer, is_chat in ((ByteTokenizer(), False), (byte_tokenizer(), True)):
        first, second, none = tasks_own.prompts(
            tokenizer, questions, **sizes, is_chat=is_chat
        )
        opening = "<user>" * is_chat
        shared = tokenizer.decode(first.prompt[: first.asked_at])
        assert shared == opening + WHERE["context"]
        assert second.prompt[: second.asked_at] == first.prompt[: first.asked_at]
        assert first.text[len(shared) :] == "\n\nWhere?"
        assert none.asked_at == 0
    tasks_own.check_contexts(questions[:2])
    with pytest.raises(ValueError, match="t, line 3: has no context, and --question"):
        tasks_own.check_contexts(questions)
