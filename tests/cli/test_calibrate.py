"""`kvjax calibrate`: a table and a choice, or one line that says why there is none."""

import json

import pytest
from tiny import TEXT

from kvjax import cli, registry
from kvjax.cli import calibrate as command


@pytest.fixture
def prompts(tmp_path):
    """Ten prompts, a JSON object a line."""
    lines = [{"prompt": TEXT[20 * i : 20 * i + 90 + i]} for i in range(10)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


OPTIONS = ("--method", "streaming_llm", "--budget", "88,16", "--new-tokens", "4")
BOUND = ("--at-most", "0.4", "--confidence", "0.9")


def test_the_choice_is_a_spec_and_the_last_line(run, checkpoint, prompts, capsys):
    given = "calibrate", "--model", checkpoint, "--text", prompts, *OPTIONS, *BOUND
    document = json.loads(run(*given, "--json"))
    command.show(document)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == document["choice"]
    assert registry.parse(document["choice"])
    assert document["choice"] == "streaming_llm:budget=88"
    first, second = document["rows"]
    assert first["outcome"] == "holds"
    assert 0 <= first["loss"] < first["upper"] <= 0.4
    assert second["method"] == "streaming_llm:budget=16"
    assert second["bytes"] < first["bytes"] < document["full_bytes"]
    assert document["n"] == 10
    assert document["longest"] == 99
    assert "10 prompts of mine.jsonl" in " ".join(printed.split())


def test_questions_are_answered(checkpoint, tmp_path, capsys):
    lines = [{"question": f"{i} is", "answer": "no such thing"} for i in range(12)]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = ["calibrate", "--model", str(checkpoint), "--text", str(path), *BOUND]
    arguments += ["--loss", "answer", "--method", "streaming_llm", "--budget", "24"]
    assert cli.run([*arguments, "--new-tokens", "32", "--context", "64"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]  # progress is above
    assert "no method is known to lose at most 0.4 with confidence=0.9 on" in line
    assert "the nearest is streaming_llm:budget=24, whose loss of 1 may be 1;" in line


def test_too_few_prompts(fail, checkpoint, prompts):
    command = "calibrate", "--model", checkpoint, "--text", prompts, *OPTIONS
    line = fail(*command, "--at-most", "0.05")
    assert "10 prompts cannot bound a loss by 0.05 of its range" in line
    assert "give at least 68" in line
    assert "n=11 exceeds the prompts that there are, 10" in fail(*command, "--n", "11")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss ppl", "loss='ppl' must be one of kl, answer"),
        ("--by speed", "by='speed' must be one of read, held"),
        ("--at-most 0", "at_most=0.0 must be above 0 and below 1"),
        ("--at-most 2", "at_most=2.0 must be above 0 and below 1"),
        ("--clip 0", "clip=0.0 must be above 0"),
        ("--confidence 1", "confidence=1.0 must be in (0, 1)"),
        ("--n 0", "n=0 must be at least 1"),
        ("--new-tokens 1", "new_tokens=1 must be in [2, context=512)"),
        ("--budget many", "--budget many must be whole numbers"),
        ("--method qest", "did you mean 'quest'?"),
        ("--method snapkv --budget 16", "budget=16 must exceed window=32"),
        ("--chat", "--loss kl asks nothing: leave --chat out"),
        ("--loss answer", "--loss answer takes questions of yours"),
        ("--loss answer --text nowhere.jsonl", "nowhere.jsonl"),
        ("--text nowhere.txt", "nowhere.txt"),
    ],
)
def test_mistakes_that_need_no_model(fail, arguments, message):
    assert message in fail("calibrate", *arguments.split())
