"""`kvjax train`: its model, its folder, its mistakes."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import models
from kvjax import cli
from kvjax.cli import train
from kvjax.copies import Copies
from kvjax.training import config_files
from models import llama


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path):
    """A config of two steps on the text, in the checkpoint's tokens."""
    path, held_out = tmp_path / "recipe.yaml", tmp_path / "held_out.txt"
    shutil.copy(text_file, held_out)
    path.write_text(f"""
model:
  config: {{model_type: llama, vocab_size: 260, hidden_size: 16, intermediate_size: 16,
           num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
           head_dim: 8, max_position_embeddings: 512, rms_norm_eps: 1e-5}}
  tokenizer: {checkpoint}
data: {{corpus: {text_file}, held_out: {held_out}, threads: 0}}
stages: [{{steps: 2, tokens: 64, lengths: {{16: 1}}, mixture: {{text: 1}}}}]
evaluate: {{tokens: 64}}
log: {{every: 1, tensorboard: false}}
""")
    return path


def test_a_model_that_repeats_tokens_is_trained_and_decoded(run, recipe, tmp_path):
    """From scratch and from a checkpoint; commands put `phd+` in front."""
    out, sizes = tmp_path / "run", ["copies=2", "copy_window=4", "copy_chunk=8"]
    changes = [word for size in sizes for word in ("--set", f"model.{size}")]
    run("train", "--config", recipe, "--out", out, *changes)
    config = json.loads((out / "model/config.json").read_text())
    assert config["model_type"] == "llama_phd"
    assert [config[f"phd_{key}"] for key in ("copies", "window", "chunk")] == [2, 4, 8]
    model = ["--model", out / "model"]
    options = ["--prompt", "line", "--max-new-tokens", "2", "--json"]
    assert json.loads(run("generate", *model, *options))["prompt_tokens"] == 4
    text = tmp_path / "text.txt"
    text.write_text("line 3 is about d. line 4 is not.")
    scored = json.loads(run("score", *model, "--text", text, "--json"))
    assert scored["perplexity"] > 1
    assert scored["perplexity_of_prompt"] is None
    planned = json.loads(run("plan", *model, "--context", "256", "--json"))
    names = [row["method"] for row in planned["rows"]]
    assert all(name.startswith("phd+") for name in names)
    assert not any("citrus" in name for name in names)
    again = config_files.parse(
        f"model: {{checkpoint: {out / 'model'}, copies: 3}}\n"
        "stages: [{steps: 1, tokens: 16, lengths: {16: 1}, mixture: {text: 1}}]",
        "test",
    )
    assert train.decoder_of(again).copies == Copies(3, 4, 8)


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
            "--set", f"data.corpus={other}", "--set", "stages.0.tokens=128",
            "--set", "mesh.data=8")  # fmt: skip
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
    run, fail, recipe, checkpoint, tmp_path
):
    options = ["--set", "model.config=null", "--set", "model.tokenizer=null"]
    options += ["--set", f"model.checkpoint={checkpoint}"]
    options += ["--setting", "refreshkv", "--set", "refreshkv.decoded=9"]
    assert "refreshkv.budget=2048 must be below 8, or nothing is left out" in fail(
        "train", "--config", recipe, "--out", tmp_path / "run", *options
    )
    options += ["--set", "refreshkv.budget=4"]
    run("train", "--config", recipe, "--out", tmp_path / "run", *options)
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "refreshkv:\n  decoded: 9\n  budget: 4\n" in saved


def going_on(checkpoint):
    given = ["model.config=null", "model.tokenizer=null"]
    given += [f"model.checkpoint={checkpoint}"]
    return [word for change in given for word in ("--set", change)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_keeps_its_dtype(run, recipe, checkpoint, tmp_path, capsys, dtype):
    model = models.load(checkpoint, dtype=dtype)
    models.save_pretrained(model, tmp_path / "half")
    out = tmp_path / "run"
    command = ["train", "--config", recipe, *going_on(tmp_path / "half"), "--out"]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(sys.stderr, "write", said.append)
        run(*command, out)
    assert f"model will be {dtype}, which rounds what float32 has le" in "".join(said)
    (half, trained) = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "half", out / "model")
    )
    assert {name: x.dtype for name, x in trained.items()} == {
        name: x.dtype for name, x in half.items()
    }
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    # What was trained is more exact, and is kept if it is asked for.
    run(*command, out, "--resume", "--set", "model.dtype=float32")
    exact = load_file(out / "model" / "model.safetensors")
    for name, leaf in exact.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf.astype(trained[name].dtype), trained[name])
    assert any((x != x.astype(trained[n].dtype)).any() for n, x in exact.items())


