"""What the tests of the command line share: a tiny checkpoint, and how to run."""

import compiling
import pytest
from tiny import TEXT, byte_tokenizer, tiny_model

import models
from kvjax import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_model(num_layers=1, context=512)
    model = model._replace(tokenizer=byte_tokenizer(), eos_ids=(258,))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.save_pretrained(model, folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The user's cache is a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def compiled_code_is_forgotten():
    """Commands turn JAX's cache on: no other module's programs are to be read there."""
    with compiling.cache():
        yield


@pytest.fixture(autouse=True)
def undrawn_figures(monkeypatch):
    """Reports have empty figures here: tests/report draws them, shown commands too."""
    monkeypatch.setattr("kvjax.report.pictures.drawn", lambda *_, **__: b"<svg></svg>")


@pytest.fixture(autouse=True)
def kept_programs(monkeypatch):
    """What is compiled for tiny models stays: comparisons of other tests run it too."""
    monkeypatch.setattr("kvjax.evaluation.compare_runs.drop_programs", lambda: None)


@pytest.fixture
def run(capsys):
    """Runs a command and returns what it prints; it must succeed."""

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def fail(capsys):
    """Runs a command that must fail as users' mistakes do; returns its one line."""

    def fail(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("kvjax: error: ")
        return line

    return fail
