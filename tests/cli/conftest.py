"""What the tests of the command line share: a tiny checkpoint, and how to run."""

import jax
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
    """Compiled code goes to a folder of the test, and JAX forgets it afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def undrawn_figures(monkeypatch):
    """Reports have empty figures here: tests/report draws them, shown commands too."""
    monkeypatch.setattr("kvjax.report.pictures.drawn", lambda *_, **__: b"<svg></svg>")


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
