"""`kvjax generate --instruction`: a text behind the prompt, and its tokens told."""

import pytest

from kvjax import cli
from kvjax.decoding import generate
from kvjax.decoding.generate import Generation


@pytest.fixture
def streamed(monkeypatch):
    """What `generate.stream` is given; nothing is computed."""
    noted = []

    def stream(model, method, prompts, **options):
        del method
        text = model.tokenizer.decode(prompts[0])
        noted.append((text, options["instruction"]))
        yield 0, "so"
        return [Generation([1], "so", "length")]

    monkeypatch.setattr(generate, "stream", stream)
    return noted


def test_the_instruction_follows_the_prompt_and_its_tokens_are_counted(
    run, checkpoint, streamed
):
    """In a chat with what the template puts behind it."""
    given = ["generate", "--model", checkpoint, "--prompt", "A book. ", "--method"]
    given += ["citrus:budget=64"]
    assert run(*given, "--instruction", "Who?").strip() == "so"
    run(*given)
    run(*given, "--instruction", "Who?", "--chat")
    assert streamed == [
        ("A book. Who?", 4),
        ("A book. ", None),
        ("<user>A book. Who?", 4),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--instruction="], "--instruction is empty: give some text, or leave it out"),
        (["--instruction", "x", "--save", "y", "--chat"], "one of --save is read for"),
        (["--instruction", "x", "--resume", "y"], "one of --resume is read for any"),
    ],
)
def test_an_instruction_that_nobody_is_told_of_is_refused(capsys, options, message):
    assert cli.run(["generate", "--prompt", "A book.", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_method_that_takes_none_says_so(capsys, checkpoint):
    given = ["generate", "--model", str(checkpoint), "--prompt", "A book. "]
    assert cli.run([*given, "--instruction", "Who?"]) == 2
    error = capsys.readouterr().err
    assert "only methods that select by the question take it: citrus" in error
