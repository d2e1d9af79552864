"""`kvjax compare` and `kvjax eval`: what is run, what is kept, what is said of it."""

import csv
import json
import re

import numpy as np
import pyarrow.parquet
import pytest
from tiny import byte_tokenizer, tiny_model

import models
from kvjax import cli, registry
from kvjax.evaluation import compare as comparison
from kvjax.evaluation import compare_rows, memory

SMALL = ["--context", "352", "--new-tokens", "8", "--windows", "2", "--n", "1"]
SMALL += ["--budget", "40"]
QUESTIONS = (
    '{"context": "The key is under the mat.", "question": "Where?", "answer": "mat"}\n'
    '{"question": "Say e:", "answer": ["e", "E"]}\n'
)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(QUESTIONS)
    return path


@pytest.fixture
def compared(checkpoint, text_file, tmp_path):
    """Arguments of a small comparison."""
    given = ["--model", checkpoint, "--text", text_file, "--out", tmp_path / "report"]
    return ["compare", *given, *SMALL, "--method", "streaming_llm"]


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def results_of(tmp_path):
    return json.loads((tmp_path / "report" / "results.json").read_text("utf-8"))


def test_answers_are_kept_and_are_those_that_are_scored(
    run, fail, compared, questions, tmp_path
):
    path = tmp_path / "answers.jsonl"
    given = ["--tasks", questions, "--save-answers", path]
    out = run(*compared, *given)
    assert "Own: 2 questions of mine.jsonl." in " ".join(out.split())
    results = results_of(tmp_path)
    kept = read(path)
    for row in results["rows"]:
        mine = [line for line in kept if line["method"] == row["method"]]
        scores = {task: [] for task in compare_rows.TASKS}
        for line in mine:
            scores[line["task"]].append(line["score"])
        assert [len(found) for found in scores.values()] == [2, 1, 1, 1]
        for task, found in scores.items():
            assert np.mean(found) == row[task]["mean"]
            assert row[task]["n"] == len(found)
    assert {line["model"] for line in kept} == {results["manifest"]["model"]}
    # Neither is lost without a word; gone on with, nothing is answered twice.
    assert "is there from an earlier run" in fail(*compared, *given)
    assert "with tasks='mine.jsonl' and cannot" in fail(*compared, "--continue")
    run(*compared, *given, "--continue", "--method", "h2o")
    again = read(path)
    assert again[: len(kept)] == kept
    assert [line["method"] for line in again[len(kept) :]] == ["h2o:budget=40"] * 5


def test_answers_of_methods_that_were_not_done_are_made_anew(
    run, compared, tmp_path, monkeypatch, capsys
):
    path, given = tmp_path / "answers.jsonl", [*compared, "--method", "cascade"]
    given += ["--save-answers", tmp_path / "answers.jsonl"]
    original, calls = comparison.continuations.follow, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(comparison.continuations, "follow", stopped)
    assert cli.run([str(argument) for argument in given]) == 130
    capsys.readouterr()
    done = [row["method"] for row in results_of(tmp_path)["rows"]]
    assert {line["method"] for line in read(path)} > set(done)
    run(*given, "--continue")
    found = [(line["method"], line["task"], line["example"]) for line in read(path)]
    assert len(found) == len(set(found)) == 3 * 3


def test_the_users_text_is_called_by_its_name(run, compared, checkpoint, tmp_path):
    out = run(*compared)
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert results_of(tmp_path)["manifest"]["text"] == "text.txt"
    for shown in (out, page):
        said = " ".join(shown.split())
        assert "2 windows of text.txt" in said
        assert "held-out" not in said
    options = ["--model", checkpoint, "--context", "100", "--n", "2"]
    options += ["--new-tokens", "8", "--task", "perplexity"]
    text = compared[compared.index("--text") + 1]
    assert "2 windows of text.txt" in run("eval", *options, "--text", text)
    # The text that ships was held out of the embedded models' training alone.
    assert "2 windows of Python sources" in run("eval", *options)


