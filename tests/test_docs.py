"""The pages under docs tell the truth: each command runs, the long ones at toy size."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from tiny import keep_layers

from models import embedded

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# What it prints, test_planning.py compares with the page.
ELSEWHERE = ("pip install", "kvjax plan")
TINY = "stages=[{steps: 2, tokens: 128, lengths: {64: 1}, mixture: {text: 1}}]"
QUICK = [
    *("--set", "data.corpus=book.txt", "--set", "data.held_out=book.txt"),
    *("--set", "evaluate.every=0"),
]
# What makes a command quick, by how it begins: arguments at its end.
SHORTER = {
    "kvjax train --config toy": [
        *QUICK,
        *("--set", "stages.0.steps=2", "--set", "stages.1.steps=1"),
        *("--set", "stages.1.lengths={64: 1}"),
        *("--set", "model.config.num_hidden_layers=1"),
    ],
    "kvjax train --config embedded-refreshkv": [
        *QUICK,
        *("--set", TINY, "--set", "optimizer.decay_steps=1"),
        *("--set", "refreshkv.decoded=16", "--set", "refreshkv.budget=8"),
        *("--set", "model.checkpoint=runs/softmax/model"),
    ],
    "kvjax train --config embedded-": [
        *QUICK,
        *("--set", TINY, "--set", "optimizer.decay_steps=1"),
    ],
    "kvjax train --out runs/toy": [],
    "python -m models.embedded.start": ["--corpus", "book.txt"],
    "python benchmarks/embedded_bars.py": [
        *("--n", "2", "--context", "128", "--bits-context", "128")
    ],
    "kvjax heads": ["--context", "96"],
    "kvjax compare": [
        *("--context", "128", "--budget", "48", "--n", "1", "--windows", "1"),
        *("--new-tokens", "4", "--method", "quest"),
    ],
    "kvjax reproduce --list": [],
    "kvjax reproduce --claim": ["--quick"],
    "kvjax reproduce --quick": ["--claim", "cascade-memory"],
    "kvjax eval": ["--context", "96", "--n", "1", "--new-tokens", "4"],
}


def commands(page: pathlib.Path) -> list[str]:
    """The lines of a page's shell blocks, in their order, but for `ELSEWHERE`."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


def runnable(command: str) -> list[str]:
    begin = max((b for b in SHORTER if command.startswith(b)), key=len)
    # The page goes on for 60 steps; so few must do.
    command = command.replace("stages.1.steps=60", "stages.1.steps=2")
    program, *arguments = shlex.split(command)
    arguments += SHORTER[begin]
    if program == "kvjax":
        arguments = ["-m", "kvjax", *arguments]
    elif arguments[0] != "-m":
        arguments[0] = str(ROOT / arguments[0])
    return [sys.executable, *arguments]


SHOWN = [page for page in PAGES if commands(page)]


def test_pages_show_commands():
    assert "train_your_own" in [page.stem for page in SHOWN]


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs_in_turn(page, tmp_path):
    (tmp_path / "book.txt").write_text(embedded.heldout_text()[:100_000], "utf-8")
    (tmp_path / "CONTRIBUTING.md").write_text("Some text of one's own.\n" * 200)
    for command in commands(page):
        done = subprocess.run(
            runnable(command), cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if command == "python -m models.embedded.start --out runs/start":
            keep_layers(tmp_path / "runs/start", 2)  # the planted ones


def test_files_a_page_names_exist():
    for page in PAGES:
        named = re.findall(r"`([\w/]+\.(?:py|md|yaml))`", page.read_text("utf-8"))
        for name in named:
            if name not in ("config.yaml",):  # of a run
                assert (ROOT / name).is_file(), f"{page.name} names {name}"
