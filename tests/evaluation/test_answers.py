"""Answers are kept as they come, and what an interruption cut short is not."""

import hashlib
import json

import pytest

from kvjax.evaluation import answers
from kvjax.evaluation.tasks import needles, own

EXAMPLE = needles.Example("x" * 200 + "The pass key is ", [1, 2, 3], "12345", 5, 0.5)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_answer_is_a_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    keep = answers.keeper(path, "some model")
    keep("full", "passkey", 3, EXAMPLE, "12345\n")
    (line,) = read(path)  # at once
    assert line == {
        "model": "some model",
        "method": "full",
        "task": "passkey",
        "example": 3,
        "prompt_tokens": 3,
        "prompt_sha256": hashlib.sha256(EXAMPLE.text.encode()).hexdigest(),
        "prompt_end": EXAMPLE.text[-120:],
        "expected": "12345",
        "generated": "12345\n",
        "score": 1,
    }
    several = own.Own("Q", [1], "a", ("a", "b"), 4, False)
    keep("full", "own", 0, several, "c\u2028\ufffd")
    assert read(path)[1]["expected"] == ["a", "b"]
    assert read(path)[1]["score"] == 0
    answers.keeper(None, "some model")("full", "own", 0, several, "c")


def test_what_is_gone_on_with_keeps_the_answers_of_rows_that_are_done(tmp_path):
    path = tmp_path / "answers.jsonl"
    for model in ("one", "two"):
        for method in ("full", "quest"):
            answers.keeper(model=model, path=path)(method, "passkey", 0, EXAMPLE, "1")
    with open(path, "a") as file:
        file.write('{"model": "one", "method": "fu')  # the power went
    answers.begin(path, {("one", "full"), ("two", "quest")})
    kept = [(line["model"], line["method"]) for line in read(path)]
    assert kept == [("one", "full"), ("two", "quest")]
    answers.begin(path)
    assert path.read_text() == ""


def test_a_file_that_is_there_is_not_lost(tmp_path):
    path = tmp_path / "answers.jsonl"
    answers.check_free(None)
    answers.check_free(path)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"answers\.jsonl is there already"):
        answers.check_free(path)
    answers.check_free(path, overwrite=True)
    answers.check_free(path, go_on=True)
    with pytest.raises(FileExistsError, match="is there already"):
        answers.check_free(tmp_path, overwrite=True)
    with pytest.raises(
        NotADirectoryError, match="a folder: give --save-answers another"
    ):
        answers.check_free(path / "below.jsonl")