def test_weights_beyond_a_dtype_are_not_written(checkpoint, tmp_path):
    model = models.load(checkpoint)
    config = dataclasses.replace(model.decoder.config, dtype="float16")
    weight = model.params["norm"]["weight"]
    params = model.params | {"norm": {"weight": weight.at[0].set(1e5)}}
    large = model._replace(decoder=llama.LlamaDecoder(config), params=params)
    with pytest.raises(
        ValueError, match="norm/weight holds values beyond float16: sav"
    ):
        models.save_pretrained(large, tmp_path / "new" / "half")
    assert list(tmp_path.iterdir()) == []


def test_checks_are_of_the_corpus_own_end(run, recipe, tmp_path, text_file, capsys):
    """And what they are of is not trained on: another end, the same steps."""
    content = text_file.read_text()
    cut = len(content) - len(content) // 20
    command = ["train", "--config", recipe, "--set", "data.held_out=null", "--out"]
    logs = []
    for name, end in (("a", content[cut:]), ("b", content[cut:].replace("a", "e"))):
        text_file.write_text(content[:cut] + end)
        code = cli.run([str(x) for x in (*command, tmp_path / name)])
        assert code == 0
        said = capsys.readouterr().err
        assert "tokens, its last twentieth, which is not trained on." in said
        assert "of which a step takes up to 64." in said
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == other["loss"]
    key = "held_out/text@16/bits"
    assert logs[0][-1][key] != logs[1][-1][key]


