"""`--weights`: one option of all commands that load a model."""

import json

import pytest
from tiny import byte_tokenizer, tiny_model

import models
from kvjax import cli
from kvjax.cli import options


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_generating_with_packed_weights(run, tmp_path, monkeypatch, weights):
    model = tiny_model(num_layers=1, mlp_width=64, context=64)
    model = model._replace(tokenizer=byte_tokenizer(), eos_ids=(258,))
    models.save_pretrained(model, tmp_path / "model")
    loaded = []
    load = options.load

    def spy(*arguments):
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr("kvjax.cli.decode.load", spy)
    command = ["generate", "--model", str(tmp_path / "model"), "--prompt", "ab"]
    command = [*command, "--max-new-tokens", "2", "--json", "--weights", weights]
    assert json.loads(run(*command))
    assert f"(float32, {weights})" in repr(loaded[0])


def test_a_prompt_on_disk_goes_on_with_the_weights_that_read_it(run, fail, tmp_path):
    model = tiny_model(num_layers=1, mlp_width=64, context=64)
    model = model._replace(tokenizer=byte_tokenizer(), eos_ids=(258,))
    models.save_pretrained(model, tmp_path / "model")
    folder = tmp_path / "read"
    prompt = ["--model", tmp_path / "model", "--prompt", "def main():"]
    run("prefill", *prompt, "--save", folder, "--room", "4", "--weights", "int8")
    resume = ["generate", "--resume", folder]
    tokens = json.loads(run(*resume, "--json"))["tokens"]
    alone = ["generate", *prompt, "--max-new-tokens", "4", "--weights", "int8"]
    assert tokens == json.loads(run(*alone, "--json"))["tokens"]
    line = fail(*resume, "--weights", "int4")
    assert "saved with int8 weights and cannot go on with --weights int4: leave" in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["generate", "--prompt", "x", "--weights", "int2"],
            "--weights int2 must be int8 or int4; leave it out for floats",
        ),
        (
            ["plan", "--weights", "int2"],
            "--weights int2 must be int8 or int4; leave it out for floats",
        ),
        (
            ["plan", "--train", "toy", "--weights", "int8"],
            "--weights has no meaning beside --train: leave it out",
        ),
        (
            ["bench", "kernels", "--weights", "int8"],
            "--weights is of kvjax bench decode: leave it out",
        ),
    ],
)
def test_mistakes(command, message, capsys):
    assert cli.run(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["generate", "score", "stream", "eval", "compare", "bench", "lm-eval", "plan"],
)
def test_help_names_it(command, run):
    assert "--weights" in run(command, "--help")
