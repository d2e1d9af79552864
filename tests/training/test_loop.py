"""The loop in one process: what a run's folder holds, and what a resumed run does."""

import dataclasses
import json
import re
import signal

import compiling
import jax
import numpy as np
import pytest
import toys

from kvjax.training import checkpoint, loop, run_folder

TIMES = ("seconds", "tokens_per_s")


def records(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for record in found:
        for name in TIMES:
            record.pop(name)
    return found


def weights(out):
    return (out / "model" / "weights").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run compiles the same few programs."""
    with compiling.cache(tmp_path_factory.mktemp("xla")):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption: its folder and result."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvjax.training.step.causal_attention", toys.attention)
        result = toys.train(out, toys.config("log.tensorboard=true"))
    return out, result


def interrupt_after(samples):
    """Sources that raise SIGTERM in this process when so many samples were drawn."""
    count = iter(range(10**9))

    class Counted(toys.Count):
        def draw(self, rng, length):
            if next(count) == samples:
                signal.raise_signal(signal.SIGTERM)
            return super().draw(rng, length)

    return {"count": Counted(), "noise": toys.Noise()}


def test_a_run_leaves_log_checkpoints_config_and_model(whole):
    out, result = whole
    assert result.finished
    assert result.step == 12
    found = records(out)
    # Every third step, every check (each fifth), and the end.
    assert [record["step"] for record in found] == [3, 5, 6, 9, 10, 12]
    checked = [r["step"] for r in found if "held_out/count@16/bits" in r]
    assert checked == [5, 10, 12]
    assert {"loss", "bits", "accuracy", "loss/count", "accuracy/count"} <= set(found[0])
    assert "loss/noise" not in found[0]
    assert "loss/noise" in found[-1]
    assert "held_out/noise@16/accuracy" not in found[1]
    assert found[0]["tokens"] == 3 * 64
    rate = 0.01 * 2 / 3
    assert found[0]["lr"] == pytest.approx(0.01)
    assert rate < found[0]["lr"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["12", "8"]
    assert any((out / "tensorboard").iterdir())
    leaves = jax.tree.leaves(result.weights)
    assert weights(out) == b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


def test_tensorboard_has_the_log(whole):
    from tensorboardX.proto import event_pb2

    out, _ = whole
    (file,) = (out / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, record, checksum
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
    for record in records(out):
        for name, value in record.items():
            if name != "step":
                tag = re.sub(r"[^-/\w.]", "_", name)
                assert found[record["step"], tag] == pytest.approx(value, rel=1e-6)


def test_training_learns_to_count(whole):
    out, _ = whole
    first, *_, last = records(out)
    assert last["loss/count"] < first["loss/count"]


@pytest.mark.parametrize("samples", [9, 27, 36])
def test_sigterm_saves_and_a_resumed_run_ends_as_if_nothing_had_happened(
    whole, tmp_path, capsys, samples
):
    out = tmp_path / "run"
    # With threads=0 the sample is drawn right before its step.
    stopped = toys.train(out, toys.config(), sources=interrupt_after(samples))
    assert not stopped.finished
    assert 0 < stopped.step < 12
    said = capsys.readouterr().err
    assert "SIGTERM: saving after this step" in said
    assert f"stopped after step {stopped.step} of 12" in said
    assert "--resume" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def never(shardings):
        raise AssertionError("a resumed run needs no first weights")

    again = toys.train(out, toys.config(), init=never, resume=True)
    assert again.finished
    assert weights(out) == weights(whole[0])
    assert records(out) == records(whole[0])
    jax.tree.map(np.testing.assert_array_equal, again.weights, whole[1].weights)


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    """A constant rate, more steps: as if they had been asked for at once."""
    (stage, _), optimizer = toys.BASE["stages"], {"lr": 1e-2, "warmup": 3}
    sections = {
        "stages": [stage, stage],
        "optimizer": optimizer | {"schedule": "constant"},
    }
    short = toys.config("stages.1.steps=2", **sections)
    full = toys.config("stages.1.steps=5", "optimizer.decay_steps=2", **sections)
    toys.train(tmp_path / "grown", short)
    toys.train(tmp_path / "grown", full, resume=True)
    toys.train(tmp_path / "once", full)
    assert weights(tmp_path / "grown") == weights(tmp_path / "once")
    grown, once = records(tmp_path / "grown"), records(tmp_path / "once")
    # The short run's last line is additional, and the next one's means begin after it.
    assert [r["step"] for r in grown] == [3, 4, 5, 6, 9, 10]
    assert [r for r in grown if r["step"] in (3, 6)] == [once[0], once[2]]
    for step in (5, 10):
        ours, theirs = (
            {k: v for r in run if r["step"] == step for k, v in r.items() if "@" in k}
            for run in (grown, once)
        )
        assert ours == theirs
        assert ours


def test_the_best_is_exported_and_kept(tmp_path):
    out = tmp_path / "run"
    settings = toys.config(
        "evaluate.every=2",
        "checkpoint.best=count@16/bits",
        "checkpoint.keep=1",
        # A rate that ruins the model in the end.
        "optimizer.lr=0.02",
        "optimizer.average=0",
        "optimizer.clip=0",
        "optimizer.schedule=constant",
        "stages.1.mixture={noise: 1}",
        "stages.1.lengths={16: 1}",
        "stages.1.shortest=null",
    )
    result = toys.train(out, settings)
    checks = {
        r["step"]: r["held_out/count@16/bits"]
        for r in records(out)
        if "held_out/count@16/bits" in r
    }
    best = min(checks, key=checks.get)
    assert best < 12, "this test needs a run whose end is not its best"
    names = {int(p.name) for p in (out / "checkpoints").iterdir()}
    assert names == {best, 12}
    last = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(result.weights))
    assert weights(out) != last


class Poison(toys.Count):
    """Weights of the seventh batch are not numbers."""

    def __init__(self):
        self.drawn = 0

    def draw(self, rng, length):
        sample = super().draw(rng, length)
        self.drawn += 1
        if self.drawn == 6 * 4 + 1:
            sample.weights[0] = np.nan
        return sample


def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(tmp_path):
    out = tmp_path / "run"
    settings = toys.config("stages.0.steps=12", "evaluate.every=0", "data.threads=0")
    sources = {"count": Poison(), "noise": toys.Noise()}
    with pytest.raises(checkpoint.NotFiniteError) as caught:
        toys.train(out, settings, sources=sources)
    message = str(caught.value)
    assert message.startswith("step 7 in float32: loss nan")
    assert f"last good checkpoint is that of step 4 in {out / 'checkpoints'}" in message
    assert "\n" not in message
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["4"]
    assert all(record["step"] < 7 for record in records(out))
    assert not (out / "model").exists()
    # What was kept is good: with sound data the run goes on from it.
    assert toys.train(out, settings, resume=True).finished


def test_a_folder_that_holds_a_run_or_none(whole, tmp_path):
    out, _ = whole
    with pytest.raises(ValueError, match="holds a run already: continue it with --res"):
        toys.train(out, toys.config())
    with pytest.raises(ValueError, match="holds no run to resume"):
        toys.train(tmp_path / "new", toys.config(), resume=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        toys.train(tmp_path / "file", toys.config())


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with (
        run_folder.locked(tmp_path),
        pytest.raises(ValueError, match="another process is training in"),
    ):
        toys.train(tmp_path, toys.config())


def test_what_a_resumed_run_may_not_change_is_an_error(whole):
    out, _ = whole
    before = (out / "metrics.jsonl").read_text()
    for changes, options, message in [
        (["optimizer.lr=1"], {}, "may not change optimizer.lr"),
        ([], {"data_id": "other"}, "data are not those this run began with"),
        ([], {"decoder": toys.decoder(width=8)}, "is of another model or optimizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            toys.train(out, toys.config(*changes), resume=True, **options)
    assert (out / "metrics.jsonl").read_text() == before


def with_another_theta():
    decoder = toys.decoder()
    rope = dataclasses.replace(decoder.config.rope, theta=5e5)
    return type(decoder)(dataclasses.replace(decoder.config, rope=rope))


def test_a_run_goes_on_when_the_library_knows_more_of_models(whole, monkeypatch):
    """A field that its record lacks was not there yet; those it has are compared."""
    out, _ = whole
    now = loop._Run._decoder
    monkeypatch.setattr(
        loop._Run, "_decoder", lambda run: now(run)[:-1] + ", of_a_later_version=())"
    )
    assert toys.train(out, toys.config("log.tensorboard=true"), resume=True).finished
    with pytest.raises(
        ValueError, match=r"rope\.theta was 10000.0 and is 500000.0; re"
    ):
        toys.train(out, toys.config(), resume=True, decoder=with_another_theta())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["stages.0.lengths={65: 1}", "stages.0.tokens=65"],
            "65 targets exceed the 64",
        ),
        (["stages.0.mixture={counts: 1}"], "there is no source 'counts'; sources are"),
        (
            ["mesh.data=8", "stages.0.tokens=512", "stages.1.tokens=512"],
            "needs 8 devices, and there are 4 of kind cpu",
        ),
        (
            ["checkpoint.best=noise@16/accuracy"],
            "noise@16/accuracy cannot be measured: noise@16 has no answers",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_before_any_work(tmp_path, changes, message):
    settings = toys.config("stages.1.tokens=128", "stages.0.tokens=128", *changes)
    with pytest.raises(ValueError, match=message):
        toys.train(tmp_path / "run", settings)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_metrics_are_cut_where_a_crash_left_half_a_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (3, 6, 9)]
    file.write_text("".join(lines) + '{"step": 1')
    run_folder.cut_metrics(file, 7)
    assert file.read_text() == "".join(lines[:2])
    run_folder.cut_metrics(tmp_path / "none.jsonl", 7)
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_a_save_that_fails_leaves_the_old_model(tmp_path):
    run_folder.replace_model(tmp_path, [np.ones(2)], toys.save)

    def fails(params, folder):
        toys.save(params, folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_folder.replace_model(tmp_path, [np.zeros(3)], fails)
    assert weights(tmp_path) == np.ones(2).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    run_folder.replace_model(tmp_path, [np.zeros(3)], toys.save)
    assert weights(tmp_path) == np.zeros(3).tobytes()


def test_what_a_kill_leaves_half_done_is_put_right(tmp_path):
    run_folder.replace_model(tmp_path, [np.ones(2)], toys.save)
    # Killed between two renames, and while a file was written.
    (tmp_path / "model").rename(tmp_path / ".model.old")
    (tmp_path / ".config.yaml.0a1b.partial").mkdir()
    with run_folder.locked(tmp_path):
        assert weights(tmp_path) == np.ones(2).tobytes()
        assert {path.name for path in tmp_path.iterdir()} == {"model", ".lock"}


def test_a_run_is_tried_in_its_own_folder(tmp_path, monkeypatch):
    """The one above it may be another's."""
    tried = []

    def refused(dir):
        tried.append(dir)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    for out in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(PermissionError, match=r"cannot be made .Permission denied"):
            run_folder.check(out, resume=False)
    assert tried == [tmp_path, tmp_path]