def test_a_run_goes_on_from_another_folder(
    run, recipe, tmp_path, text_file, monkeypatch
):
    """With what it was given by relative paths; a byte order mark changes nothing."""
    monkeypatch.chdir(text_file.parent)
    text_file.write_bytes(b"\xef\xbb\xbf" + text_file.read_bytes())
    name = text_file.name
    changes = ["--set", f"data.corpus={name}", "--set", f"data.held_out=held_{name}"]
    pathlib.Path("held_out.txt").rename(f"held_{name}")
    run("train", "--config", recipe, *changes, "--out", "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("train", "--resume", "--out", "../run", "--set", "stages.0.steps=3")
    # Moved as a whole, it is told where its text is now.
    moved = text_file.rename(tmp_path / "moved.txt")
    held_out = text_file.with_name(f"held_{name}").rename(tmp_path / "held.txt")
    changes = ["--set", f"data.corpus={moved}", "--set", f"data.held_out={held_out}"]
    run("train", "--resume", "--out", "../run", "--set", "stages.0.steps=4", *changes)
    lines = (pathlib.Path("../run") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_longer_run_from_another_model_is_refused(
    run, fail, recipe, checkpoint, tmp_path
):
    model = models.load(checkpoint)
    rope = dataclasses.replace(model.decoder.config.rope, theta=5e5)
    config = dataclasses.replace(model.decoder.config, rope=rope)
    other = model._replace(decoder=llama.LlamaDecoder(config))
    models.save_pretrained(other, tmp_path / "other")
    command = ["train", "--config", recipe, "--out", tmp_path / "run"]
    run(*command, *going_on(checkpoint))
    code = cli.run(
        [str(x) for x in (*command, "--resume", *going_on(tmp_path / "other"))]
    )
    assert code == 2


def test_weights_that_overflow_at_the_last_step_are_no_result(recipe, tmp_path, capsys):
    """Loss and gradient are finite there; the update is not."""
    changes = ["optimizer.lr=1e38", "optimizer.warmup=0", "optimizer.weight_decay=1e9"]
    changes += ["stages.0.steps=1", "evaluate.every=0"]
    given = [word for change in changes for word in ("--set", change)]
    out = tmp_path / "run"
    assert cli.run(["train", "--config", str(recipe), "--out", str(out), *given]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("kvjax: error: step 1 in float32: weights after it are not ")
    assert "finite: training stopped, and no checkpoint was saved before it" in line
    assert not (out / "model").exists()


def test_the_preset_of_ones_own_says_what_is_to_be_filled_in(
    run, fail, checkpoint, text_file, tmp_path
):
    command = ["train", "--config", "own-refreshkv", "--out", tmp_path / "run"]
    line = fail(*command)
    assert "preset own-refreshkv leaves model.checkpoint and data.corpus to you" in line
    assert "give --set model.checkpoint=... --set data.corpus=..., or a copy" in line
    line = fail(*command, "--set", f"model.checkpoint={checkpoint}")
    assert "leaves data.corpus to you" in line
    jsonl = tmp_path / "texts.jsonl"
    lines = [json.dumps({"body": line}) for line in text_file.read_text().splitlines()]
    jsonl.write_text("\n".join(lines))
    changes = [
        f"model.checkpoint={checkpoint}",
        f"data.corpus={jsonl}",
        "data.field=body",
        "stages=[{steps: 2, tokens: 96, lengths: {24: 1}, mixture: {text: 1}}]",
        "refreshkv.decoded=9",
        "refreshkv.budget=8",
        "optimizer.warmup=1",
        "evaluate={checks: [text@24], tokens: 48}",
        "precision.compute=float32",
    ]
    run(*command, *[word for change in changes for word in ("--set", change)])
    assert models.load(tmp_path / "run" / "model").decoder.vocab_size == 260


def test_the_log_of_a_longer_cosine_tells_the_two_rates_apart(
    run, recipe, tmp_path, capsys
):
    out = tmp_path / "run"
    changes = ["--set", "optimizer.warmup=0", "--set", "stages.0.steps=50"]
    run("train", "--config", recipe, "--out", out, *changes)
    more = ["--resume", "--set", "stages.0.steps=51"]
    assert cli.run(["train", "--out", str(out), *more]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    before, after = line.split("would be ")[1].split(": ")[0].split(" and was ")
    assert before != after
    assert float(before) != float(after)
    assert "schedule=cosine is spread over all steps: go on from this run's" in line


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
        ("--config RECIPE --set data.corpus=no.txt", "no.txt' matches no file"),
        ("--config RECIPE --set data.corpus=EMPTY", "holds no text: every file is em"),
        ("--config RECIPE --set stages.0.mixture.txt=1", "there is no source 'txt'"),
        (
            "--config RECIPE --set data.corpus=tiny.txt",
            "corpus has 15 tokens to train on, and a row of stages.lengths takes 17",
        ),
        (
            "--config RECIPE --set data.held_out=tiny.txt",
            "(data.held_out=TMP/tiny.txt) has 15 tokens and a check takes 17: give",
        ),
        (
            "--config RECIPE --set data.held_out=null --set data.corpus=short.txt",
            "(its last twentieth, which is not trained on) has 10 tokens and a check",
        ),
        ("--config RECIPE --set data.corpus=latin.txt", "byte 0xe9 at offset 3; conv"),
        (
            "--config RECIPE --set data.held_out=no.txt",
            "data.held_out='TMP/no.txt' mat",
        ),
        (
            "--config RECIPE --set data.corpus=t*.txt --set data.held_out=tiny.txt",
            "TMP/tiny.txt of data.held_out is in data.corpus too, and the checks",
        ),
        (  # a link to what is trained on is that
            "--config RECIPE --set data.held_out=stdlib/json/decoder.py "
            "--set data.corpus=link.py",
            "json/decoder.py of data.held_out is in data.corpus too",
        ),
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
    (tmp_path / "tiny.txt").write_text("x" * 15)
    (tmp_path / "short.txt").write_text("x" * 200)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "link.py").symlink_to(json.decoder.__file__)
    message = message.replace("TMP", str(tmp_path))
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


def test_memory_of_its_steps_is_planned_without_training(run, recipe, tmp_path):
    before = sorted(tmp_path.iterdir())
    arguments = ["plan", "--train", recipe, "--device", "mine:1:100", "--json"]
    document = json.loads(run(*arguments))
    (row,) = document["rows"]
    assert (row["rows"], row["length"], row["packed"]) == (4, 16, False)
    assert row["peak"] == row["state"] + row["batch"] + row["temporaries"]
    assert row["fits"] == {"mine": True}
    assert document["compiled_for"] == jax.devices()[0].device_kind
    averaged = json.loads(run(*arguments, "--set", "optimizer.average=0.9"))
    assert averaged["rows"][0]["state"] * 3 == pytest.approx(row["state"] * 4, rel=0.01)
    small = json.loads(
        run("plan", "--train", recipe, "--device", "mine:0.00001:1", "--json")
    )
    assert small["rows"][0]["fits"] == {"mine": False}
    assert "4 x 16" in run(*arguments[:-1])
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_decoding_are_refused_beside_train(fail, recipe):
    line = fail("plan", "--train", recipe, "--context", "100")
    assert "--context has no meaning beside --train" in line
    assert "--train" in fail("plan", "--set", "remat=true")
