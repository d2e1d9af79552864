"""Commands killed at random moments and run again: they end as if never interrupted.

`python tests/kills.py NAME KILLS [SEED]` kills one of `JOBS` so often; what is there
after a kill is whole or not taken, and what is there in the end are the same bits.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import compiling
from safetensors import safe_open

ROOT = pathlib.Path(__file__).parents[1]
TIMES = ("tokens_per_s", "seconds")
SPEEDS = ("tokens_per_second", "prefill_seconds")
# Of what is being written.
PARTIAL = ("*.partial", "*.orbax-checkpoint-tmp*", ".model.new", ".uncalibrated.*")
CONFIG = """
model: {{checkpoint: {model}}}
data: {{corpus: {text}, threads: 1}}
stages: [{{steps: 24, tokens: 64, lengths: {{16: 1}}, mixture: {{text: 1}}}}]
evaluate: {{every: 6, tokens: 64}}
checkpoint: {{every_steps: 2, best: text@16/bits}}
log: {{every: 1}}
"""


class Job(NamedTuple):
    """A command, and what it leaves."""

    begin: list[str]  # arguments, but for the folder
    out: str  # option of the folder
    go_on: Callable[[pathlib.Path], list[str]]  # arguments that go on with a folder
    result: Callable[[pathlib.Path], Any]  # None while there is no result
    is_over: Callable[[pathlib.Path], bool]  # whether it would refuse to run again


def _begun(out: pathlib.Path) -> list[str]:
    return ["--resume"] if (out / "config.yaml").is_file() else []


def _log(out: pathlib.Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def trained(out: pathlib.Path) -> Any:
    """Every file of the model, and the log without its clock."""
    if not (out / "model").is_dir():
        return None
    files = sorted((out / "model").iterdir())
    return [(file.name, file.read_bytes()) for file in files], _log(out)[-1]


def distilled(out: pathlib.Path) -> Any:
    """The map, and the log without its clock."""
    file = out / "map.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "np") as found:  # its header has no order
        names = sorted(found.keys())
        tensors = [(name, found.get_tensor(name).tobytes()) for name in names]
        return tensors, found.metadata(), _log(out)


def compared(out: pathlib.Path) -> Any:
    """The rows without their clocks, once all are there."""
    file = out / "results.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if not found["complete"] or not (out / "report.html").is_file():
        return None
    rows = [{k: v for k, v in r.items() if k not in SPEEDS} for r in found["rows"]]
    return sorted(rows, key=lambda row: row["method"])


def reproduced(out: pathlib.Path) -> Any:
    """The rows without their clocks, once all are there."""
    file = out / "results.json"
    if not file.is_file() or not json.loads(file.read_text())["finished"]:
        return None
    rows, times = json.loads(file.read_text())["rows"], ("seconds", "cpu_seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def read_once(out: pathlib.Path) -> Any:
    """What the prefix says of its arrays, bit by bit."""
    file = out / "prefix.json"
    return json.loads(file.read_text()) if file.is_file() else None


def jobs(model: pathlib.Path, text: pathlib.Path) -> dict[str, Job]:
    """The five commands that keep something, on a tiny model."""

    def never(out):
        return False

    config = text.with_name("config.yaml")
    config.write_text(CONFIG.format(model=model, text=text))
    given = ["--model", str(model), "--text", str(text)]
    sizes = ["--lengths", "40", "--steps", "24", "--features", "2", "--width", "3"]
    shape = ["--context", "320", "--budget", "48", "--n", "1", "--windows", "1"]
    few = ["--context", "256", "--n", "4", "--batch", "1"]
    methods = ["--method", "streaming_llm", "--method", "tova", "--method", "h2o"]
    return {
        "train": Job(
            ["train", "--config", str(config)], "--out", _begun, trained, never
        ),
        "distill": Job(
            ["distill", *given, *sizes, "--budget", "30", "--windows", "1"],
            "--out",
            _begun,
            distilled,
            never,
        ),
        "compare": Job(
            ["compare", *given, *shape, "--new-tokens", "8", *methods],
            "--out",
            lambda out: ["--continue"],
            compared,
            never,
        ),
        "reproduce": Job(
            ["reproduce", *given, *few, "--claim", "cascade-perplexity"],
            "--out",
            lambda out: ["--continue"],
            reproduced,
            never,
        ),
        "prefill": Job(
            ["prefill", "--model", str(model), "--prompt-file", str(text)],
            "--save",
            lambda out: [],
            read_once,
            pathlib.Path.exists,
        ),
    }


def start(job: Job, out: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    """The command in a process of its own, its errors in a file."""
    command = [sys.executable, "-m", "kvjax", *job.begin, job.out, str(out)]
    environment = os.environ | {
        **compiling.ENVIRONMENT,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache),
    }
    command += job.go_on(out)
    with cache.with_name("said.txt").open("w") as said:
        return subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, cwd=cache
        )


def finish(job: Job, out: pathlib.Path, cache: pathlib.Path) -> float:
    """Runs to the end; the seconds that it took."""
    began = time.monotonic()
    code = start(job, out, cache).wait(timeout=600)
    said = cache.with_name("said.txt").read_text()
    assert code == 0, said
    assert "put aside" not in said, said  # no checkpoint was found damaged
    return time.monotonic() - began


def partial(out: pathlib.Path) -> set[pathlib.Path]:
    """What is half written, in the folder or beside it."""
    folders = [out.parent, out, out / "checkpoints"]
    return {file for f in folders if f.is_dir() for p in PARTIAL for file in f.glob(p)}


class Killed(NamedTuple):
    """How a run ended."""

    by_us: bool
    at_a_write: bool


def kill(job, out, cache, seconds: float, rng: random.Random) -> Killed:
    """Starts, and kills after a random time, or while something new is written."""
    before, at_a_write = partial(out), rng.random() < 0.6
    process = start(job, out, cache)
    until = time.monotonic() + rng.uniform(0, seconds)
    while process.poll() is None:
        over = time.monotonic() > until + (2 * seconds if at_a_write else 0)
        if over or (at_a_write and partial(out) - before):
            time.sleep(rng.random() * 0.01 if at_a_write else 0)
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    by_us = process.wait() == -signal.SIGKILL
    return Killed(by_us, by_us and bool(partial(out) - before))


def killed_and_gone_on(
    job: Job, kills: int, folder: pathlib.Path, rng: random.Random
) -> int:
    """Kills so often, from new folders where a run ended; returns kills at a write."""
    cache = folder / "cache"
    cache.mkdir()
    finish(job, folder / "first", cache)  # compiles
    seconds = finish(job, folder / "whole" / "out", cache)
    expected = job.result(folder / "whole" / "out")
    assert expected is not None
    number, done, at_writes = 0, 0, 0
    while done < kills:
        number += 1
        out = folder / str(number) / "out"
        out.parent.mkdir()
        killed = Killed(True, False)
        while killed.by_us and done < kills and not job.is_over(out):
            killed = kill(job, out, cache, seconds, rng)
            done += killed.by_us
            at_writes += killed.at_a_write
        if not job.is_over(out):
            finish(job, out, cache)
        assert job.result(out) == expected, f"{out} differs from the uninterrupted run"
    return at_writes


def main() -> None:
    """The command line."""
    from tiny import TEXT, byte_tokenizer, tiny_model

    import models

    name, kills, *seed = sys.argv[1:]
    model = tiny_model(num_layers=1, context=512)
    model = model._replace(tokenizer=byte_tokenizer(), eos_ids=(258,))
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        models.save_pretrained(model, root / "model")
        (root / "text.txt").write_text(TEXT[:300] if name == "prefill" else TEXT)
        job = jobs(root / "model", root / "text.txt")[name]
        rng = random.Random(int(seed[0]) if seed else 0)
        at_writes = killed_and_gone_on(job, int(kills), root, rng)
    print(f"{name}: {kills} kills, {at_writes} of them at a write: nothing was lost")


if __name__ == "__main__":
    main()
