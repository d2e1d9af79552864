"""`kvjax generate --draft`: the same text, and what came of the drafts."""

import json
import re

import pytest

from kvjax import cli


def test_text_and_document_are_those_without_drafts(run, checkpoint, capsys):
    given = ["generate", "--model", checkpoint, "--prompt", "line 7 is about", "--json"]
    given += ["--max-new-tokens", 9]
    plain = json.loads(run(*given))
    assert "drafts" not in plain
    drafts = ["--draft", "streaming_llm:budget=64", "--draft-tokens", 3]
    found = json.loads(run(*given, *drafts))
    assert found["text"] == plain["text"]
    assert found["tokens"] == plain["tokens"]
    assert found["draft"] == "streaming_llm:budget=64"
    told = found["drafts"]
    assert told.keys() >= {"drafted", "accepted", "passes", "bytes_per_token"}
    assert told["accepted"] + told["passes"] + 1 == len(found["tokens"])
    assert told["accepted_per_pass"] == told["accepted"] / told["passes"]
    capsys.readouterr()
    words = [str(x) for x in [*given, *drafts] if x != "--json"]
    assert cli.run([*words, "--timings"]) == 0
    printed = capsys.readouterr()
    assert printed.out == plain["text"] + "\n"
    expected = f"{told['accepted']} of {told['drafted']} drafted tokens accepted in"
    assert expected in printed.err
    assert "of cache read a token" in printed.err


def test_a_model_drafts(run, checkpoint):
    given = ["generate", "--model", checkpoint, "--prompt", "line 7", "--json"]
    given += ["--max-new-tokens", 4, "--draft-model", checkpoint]
    drafts = json.loads(run(*given))["drafts"]
    assert drafts["drafted"] == drafts["accepted"], "it is the same model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft-tokens", "4"], "--draft-tokens 4 is of a draft: add --draft or"),
        (["--draft", "h2o", "--resume", "x"], "--draft drafts behind .* of --resume"),
        (["--draft", "h2o", "--chat", "--save", "x"], "one of --save is kept for"),
        (["--draft", "h20"], "unknown method 'h20'; did you mean"),
        (["--draft", "h2o", "--draft-tokens", "0"], "draft_tokens=0 must be at least"),
        (["--draft", "h2o", "--method", "tova"], "tova.* cannot check a draft: "),
    ],
)
def test_drafts_that_nobody_makes_are_refused(fail, checkpoint, options, message):
    given = ["generate", "--model", checkpoint, "--prompt", "hi"]
    assert re.search(message, fail(*given, *options))
