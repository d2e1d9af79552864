"""`--method package.module:factory`: a method of one's own, on every command line."""

import json
import subprocess
import sys

import pytest
from tiny import TEXT

from kvjax import registry

SOURCE = '''
"""The newest tokens, under another name."""
import kvjax


def newest(*, budget: int = 1024) -> kvjax.Method:
    """Keeps the newest tokens."""
    return kvjax.streaming_llm(budget=budget, num_sinks=1)


def even(*, budget: int = 1024) -> kvjax.Method:
    if budget % 2:
        raise ValueError(f"{budget=} must be even.")
    return newest(budget=budget)


def whole(*, budget: int = 1024):
    return "all"
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the folder that commands are started in."""
    (tmp_path / "newest_tokens.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "newest_tokens"
    sys.path[:] = path
    registry.parse.cache_clear()
    sys.modules.pop("newest_tokens", None)


def test_every_command_takes_it(own, run, checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:200])
    spec = f"{own}:newest,budget=24"
    same = "streaming_llm:budget=24,num_sinks=1"
    options = ("--model", checkpoint, "--method")
    text = ("--prompt", "line 7 is about", "--max-new-tokens", "4", "--json")
    texts = [
        json.loads(run("generate", *options, one, *text))["text"]
        for one in (spec, same)
    ]
    assert texts[0] == texts[1]
    scored = [
        json.loads(run("score", *options, one, "--text", short, "--json"))
        for one in (f"dense_layers:first=1+{spec}", f"dense_layers:first=1+{same}")
    ]
    assert scored[0]["perplexity"] == scored[1]["perplexity"]
    saved = tmp_path / "saved"
    prompt = ("--prompt-file", short, "--save", saved)
    run("prefill", *options, f"{own}:newest", *prompt)
    about = json.loads(run("generate", "--resume", saved, *text[2:], "--prompt", "x"))
    assert about["method"] == f"{own}:newest,budget=1024"
    sizes = ("--budget", "32", "--context", "96", "--new-tokens", "8")
    table = run("plan", *options, f"{own}:newest", *sizes)
    assert f"{own}:newest" in "".join(table.split())


def test_the_budget_of_a_comparison_is_its_too(own, run, checkpoint, tmp_path):
    rows = ("--method", f"{own}:newest", "--method", f"{own}:newest,budget=20")
    sizes = ("--context", "352", "--new-tokens", "8", "--n", "1", "--windows", "1")
    folder = ("--out", tmp_path / "report", "--model", checkpoint)
    run("compare", *rows, "--budget", "24", *sizes, *folder)
    results = json.loads((tmp_path / "report/results.json").read_text("utf-8"))
    assert [row["method"] for row in results["rows"]] == [
        "full",
        f"{own}:newest,budget=24",
        f"{own}:newest,budget=20",
    ]
    assert f"{own}:newest" in (tmp_path / "report/report.html").read_text("utf-8")


def test_a_folder_is_looked_into_by_the_installed_command_too(own):
    """`kvjax` is no `python -m`, which has the folder on its path."""
    code = (
        "import os, sys\n"
        "sys.path[:] = [p for p in sys.path if p not in ('', os.getcwd())]\n"
        f"from kvjax import cli; sys.exit(cli.run(['cite', '{own}:newest']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"% {own}:newest: not said")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("newest_token:newest", "there is no module 'newest_token' to take"),
        ("newest_tokens:newset", "has no 'newset'; did you mean 'newest'?"),
        ("newest_tokens:newest,bugdet=3", "did you mean 'budget'?"),
        ("newest_tokens:even,budget=3", "newest_tokens:even: budget=3 must be even."),
        ("newest_tokens:whole", "whole returned a str; a factory returns a kvjax.Meth"),
        (
            "newest_tokens:kvjax",
            "newest_tokens:kvjax is no factory, but of type mod",
        ),
    ],
)
def test_mistakes_are_one_line(own, fail, spec, message):
    assert message in fail("generate", "--prompt", "x", "--method", spec)
