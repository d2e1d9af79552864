"""`kvjax train`: its model, its folder, its mistakes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import models
from kvjax import cli


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path):
    """A config of two steps on the text, in the checkpoint's tokens."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
model:
  config: {{model_type: llama, vocab_size: 260, hidden_size: 16, intermediate_size: 16,
           num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
           head_dim: 8, max_position_embeddings: 512, rms_norm_eps: 1e-5}}
  tokenizer: {checkpoint}
data: {{corpus: {text_file}, held_out: {text_file}, threads: 0}}
stages: [{{steps: 2, tokens: 64, lengths: {{16: 1}}, mixture: {{text: 1}}}}]
evaluate: {{tokens: 64}}
log: {{every: 1, tensorboard: false}}
""")
    return path


def test_train_makes_a_model_that_the_other_commands_read(run, recipe, tmp_path):
    out = tmp_path / "run"
    printed = run("train", "--config", recipe, "--out", out)
    assert printed == f"{out / 'model'}\n"
    lines = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2]
    trained = models.load(out / "model")
    assert trained.decoder.vocab_size == 260
    options = ["--model", out / "model", "--prompt", "line", "--max-new-tokens", "3"]
    assert run("generate", *options)

    # More steps, from the run's own config.
    run("train", "--out", out, "--resume", "--set", "stages.0.steps=3")
    lines = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3]
    again = models.load(out / "model")
    different = jax.tree.map(
        lambda a, b: bool((a != b).any()), trained.params, again.params
    )
    assert any(jax.tree.leaves(different))


def test_a_tokenizer_of_a_run_that_never_began_is_not_taken(run, recipe, tmp_path):
    """It was trained on another text, or cut off while it was written."""
    changes = [
        "--set",
        "model.tokenizer=train",
        "--set",
        "model.config.vocab_size=2400",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    other = tmp_path / "other.txt"
    other.write_text("aaaa bbbb " * 200)
    with pytest.raises(AssertionError):  # the tokenizer comes before the mistake
        run("train", "--config", recipe, "--out", second, *changes,
            "--set", f"data.corpus={other}", "--set", "mesh.data=4")  # fmt: skip
    assert (second / "tokenizer").is_dir()
    for out in (first, second):
        run("train", "--config", recipe, "--out", out, *changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        left, right = (out / "model" / name for out in (first, second))
        assert left.read_bytes() == right.read_bytes()


def test_train_goes_on_from_a_checkpoint(run, recipe, checkpoint, tmp_path):
    options = ["--set", "model.config=null", "--set", "model.tokenizer=null"]
    options += ["--set", f"model.checkpoint={checkpoint}", "--set", "optimizer.lr=1e-9"]
    run("train", "--config", recipe, "--out", tmp_path / "run", *options)
    before, after = models.load(checkpoint), models.load(tmp_path / "run" / "model")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        before.params,
        after.params,
    )


def test_a_checkpoint_goes_on_in_the_setting_of_refreshkv(
    run, recipe, checkpoint, tmp_path
):
    options = ["--set", "model.config=null", "--set", "model.tokenizer=null"]
    options += ["--set", f"model.checkpoint={checkpoint}"]
    options += ["--setting", "refreshkv", "--set", "refreshkv.decoded=9"]
    run("train", "--config", recipe, "--out", tmp_path / "run", *options)
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "refreshkv:\n  decoded: 9\n  budget: 2048\n" in saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "",
            "give --config a YAML file or a preset (embedded-entmax, embedded-ref",
        ),
        ("--config nowhere", "nowhere is no file and no preset; presets: "),
        ("--config RECIPE --resume", "out holds no run to resume"),
        ("--config RECIPE --set optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("--config RECIPE --set data.corpus=no.txt", "'no.txt' matches no file"),
        ("--config RECIPE --set data.corpus=EMPTY", "holds no text: every file is em"),
        ("--config RECIPE --set stages.0.mixture.txt=1", "there is no source 'txt'"),
        ("--config RECIPE --set model.config.vocab_size=9", "raise model.config.vocab"),
        ("--config RECIPE --set model.config.hidden=9", "key hidden=9 is not known"),
        (
            "--config RECIPE --set optimizer.lr=1e30 --set optimizer.clip=0",
            "training stopped, and no checkpoint was saved before it",
        ),
    ],
)
def test_mistakes_in_training(
    run, recipe, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    arguments = arguments.replace("RECIPE", str(recipe)).replace("EMPTY", "empty.txt")
    assert cli.run(["train", "--out", "out", *arguments.split()]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("kvjax: error: ")
    assert message in line


def test_train_says_which_extra_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['grain'] = None; from kvjax import cli; "
        f"sys.exit(cli.run(['train', '--config', 'toy', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    line = "kvjax: error: training needs grain: pip install 'kvjax[train]'.\n"
    assert done.stderr == line
