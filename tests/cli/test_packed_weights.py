"""`--weights`: one option of all commands that load a model."""

import json

import checkpoints
import gguf
import gguf_files
import jax
import numpy as np
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


CONFIG = checkpoints.CONFIGS["gqa"] | {"intermediate_size": 64}


def test_a_file_as_it_is_stored(run, fail, tmp_path):
    """Generated, planned, read and gone on with: as the floats that it stands for."""
    file = gguf_files.write(tmp_path / "tiny.gguf", CONFIG, "Q4_0")
    prompt = ["--model", file, "--prompt", "hehehe"]
    stored = ["--weights", "stored"]
    ask = ["generate", *prompt, "--max-new-tokens", "4", "--json"]
    tokens = json.loads(run(*ask, *stored))["tokens"]
    assert tokens == json.loads(run(*ask))["tokens"]
    plan = ["plan", "--model", file, "--method", "full", "--context", "64"]
    plan += ["--new-tokens", "8", *stored]
    document = json.loads(run(*plan, "--json"))
    model = models.load(file, weights="stored")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert document["weights"] == held
    assert "(stored, the rest float32)" in run(*plan)
    folder = tmp_path / "read"
    run("prefill", *prompt, "--save", folder, "--room", "4", *stored)
    resume = ["generate", "--resume", folder]
    assert json.loads(run(*resume, "--json"))["tokens"] == tokens
    line = fail(*resume, "--weights", "int4")
    assert "saved with stored weights and cannot go on with --weights int4: le" in line


def test_what_is_not_as_stored_is_said(run, tmp_path, capsys):
    made = np.random.default_rng(0).integers(0, 256, (256, 210), np.uint8)
    made[:, -2:] = np.array([1e-4], np.float16).view(np.uint8)
    config = CONFIG | {"hidden_size": 256, "head_dim": 64}
    arrays = {"blk.0.attn_output.weight": (made, gguf.GGMLQuantizationType.Q6_K)}
    file = gguf_files.write(tmp_path / "tiny.gguf", config, "Q8_0", arrays=arrays)
    command = ["generate", "--model", str(file), "--prompt", "he", "--weights"]
    assert cli.run([*command, "stored", "--max-new-tokens", "2"]) == 0
    assert "note: 1 of 15 matrices in integers are rounded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["generate", "--prompt", "x", "--weights", "stored"],
            "keeps the integers of a GGUF file, and name='embedded-softmax' is none",
        ),
        (
            ["generate", "--prompt", "x", "--weights", "int2"],
            "--weights int2 must be int8, int4 or stored; leave it out for floats",
        ),
        (
            ["plan", "--weights", "int2"],
            "--weights int2 must be int8, int4 or stored; leave it out for floats",
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