def test_a_sweep_has_a_row_for_every_budget(run, fail, compared, tmp_path):
    given = [*compared, "--method", "full"]
    out = run(*given, "--budget", "48,40,48")
    results = results_of(tmp_path)
    names = [row["method"] for row in results["rows"]]
    sweep = ["streaming_llm:budget=48", "streaming_llm:budget=40"]
    assert names == ["full", *sweep]
    assert results["manifest"]["settings"]["budget"] == [48, 40]
    kl = {row["method"]: row["kl"]["mean"] for row in results["rows"]}
    front = results["pareto"]["kl"]
    assert front[-1] == "full"
    assert [kl[name] for name in front] == sorted(map(kl.get, front), reverse=True)
    said = " ".join(out.split())
    assert "method budget read / token" in said
    assert re.search(r" streaming_llm 48 .* streaming_llm 40 ", said)
    assert re.search(r" KL: .*streaming_llm at 4.*, full passkey: ", said)
    with open(tmp_path / "report" / "results.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == names
    assert [line["budget"] for line in lines] == ["", "48", "40"]
    for line, row in zip(lines, results["rows"], strict=True):
        assert float(line["kl"]) == row["kl"]["mean"]
        assert float(line["passkey_high"]) == row["passkey"]["high"]
        assert (line["on_front_of_kl"] == "True") == (row["method"] in front)
    table = pyarrow.parquet.read_table(tmp_path / "report" / "results.parquet")
    assert table["kl"].to_pylist() == list(kl.values())
    assert table["budget"].to_pylist() == [None, 48, 40]
    assert "with budget=[48, 40] and cannot go on with 40" in fail(*given, "--continue")


@pytest.fixture
def both_tiny(monkeypatch):
    """The two embedded models, tiny; and few methods of each."""
    made = {}
    for name, alpha in {"embedded-softmax": 1.0, "embedded-entmax": 1.5}.items():
        model = tiny_model(num_layers=1, context=512, attention_alpha=alpha)
        made[name] = model._replace(tokenizer=byte_tokenizer(), name=name)
    monkeypatch.setattr(models, "load", lambda name, **options: made[name])
    monkeypatch.setattr(models, "load_decoder", lambda name, **_: made[name].decoder)
    specs = {1.0: ["streaming_llm"], 1.5: ["entmaxkv:page_size=8"]}
    monkeypatch.setattr(cli.compare, "_every", lambda alpha: specs[alpha])


def test_the_default_has_a_section_of_the_entmax_model(
    run, fail, both_tiny, text_file, tmp_path
):
    given = ["compare", "--text", text_file, "--out", tmp_path / "report", *SMALL]
    kept = tmp_path / "answers.jsonl"
    given += ["--save-answers", kept]
    out = run(*given)
    answers = read(kept)
    assert {line["model"] for line in answers} == {
        "embedded-softmax",
        "embedded-entmax",
    }
    results = results_of(tmp_path)
    (section,) = results["sections"]
    assert results["complete"]
    assert section["complete"]
    assert section["manifest"]["model"] == "embedded-entmax"
    names = [row["method"] for row in section["rows"]]
    assert names == ["full", "entmaxkv:budget=40,page_size=8"]
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    for shown in (out, page):
        said = " ".join(shown.replace("<wbr>", "").split())
        assert said.count("embedded-entmax, context 352 tokens") == 1
        assert "entmaxkv" in said
        assert "Left out: entmax_full (" in said

    # Gone on with under a method, the section stays; without one, both have their rows.
    run(*given, "--continue", "--method", "h2o")
    after = results_of(tmp_path)
    assert read(kept)[: len(answers)] == answers
    assert after["sections"] == results["sections"]
    assert [row["method"] for row in after["rows"]][:2] == ["full", "h2o:budget=40"]
    run(*given, "--continue")
    assert results_of(tmp_path)["sections"][0]["rows"] == section["rows"]
    assert "seed=0 and cannot go on with 1" in fail(*given, "--continue", "--seed", "1")


def test_every_method_has_a_row_or_a_reason():
    for alpha, others in ((1.0, ["entmax_full", "entmaxkv"]), (1.5, None)):
        specs = cli.compare._every(alpha)
        rows = {piece.partition(":")[0] for spec in specs for piece in spec.split("+")}
        reasons = cli.compare._left_out(specs)
        named = [name for names in reasons.values() for name in names]
        assert sorted([*named, *rows]) == sorted(
            [*registry.names(), *registry.transforms()]
        )
        if others:
            assert reasons["for entmax models"] == others
            assert "retro" in rows
    assert not cli.compare._left_out([*registry.names(), *registry.transforms()])


def test_a_machine_that_is_too_small_is_said_before_the_work(
    fail, run, compared, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "free_bytes", lambda: 100_000)
    line = fail(*compared)
    assert "comparing at context=352 takes more than this machine has: weights" in line
    assert "97.7 KiB are free: lower --context" in line
    assert not (tmp_path / "report" / "results.json").exists()
    # What is counted fits, what is estimated does not: it is tried, one row at a time.
    needs = []
    original = memory.fit

    def noted(*arguments, **options):
        needs.append(original(*arguments, **options).need)
        return original(*arguments, **options)

    monkeypatch.setattr(memory, "fit", noted)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    run(*compared, "--batch", "2")
    monkeypatch.setattr(memory, "free_bytes", lambda: needs[0].total - 1)
    command = [*compared, "--batch", "2", "--overwrite"]
    assert cli.run([str(argument) for argument in command]) == 0
    said = capsys.readouterr().err
    assert said.count("kvjax: 1 rows together instead of 2, to fit the ") == 1
    assert results_of(tmp_path)["manifest"]["settings"]["batch"] == 1


def test_eval_takes_questions_and_keeps_answers(run, checkpoint, questions, tmp_path):
    path = tmp_path / "answers.jsonl"
    options = ["--model", checkpoint, "--tasks", questions, "--new-tokens", "6"]
    out = run("eval", *options, "--save-answers", path)
    assert out.startswith("own, full, context 512: ")
    assert "n=2 of mine.jsonl" in out
    document = json.loads(run("eval", *options, "--json"))
    kept = read(path)
    assert document["accuracy"]["n"] == len(kept) == 2
    assert document["accuracy"]["mean"] == np.mean([line["score"] for line in kept])
    assert [line["generated"] for line in kept] == [
        example["answer"] for example in document["examples"]
    ]
    assert kept[1]["expected"] == ["e", "E"]
    # The first line alone.
    asked = json.loads(run("eval", *options, "--json", "--chat", "--n", "1"))
    plain = [example["prompt_tokens"] for example in document["examples"]]
    turned = [example["prompt_tokens"] for example in asked["examples"]]
    assert turned == [count + len("<user>") for count in plain[:1]]
    assert asked["n"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval", "give either --task or --tasks, and only one"),
        ("eval --task passkey --tasks q.jsonl", "give either --task or --tasks"),
        (
            "eval --tasks one.jsonl --n 2",
            "n=2 exceeds the questions of one.jsonl, 1: lower",
        ),
        ("eval --tasks one.jsonl --n 0", "n=0 must be at least 1"),
        ("eval --tasks one.jsonl --text x", "has texts of its own: leave --text out"),
        ("eval --task perplexity --chat", "answers nothing: leave --chat out"),
        (
            "eval --task fidelity --save-answers a.jsonl",
            "answers nothing: leave --save-answers out",
        ),
        ("eval --tasks q.jsonl", "q.jsonl, line 2: is no JSON"),
        ("compare --tasks q.jsonl", "q.jsonl, line 2: is no JSON"),
        ("compare --tasks nowhere.jsonl", "nowhere.jsonl"),
        ("compare --budget 64,some", "--budget 64,some must be whole numbers"),
        (
            "compare --budget 64,512",
            "--budget 512 must be below --context 512: otherwise",
        ),
        ("compare --question never", "question='never' must be one of seen, after"),
        ("eval --task passkey --save-answers q.jsonl", "q.jsonl is there already"),
        ("compare --save-answers q.jsonl", "q.jsonl is there already"),
        ("compare --continue --save-answers q.jsonl", "q.jsonl is there already"),
        ("eval --task passkey --chat", "this is no chat model"),
    ],
)
def test_mistakes(fail, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text(QUESTIONS.splitlines()[0])
    (tmp_path / "q.jsonl").write_text(QUESTIONS.splitlines()[0] + "\n{\n")
    assert message in fail(*arguments.split())
    assert not list(tmp_path.glob("a*.jsonl"))
