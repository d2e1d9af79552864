"""The pages under docs tell the truth: each command runs as it stands there.

But for the long ones, which say on the page that they are shortened here.
"""

import ast
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import compiling
import pytest
from tiny import keep_layers

from kvjax.testing import contract
from models import embedded

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# What it prints, test_planning.py compares with the page.
ELSEWHERE = ("pip install", "kvjax plan")
TINY = "stages=[{steps: 2, tokens: 128, lengths: {64: 1}, mixture: {text: 1}}]"
# A method of one's own, for the page about it: the notebook's.
OWN = "my_methods.py"
QUICK = [
    *("--set", "data.corpus=book.txt", "--set", "data.held_out=book.txt"),
    *("--set", "evaluate.every=0"),
]
NOTHING_OF_TESTS = (
    "import sys; assert not {'pytest', 'oracles', 'tiny'} & sys.modules.keys()"
)
# What the comment on a command says that does not run as it stands.
SHORTENED = "# shortened in the tests"
# Arguments at the end of those, by how they begin.
SHORTER = {
    "kvjax train --config toy": [
        *("--set", "stages.0.steps=2", "--set", "stages.1.steps=2"),
        *("--set", "evaluate.tokens=256"),
    ],
    "kvjax train --config toy --out runs/mine": [
        *("--set", TINY, "--set", "optimizer.warmup=1"),
        *("--set", "evaluate={checks: [text@64], tokens: 64}"),
    ],
    "kvjax train --out runs/toy --resume --set": ["--set", "stages.1.steps=3"],
    "kvjax train --config own-refreshkv": [
        *("--set", TINY, "--set", "optimizer={warmup: 1}"),
        *("--set", "evaluate={every: 0}", "--set", "refreshkv.budget=8"),
        *("--set", "precision.compute=float32", "--set", "refreshkv.decoded=16"),
    ],
    "kvjax train --config own-lora": [
        *("--set", TINY, "--set", "optimizer={warmup: 1}"),
        *("--set", "evaluate={every: 0}", "--set", "lora.target_modules=[q_proj]"),
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
    "python -m models.embedded.start": ["--corpus", "book.txt"],
    "python benchmarks/embedded_bars.py": [
        *("--n", "2", "--context", "128", "--bits-context", "128")
    ],
    "kvjax bench kernels": ["--context", "1024", "--budget", "256"],
    "kvjax heads": ["--context", "96"],
    "kvjax compare": [
        *("--context", "128", "--budget", "48", "--n", "1", "--windows", "1"),
        *("--new-tokens", "4", "--method", "quest"),
    ],
    "kvjax reproduce --claim": ["--quick"],
    "kvjax reproduce --model mine": [
        *("--model", "embedded-softmax", "--context", "256", "--claim", "refresh-bytes")
    ],
    "kvjax reproduce --quick": ["--claim", "cascade-memory"],
}


def commands(page: pathlib.Path) -> list[str]:
    """The lines of a page's shell blocks, in their order.

    But for `ELSEWHERE`, and for what the README shows too: test_readme.py runs that.
    """
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    lines = [line for line in lines if not line.startswith(ELSEWHERE)]
    return [line for line in lines if line not in readme]


def python_of(page: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def write_own_method(folder: pathlib.Path) -> None:
    """Writes the method of the notebook into a file of its own."""
    source = (ROOT / "colab/write_your_own_method.py").read_text("utf-8")
    (cell,) = (c for c in source.split("# %%") if "def landmarks(" in c)
    (folder / OWN).write_text(cell, "utf-8")


def shorter(command: str) -> list[str]:
    """Arguments to append to a command, none unless its comment says so."""
    if not command.endswith(SHORTENED):
        return []
    return SHORTER[max((b for b in SHORTER if command.startswith(b)), key=len)]


def arguments_of(command: str) -> list[str]:
    """The program of a shown command, and the arguments that it runs with here."""
    return shlex.split(command, comments=True) + shorter(command)


def processes(commands: list[str]) -> list[list[str]]:
    """Commands of processes that run the page's: one for all of kvjax's in a row."""
    found = []
    for program, group in itertools.groupby(
        map(arguments_of, commands), key=lambda parts: parts[0]
    ):
        arguments = [rest for _, *rest in group]
        if program == "kvjax":
            found.append([str(ROOT / "tests/in_turn.py"), json.dumps(arguments)])
            continue
        assert program == "python"
        for first, *rest in arguments:
            found.append([first if first == "-m" else str(ROOT / first), *rest])
    return [[sys.executable, *arguments] for arguments in found]


SHOWN = [page for page in PAGES if commands(page)]


def test_pages_show_commands():
    assert "train_your_own" in [page.stem for page in SHOWN]


def test_only_what_says_so_is_shortened():
    shown = [command for page in PAGES for command in commands(page)]
    marked = [command for command in shown if SHORTENED in command]
    assert 0 < len(marked) < len(shown)
    for begin in SHORTER:
        assert any(command.startswith(begin) for command in marked), begin
    for command in shown:
        assert bool(shorter(command)) == (command in marked), command


def test_the_preset_on_the_page_is_the_preset():
    page = (ROOT / "docs" / "train_your_own.md").read_text("utf-8")
    shown = re.search(r"<!-- own-refreshkv -->\n```yaml\n(.*?)```", page, re.DOTALL)[1]
    preset = ROOT / "kvjax/training/presets/own-refreshkv.yaml"
    assert shown == preset.read_text("utf-8")


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs_in_turn(page, tmp_path):
    (tmp_path / "book.txt").write_text(embedded.heldout_text()[:100_000], "utf-8")
    for name in ("README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    write_own_method(tmp_path)
    for command in processes(commands(page)):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | compiling.ENVIRONMENT,  # most of the time is compiling
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if "models.embedded.start" in command:
            keep_layers(tmp_path / "runs/start", 2)  # the planted ones


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_of(page)], ids=lambda page: page.stem
)
def test_python_of_a_page_runs(page, tmp_path):
    """In a process that has nothing of the tests."""
    write_own_method(tmp_path)
    for code in python_of(page):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\n{NOTHING_OF_TESTS}"],
            cwd=tmp_path,
            env=os.environ | compiling.ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        if "check_method(" in code:
            # But of several devices, a second reading, a question, what is handed up.
            passed = ast.literal_eval(done.stdout)
            assert len(passed) == len(contract.CHECKS) - 4


def test_files_a_page_names_exist():
    for page in PAGES:
        named = re.findall(r"`([\w/]+\.(?:py|md|yaml))`", page.read_text("utf-8"))
        for name in named:
            if name not in ("config.yaml", OWN):  # of a run, of the reader
                assert (ROOT / name).is_file(), f"{page.name} names {name}"
