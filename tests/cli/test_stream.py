"""`kvjax stream` on the command line: files, stdin, lines of JSON, mistakes."""

import io
import itertools
import json
import sys

import numpy as np
import pytest
from tiny import TEXT

import models
from kvjax import registry
from kvjax.decoding.generate import generate
from kvjax.decoding.scoring import score

METHOD = "streaming_llm:budget=24,num_sinks=2"


class OneByOne(io.BytesIO):
    """Gives a few bytes at a time, as a slow producer does."""

    def read1(self, size=-1):
        return super().read1(min(size, 700))


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(OneByOne(data)))

    return give


def test_scores_and_continues_what_the_api_does(run, checkpoint, stdin):
    """Beyond the model's 512 tokens of context, from stdin, in JSON lines."""
    stdin(TEXT.encode())
    options = ("--model", checkpoint, "--method", METHOD, "--chunk-size", "96")
    more = ("--every", "500", "--new-tokens", "24")
    out = run("stream", *options, *more, "--json")
    *lines, generation = map(json.loads, out.splitlines())
    model = models.load(str(checkpoint), dtype="float32")
    tokens = model.tokenizer.encode(TEXT)
    assert len(tokens) > 3 * model.decoder.context
    assert len(lines) >= 3
    counts = [line["tokens"] for line in lines]
    assert counts[-1] == len(tokens)
    # The last line comes at the end, however near.
    assert all(b - a >= 500 for a, b in itertools.pairwise(counts[:-1]))
    method = registry.parse(METHOD)
    scores = score(model, method, [tokens], prefill=len(tokens) - 1, chunk_size=96)
    nats = -np.cumsum(scores.log_probs[0].astype(np.float64))
    for line in lines:
        np.testing.assert_allclose(line["nats"], nats[line["tokens"] - 2], rtol=1e-5)
        assert line["bytes"] == line["tokens"] - 1
        bits = line["nats"] / np.log(2) / line["bytes"]
        np.testing.assert_allclose(line["bits_per_byte"], bits)
    (expected,) = generate(model, method, [tokens], max_new_tokens=24, chunk_size=96)
    assert generation == expected._asdict()


def test_lines_to_read_and_text_to_use(run, checkpoint, text_file, capsys):
    options = ("--text", text_file, "--model", checkpoint, "--method", METHOD)
    out = run("stream", *options)
    assert "bits/byte" in out
    assert f"{len(TEXT):,} tokens" in out
    from kvjax import cli

    assert cli.run(["stream", *map(str, options), "--new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "bits/byte" in captured.err
    assert "bits/byte" not in captured.out


def test_lines_of_json_end_by_the_error(checkpoint, tmp_path, monkeypatch, capsys):
    """Also in the continuation: by a token that the text does not have."""
    from kvjax import cli

    model = models.load(str(checkpoint), dtype="float32")
    (tmp_path / "text").write_text(TEXT[:60])
    (said,) = generate(model, METHOD, [TEXT[:60]], max_new_tokens=16, eos_ids=())
    read = model.tokenizer.encode(TEXT[:60])
    token = next(token for token in said.tokens if token not in read)
    embedding = model.params["embedding"].at[token].set(np.inf)
    broken = model._replace(params=model.params | {"embedding": embedding})
    # No file holds such weights: loading refuses them.
    monkeypatch.setattr("kvjax.cli.stream.load", lambda *_: broken)
    options = ("--text", tmp_path / "text", "--json")
    command = ["stream", *map(str, options), "--method", METHOD, "--new-tokens", "32"]
    assert cli.run(command) == 2
    captured = capsys.readouterr()
    *_, last = map(json.loads, captured.out.splitlines())
    assert "not finite" in last["error"]
    assert last["error"] in captured.err


def test_help_shows_an_example(run):
    out = " ".join(run("stream", "--help").split())
    assert "Example: kvjax stream --text book.txt" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--every", "0"], "every=0 must be at least 1"),
        (["--new-tokens", "-1"], "new_tokens=-1 must be at least 0"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--temperature", "-1"], "temperature=-1.0 must be"),
    ],
)
def test_mistakes_that_need_no_model(fail, stdin, options, message):
    stdin(b"text")
    assert message in fail("stream", *options)


def test_mistakes(fail, checkpoint, stdin):
    model = ("stream", "--model", checkpoint)
    stdin(b"text")
    message = "what quest:budget=64 holds grows with the text"
    assert message in fail(*model, "--method", "quest:budget=64")
    stdin(b"")
    assert "the text is empty" in fail(*model)
    stdin(b"ab\xff")
    assert "- is not UTF-8: byte 0xff at offset 2" in fail(*model)
