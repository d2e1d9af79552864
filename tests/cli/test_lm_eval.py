"""`kvjax lm-eval`: what it gives the harness, and what it prints of its results.

The package is heavy; here a stand-in of it asks the model three things.
"""

import importlib.machinery
import importlib.metadata
import json
import pathlib
import sys
import types

import pytest
from tiny import TEXT

from kvjax.cli import lm_eval as command


class Base:
    """In place of the harness's own."""


class Request:
    def __init__(self, *args):
        self.args = args


class TaskManager:
    """Knows one task, and where it was told to look for a tokenizer."""

    all_tasks = ("asks",)

    def __init__(self, include_path=None, metadata=None):
        self.metadata = metadata

    def match_tasks(self, names):
        return [name for name in names if name in self.all_tasks]


def simple_evaluate(*, model, tasks, task_manager, limit, **others):
    print("what the harness says")
    folder = pathlib.Path(task_manager.metadata["tokenizer"])
    context = TEXT[:200]
    if others["apply_chat_template"]:
        context = model.apply_chat_template([{"role": "user", "content": context}])
    pair = Request(context, TEXT[200:204])
    (found,) = model.loglikelihood([pair])
    (said,) = model.generate_until([Request(context, {"max_gen_toks": 3})])
    metrics = {"alias": "asks", "acc,none": found[0], "acc_stderr,none": 0.25}
    metrics |= {"8192,none": -1, "said,strict": said, "said_stderr,strict": "N/A"}
    return {
        "results": {"asks": metrics},
        "n-samples": {"asks": {"original": 9, "effective": limit}},
        "versions": {"asks": 1},
        "config": {"model": model},
        "files": sorted(path.name for path in folder.iterdir()),
    }


@pytest.fixture(autouse=True)
def harness(monkeypatch):
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    sys.modules["lm_eval.api.model"].TemplateLM = Base
    sys.modules["lm_eval.tasks"].TaskManager = TaskManager
    monkeypatch.delitem(sys.modules, "kvjax.lm_eval.model", raising=False)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "0.4" if name == "lm_eval" else version(name),
    )
    yield
    sys.modules.pop("kvjax.lm_eval.model", None)


def test_results_are_printed_and_kept(run, checkpoint, tmp_path):
    out = tmp_path / "results" / "asks.json"
    options = ("--model", checkpoint, "--tasks", "asks", "--limit", "2")
    options += ("--method", "snapkv:budget=48", "--apply-chat-template")
    printed = json.loads(run("lm-eval", *options, "--output", out, "--json"))
    assert printed == json.loads(out.read_text("utf-8"))
    assert printed["method"] == "snapkv:budget=48"
    assert printed["limit"] == 2
    assert printed["contexts_cut"] == 0
    metrics = printed["results"]["asks"]
    cells = command.rows(printed)
    assert [row[:3] for row in cells] == [
        ["asks", "acc", f"{metrics['acc,none']:.4f}"],
        ["asks", "said (strict)", metrics["said,strict"]],
    ]
    assert [row[3:] for row in cells] == [["0.2500", "2"], ["-", "2"]]


def test_what_the_harness_prints_is_no_result(run, checkpoint):
    printed = run("lm-eval", "--model", checkpoint, "--tasks", "asks", "--limit", "1")
    assert "what follows it goes through decode steps." in " ".join(printed.split())
    assert "what the harness says" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks nothing", "unknown tasks nothing: the harness has 1,"),
        ("--tasks ,", "unknown tasks ',': the harness has 1,"),
        ("--tasks asks --limit 0", "limit=0 must be at least 1"),
        ("--tasks asks --batch-size 0", "batch_size=0 must be at least 1"),
        ("--tasks asks --num-fewshot -1", "num_fewshot=-1 must be at least 0"),
        ("--tasks asks --method qest", "did you mean 'quest'?"),
        ("--tasks asks --metadata {", "--metadata { is no JSON"),
        ("--tasks asks --metadata [1]", "--metadata [1] must be an object"),
        ("--tasks asks --include-path nowhere", "nowhere is no folder"),
        ("--tasks asks --output text.txt", "text.txt is there already"),
        ("", "--tasks"),
    ],
)
def test_mistakes(fail, arguments, message, text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    assert message in fail("lm-eval", *arguments.split())


def test_mistakes_of_the_model(fail, checkpoint, tmp_path):
    line = fail(
        *("lm-eval", "--model", checkpoint, "--tasks", "asks", "--max-length", "9999"),
        *("--output", tmp_path / "x.json"),
    )
    assert "max_length=9999 exceeds the model's context of 512" in line
    assert not (tmp_path / "x.json").exists()


def test_without_the_package_one_line_names_it(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'kvjax[lm-eval]'" in fail("lm-eval", "--tasks", "asks")
