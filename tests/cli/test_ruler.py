"""RULER's tasks, long answers and files of tasks, from the command line."""

import json

import pytest
from tiny import byte_tokenizer, tiny_model

import models
from kvjax.evaluation import one_task
from kvjax.evaluation.tasks import ruler
from kvjax.report import table


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    model = tiny_model(num_layers=1, context=1280)
    model = model._replace(tokenizer=byte_tokenizer(), eos_ids=(258,))
    folder = tmp_path_factory.mktemp("models") / "long"
    models.save_pretrained(model, folder)
    return folder


FEW = ("niah_single_1", "niah_multivalue", "qa_1")


def test_ruler_is_all_of_its_tasks_and_their_mean(run, roomy, tmp_path, monkeypatch):
    assert ("ruler", *ruler.TASKS) == one_task.MATCHED
    monkeypatch.setattr(ruler, "TASKS", FEW)
    kept = tmp_path / "answers.jsonl"
    command = ["eval", "--task", "ruler", "--model", roomy, "--n", "1"]
    command += ["--context", "1100", "--method", "streaming_llm:budget=64"]
    document = json.loads(run(*command, "--save-answers", kept, "--json"))
    assert tuple(document["tasks"]) == FEW
    means = [interval["mean"] for interval in document["tasks"].values()]
    assert document["average"] == sum(means) / 3
    assert document["ruler_text"] == "shipped"
    assert "text" not in document
    assert [x["task"] for x in document["examples"]] == list(FEW)
    lines = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert [line["task"] for line in lines] == list(FEW)
    for line, example in zip(lines, document["examples"], strict=True):
        assert line["generated"] == example["answer"]


def test_what_is_exported_is_answered_alike(run, roomy, tmp_path, capsys):
    path = tmp_path / "tasks.jsonl"
    sizes = ["--context", "640", "--n", "2", "--model", roomy]
    said = run("export-tasks", "--task", "niah_single_1", *sizes, "--out", path)
    assert said == f"{path}: 2 rows of 1 tasks, context 640\n"
    options = ["--question", "after", "--method", "streaming_llm:budget=64"]
    own, other = (
        json.loads(run("eval", "--task", task, *sizes, *options, "--json"))
        for task in ("niah_single_1", path)
    )
    assert own["examples"] == other["examples"]
    assert own["tasks"] == other["tasks"]
    table.print_task(other)
    printed = " ".join(capsys.readouterr().out.split())
    assert "question after it, string match: task score n" in printed
    assert printed.endswith("niah_single_1 0% [0, 66] 2 mean of 1 tasks 0.0%")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval --task vt --context 180", "context=180 is too short for vt: its prompt"),
        ("eval --task vt --text README.md", "--task vt has texts of its own: leave -"),
        (
            "eval --task passkey --ruler-text published",
            "--ruler-text is of RULER's tas",
        ),
        (
            "eval --task vt --ruler-text other",
            "ruler_text='other' must be one of shipped, pub",
        ),
        (
            "eval --task vt --ruler-text published",
            "ruler is not on this machine: RULER's texts, SQuAD 2.0, HotpotQA and",
        ),
        ("eval --task gone.jsonl", "gone.jsonl is no file and no folder"),
        (
            "export-tasks --task passkey --out x.jsonl",
            "unknown task='passkey': choose ",
        ),
        ("export-tasks --out x.csv", "x.csv must end in .jsonl or .parquet"),
        ("export-tasks --out x.jsonl --n 0", "n=0 must be at least 1"),
        (
            "export-tasks --out x.jsonl --ruler-text published",
            "Run `kvjax fetch ruler`.",
        ),
    ],
)
def test_mistakes_are_one_line(fail, command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*command.split())
    assert not list(tmp_path.glob("x.*"))


def test_a_file_that_is_there_stays(fail, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("mine")
    assert "is there already" in fail("export-tasks", "--out", path)
    assert path.read_text() == "mine"


def test_a_long_answer_is_scored_by_its_steps(run, roomy, capsys):
    command = ["eval", "--task", "path_traversal", "--model", roomy]
    document = json.loads(run(*command, "--context", "750", "--n", "1", "--json"))
    assert document["valid_steps"]["n"] == 1
    assert document["examples"][0]["steps"] > 2
    table.print_task(document)
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean share of steps before the first mistake 0%" in printed
