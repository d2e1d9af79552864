"""`kvjax distill`: its file, its folder, its mistakes."""

import json

import jax
import numpy as np
import pytest

import models
from kvjax import cli, registry
from kvjax.evaluation import head_gains
from kvjax.files import arrays
from kvjax.methods.topk_completion import map_files
from kvjax.training import run_folder

STEPS = 2


@pytest.fixture
def command(checkpoint, text_file):
    return [
        *("distill", "--model", checkpoint, "--text", text_file),
        *("--lengths", "40", "--steps", STEPS, "--features", 2, "--width", 3),
        *("--budget", 30, "--windows", 1),
    ]


class StopAfterOne(run_folder.Interrupt):
    """Asks for an end at the end of the first step, as Ctrl-C does."""

    asked = property(lambda self: True, lambda self, value: None)


def test_a_map_is_made_resumed_and_used(run, command, checkpoint, tmp_path, capsys):
    """Broken off and gone on with: the same map, bit for bit; a method reads it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed = json.loads(run(*command, "--out", whole, "--json"))
    path = whole / "map.safetensors"
    assert printed["file"] == str(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "Interrupt", StopAfterOne)
        arguments = [str(x) for x in (*command, "--out", parts)]
        assert cli.run(arguments) == 1
    said = f"stopped after step 1 of {STEPS}, saved in {parts}: run the same command"
    assert said in capsys.readouterr().err
    assert not (parts / path.name).exists()
    lines = run(*command, "--out", parts, "--resume").splitlines()
    assert lines[-1] == f"wrote {parts / path.name}"
    file, resumed = (map_files.load(x / path.name) for x in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, resumed[2:4], file[2:4])
    assert resumed.about == file.about
    steps = [
        json.loads(line)["step"]
        for line in (parts / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, STEPS]

    model = models.load(checkpoint)
    assert (file.kind, file.trained_length, file.num_layers) == ("learned", 40, 1)
    assert file.about["weights"] == arrays.digest(model.params)
    assert (file.about["features"], file.about["calibrated_at"]) == (2, 30)
    alone, completed = (np.array(printed[key]) for key in ("alone", "completed"))
    np.testing.assert_array_equal(file.gain, completed < alone)
    assert {str(x.dtype) for x in file.weights.keys} == {"bfloat16", "float32"}
    method = registry.parse(f"topk_completion:budget=39,feature_map={path}")
    held = method.init(model.decoder.cache_spec(1, 40)).weights
    jax.tree.map(np.testing.assert_array_equal, held, file.layer(0)[0])


def test_a_map_that_is_not_calibrated_is_not_there(
    run, command, tmp_path, capsys, monkeypatch
):
    """What was there stays, and the run says how to go on."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "map.safetensors").write_text("an older one")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(head_gains, "calibrate", interrupted)
        assert cli.run([str(x) for x in (*command, "--out", out)]) == 130
    assert "not calibrated: run the same command with --resume" in (
        capsys.readouterr().err
    )
    assert [path.name for path in out.glob("*.safetensors")] == ["map.safetensors"]
    assert (out / "map.safetensors").read_text() == "an older one"
    run(*command, "--out", out, "--resume")
    assert map_files.load(out / "map.safetensors").gain is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "sinks"], "--map 'sinks' must be one of learned, moment, anchor"),
        (["--lengths", "30,many"], "--lengths '30,many' must be numbers of tokens"),
        (["--lengths", "20"], "lengths=(20,) must each exceed 20"),
        (["--lengths", "4000"], "documents of 4064 tokens exceed the model's 512"),
        (["--budget", "6"], "num_sinks=4 and tail=16 must be at least 0 and together"),
        (["--windows", "0"], "windows=0 must be at least 1"),
        (["--text", "no.txt"], "no.txt"),
        (["--resume"], "--resume"),
    ],
)
def test_mistakes_are_one_line(fail, command, tmp_path, arguments, message):
    assert message in fail(*command, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()  # before any work
