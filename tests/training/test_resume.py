"""A real process, killed again and again at any moment: the same bits in the end."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import toys

from kvjax.training import config_files

PROGRAM = pathlib.Path(toys.__file__)
ROOT = PROGRAM.parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "TOYS_CACHE": str(tmp_path_factory.mktemp("xla")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(PROGRAM.parent)]),
    }


def start(out, config, environment, *flags, **more):
    command = [sys.executable, str(PROGRAM), str(out), str(config), *flags]
    return subprocess.Popen(
        command,
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Many steps, saved every few, so that a random moment is often one of saving."""
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    settings = toys.config(
        "stages.0.steps=30", "stages.1.steps=30", "checkpoint.every_steps=3",
        "data.threads=2", "evaluate.every=20", "log.every=4",
    )  # fmt: skip
    path.write_text(config_files.dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config, environment):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(out, config, environment)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return out


def lines(out):
    """The log without the fields that tell the time."""
    text = (out / "metrics.jsonl").read_text()
    return [line.split('"tokens_per_s"')[0] for line in text.splitlines()]


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.0005)


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(
    tmp_path, whole, config, environment
):
    out, rng = tmp_path / "run", random.Random(0)
    saves, killed_while_saving = out / "checkpoints", 0

    def partial():
        return any(saves.glob("*.orbax-checkpoint-tmp*"))

    def steps():
        return len([p for p in saves.glob("*") if p.name.isdecimal()])

    def newest():
        return max([int(p.name) for p in saves.glob("*") if p.name.isdecimal()] or [0])

    flags, seen = [], 0
    for attempt in range(3):
        process = start(out, config, environment, *flags, TOYS_SLEEP="0.004")
        target = seen + rng.randint(3, 12)
        wait_for(process, lambda target=target: newest() >= target)
        if attempt % 2:  # in the middle of the next save
            wait_for(process, partial)
            time.sleep(rng.random() * 0.005)
        else:
            time.sleep(rng.random() * 0.1)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_while_saving += partial()
        seen, flags = newest(), ["--resume"]
    assert killed_while_saving, "no kill met a save: this test must try harder"
    assert steps() >= 1
    process = start(out, config, environment, "--resume")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "resuming at step" in said
    assert (out / "model" / "weights").read_bytes() == (
        whole / "model" / "weights"
    ).read_bytes()
    assert lines(out) == lines(whole)


def test_a_full_disk_keeps_the_checkpoint_and_a_resumed_run_ends_the_same(
    tmp_path, whole, config, environment
):
    out = tmp_path / "run"
    process = start(out, config, environment, TOYS_SLEEP="0.004")
    wait_for(process, lambda: (out / "checkpoints" / "9").is_dir())
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    kept = max(int(p.name) for p in (out / "checkpoints").iterdir())

    process = start(out, config, environment, "--resume", TOYS_LIMIT="20000")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    # Nothing of the library's threads, which fail one after the other.
    assert "Traceback" not in said
    assert "never" not in said
    (error,) = [x for x in said.splitlines() if x.startswith("OSError: ")]
    assert "could not be written" in error
    assert f"that of step {kept} is whole" in error
    assert [p.name for p in (out / "checkpoints").iterdir()].count(str(kept)) == 1

    process = start(out, config, environment, "--resume")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert (out / "model" / "weights").read_bytes() == (
        whole / "model" / "weights"
    ).read_bytes()
