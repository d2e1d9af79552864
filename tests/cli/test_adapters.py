"""`--adapter` on the command line, and `kvjax train --set lora.rank=...`."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import TEXT

import models
from kvjax import cli

TRAINED = ["--set", "lora={rank: 2, alpha: 32}", "--set", "optimizer.lr=0.05"]


@pytest.fixture(scope="module")
def recipe(checkpoint, tmp_path_factory):
    """A config of two steps that goes on from the checkpoint."""
    folder = tmp_path_factory.mktemp("recipe")
    for name in ("text.txt", "held_out.txt"):
        (folder / name).write_text(TEXT, encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(f"""
model: {{checkpoint: {checkpoint}}}
data: {{corpus: {folder}/text.txt, held_out: {folder}/held_out.txt, threads: 0}}
stages: [{{steps: 2, tokens: 64, lengths: {{16: 1}}, mixture: {{text: 1}}}}]
optimizer: {{warmup: 1}}
evaluate: {{every: 0}}
log: {{every: 1, tensorboard: false}}
""")
    return path


@pytest.fixture(scope="module")
def adapter(recipe, tmp_path_factory):
    """The adapter of a run."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    command = ["train", "--config", recipe, "--out", out, *TRAINED]
    assert cli.run([str(word) for word in command]) == 0
    return out / "adapter"


def generated(run, *options):
    return json.loads(
        run("generate", "--prompt", "line", "--max-new-tokens", 3, "--json", *options)
    )


def test_a_run_leaves_an_adapter_that_commands_take(
    run, fail, checkpoint, adapter, tmp_path
):
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (adapter.parent / "model").exists()
    options = ["--model", checkpoint, "--adapter", adapter]
    found = generated(run, *options)
    assert found["model"] == f"{checkpoint}+{adapter}"
    # Written as a model of its own, it is the same one.
    printed = run("convert", checkpoint, tmp_path / "merged", "--adapter", adapter)
    assert f"{tmp_path / 'merged'}: {checkpoint}+{adapter} in the Hugging F" in printed
    merged = models.load(tmp_path / "merged")
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), merged.params, models.load(checkpoint).params
    )
    assert changed["layers"][0]["attention"]["q"]["kernel"]
    assert not changed["norm"]["weight"]
    expected = generated(run, "--model", tmp_path / "merged")
    assert found["tokens"] == expected["tokens"]
    assert f"error: {adapter.parent} has no adapter_config.json: give t" in fail(
        "generate", "--model", checkpoint, "--adapter", adapter.parent, "--prompt", "x"
    )
    assert "only a GGUF file is converted" in fail(
        "convert", checkpoint, tmp_path / "again"
    )


def test_a_prefix_knows_its_adapter(run, fail, checkpoint, adapter, tmp_path):
    options = ["--model", checkpoint, "--adapter", adapter]
    save = tmp_path / "read"
    run("prefill", *options, "--prompt", "line", "--room", "5", "--save", save)
    resume = ["generate", "--resume", save, "--max-new-tokens", "3", "--json"]
    for given in ([], options):
        found = json.loads(run(*resume, *given))
        assert found["tokens"] == generated(run, *options)["tokens"]
        assert found["model"] == f"{checkpoint}+{adapter}"
    line = fail(*resume, "--model", checkpoint)
    assert f"cannot go on with '{checkpoint}': their weights differ" in line
    assert f"{checkpoint}+{adapter}" in line


def test_integers_that_a_file_stores_are_refused(fail, checkpoint, adapter):
    """Those that are made here are made of merged weights."""
    options = ["--model", checkpoint, "--adapter", adapter, "--weights"]
    line = fail("generate", *options, "int8", "--prompt", "x")
    assert "has 48 inputs, which groups of 32 do not divide" in line
    line = fail("generate", *options, "stored", "--prompt", "x")
    assert f"weights='stored' keeps the integers of {checkpoint}, which the ad" in line


def test_an_adapter_of_another_model_is_refused(fail, adapter):
    line = fail("generate", "--adapter", adapter, "--prompt", "x")
    assert f"{adapter} was made for " in line
    assert "embedded-softmax" in line or "models/embedded" in line


def test_memory_is_planned(run, fail, recipe, adapter):
    plan = ["plan", "--train", recipe, "--device", "T4"]
    full = json.loads(run(*plan, "--json"))["rows"][0]
    lora = json.loads(run(*plan, "--json", *TRAINED))["rows"][0]
    assert full["frozen"] == 0 < 3 * lora["frozen"] < full["state"] + 100
    assert lora["state"] < full["state"] / 2
    said = run(*plan, *TRAINED)
    assert "frozen: those beside them. temp." in said
    assert "--adapter has no meaning beside --train" in fail(
        *plan, "--adapter", adapter
    )


@pytest.mark.parametrize("setting", ["entmax", "refreshkv"])
def test_other_attention_is_trained_beside_a_softmax_model(
    run, recipe, checkpoint, tmp_path, setting
):
    changes = {
        "entmax": ["--set", "model.alpha=1.5"],
        "refreshkv": [
            *("--setting", "refreshkv", "--set", "refreshkv.decoded=9"),
            *("--set", "refreshkv.budget=4", "--set", "lora.target_modules=[k_proj]"),
        ],
    }[setting]
    out = tmp_path / "run"
    run("train", "--config", recipe, "--out", out, *TRAINED, *changes)
    found = models.load_decoder(checkpoint, adapter=out / "adapter")
    assert found.alpha == (1.5 if setting == "entmax" else 1)
    losses = [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_help_names_it(run):
    for command in ("generate", "score", "compare", "eval", "prefill", "convert"):
        assert "--adapter" in run(command, "--help")


def test_a_run_goes_on_from_an_adapter(run, recipe, checkpoint, adapter, tmp_path):
    """MODEL+ADAPTER is a checkpoint like any other."""
    out = tmp_path / "run"
    change = f"model.checkpoint={checkpoint}+{adapter}"
    run("train", "--config", recipe, "--out", out, "--set", change, *TRAINED)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{checkpoint}+{adapter}"
    shutil.rmtree(out / "adapter")
    run("train", "--resume", "--out", out)
    name = f"{checkpoint}+{adapter}+{out / 'adapter'}"
    assert generated(run, "--model", name)["model"] == name
