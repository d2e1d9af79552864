"""The benchmark of RULER goes on after a kill; its page shows whole lines alone."""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import types

import pytest
import ruler_page
from tiny import tiny_model

from kvjax.decoding import finite

ROOT = pathlib.Path(__file__).parents[2]


def benchmark():
    spec = importlib.util.spec_from_file_location(
        "ruler_benchmark", ROOT / "benchmarks" / "ruler.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    ruler = benchmark()
    path = tmp_path / "rows.jsonl"
    assert ruler.known(path) == {}
    for key in ("a", "b", "c"):
        ruler.append(path, {"key": key})
    whole = path.read_text()
    path.write_text(whole[:-6])
    assert list(ruler.known(path)) == ["a", "b"]
    assert path.read_text() == whole[: len(whole) * 2 // 3]
    ruler.append(path, {"key": "c"})
    assert path.read_text() == whole


def test_every_row_is_planned_once_and_the_telling_ones_first():
    ruler = benchmark()
    rows = ruler.planned(1.0, types.SimpleNamespace(context=2048, n=20))
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row.method for row in rows[:13]} == {"full"}
    methods = {row.method.split(":")[0] for row in rows}
    assert {"snapkv", "quest", "h2o", "retro+quest"} <= methods
    full = [(row.context, row.n) for row in rows if row.method == "full"]
    assert set(full) == {(1024, 20), (2048, 20), (4096, 20)}
    budgets = {row.method.split("budget=")[-1] for row in rows} - {"full"}
    assert {"512", "256"} <= budgets
    assert {row.n for row in rows if row.method != "full"} == {10}


def test_methods_read_a_task_together_and_none_is_left_out():
    ruler = benchmark()
    args = types.SimpleNamespace(context=1024, n=4, batch=2, room=1.0)
    decoder = tiny_model(num_layers=1, context=4096).decoder
    rows = ruler.planned(1.0, args)
    other = dataclasses.replace(rows[0], method="entmaxkv:budget=64")
    fit, said = ruler.answerable(decoder, [*rows, other])
    (row,) = said
    assert row["key"] == other.key
    assert "approximates entmax" in row["error"]

    groups = list(ruler.groups(decoder, fit, args))
    assert sorted(row.key for part in groups for row in part) == sorted(
        row.key for row in fit
    )
    for part in groups:
        assert len({(row.context, row.question, row.task, row.n) for row in part}) == 1
    sizes = [len(part) for part in groups]
    assert max(sizes) > 5  # as many as the room holds
    # The tasks of the same methods follow each other: what is compiled serves all.
    names = [tuple(row.method for row in part) for part in groups]
    runs = [
        key for key, _ in itertools.groupby(zip(names, keys_of(groups), strict=True))
    ]
    assert len(runs) == len(set(runs))


def keys_of(groups):
    return [(part[0].context, part[0].question) for part in groups]


def test_rows_that_were_gathered_are_not_measured_again(tmp_path):
    ruler = benchmark()
    args = arguments()
    assert ruler.gathered(None, args) == {}
    document = tmp_path / "rows.json"
    rows = [{"key": "a", "n": 1}, {"key": "b"}]
    document.write_text(json.dumps(ruler.about(args) | {"rows": rows}))
    expected = {"a": {"key": "a", "n": 1}, "b": {"key": "b"}}
    assert ruler.gathered(document, args) == expected
    for name, field in (
        ("model", "model"),
        ("seed", "seed"),
        ("text", "ruler_text"),
        ("chat", "chat"),
    ):
        old = getattr(args, field)
        other = types.SimpleNamespace(**vars(args) | {field: "another"})
        message = f"rows of {name}={old!r}, and these are of {name}='another'"
        with pytest.raises(ValueError, match=message):
            ruler.gathered(document, other)


def arguments():
    return types.SimpleNamespace(model="m", seed=3, ruler_text="shipped", chat=False)


def test_rows_of_fewer_examples_are_measured_again():
    ruler = benchmark()
    row = ruler.Row("full", 1024, "seen", "vt", 20)
    assert ruler.is_done(row, {row.key: {"key": row.key, "n": 20}})
    assert not ruler.is_done(row, {row.key: {"key": row.key, "n": 10}})
    assert not ruler.is_done(row, {row.key: {"key": row.key}})
    assert not ruler.is_done(row, {})


def test_one_method_that_fails_does_not_end_the_run(monkeypatch):
    """What was read together is measured apart, and the reason takes a row's place."""
    ruler, groups = benchmark(), []

    def measure(model, rows, source, args):
        groups.append([row.method for row in rows])
        if "bad" in groups[-1]:
            raise finite.NotFiniteError("logits are not finite")
        return [{"key": row.key, "scores": [1]} for row in rows]

    monkeypatch.setattr(ruler, "measure", measure)
    rows = [ruler.Row(name, 1024, "seen", "vt", 2) for name in ("a", "bad", "c")]
    found = ruler.outcomes(None, rows, None, None)
    assert groups == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]
    assert [row["key"] for row in found] == [row.key for row in rows]
    assert found[1] == {"key": rows[1].key, "error": "logits are not finite"} | (
        dataclasses.asdict(rows[1])
    )
    assert found[0]["scores"] == found[2]["scores"] == [1]
    assert ruler.is_done(rows[1], {rows[1].key: found[1]})


def test_the_page_shows_methods_whose_tasks_are_all_there(tmp_path, monkeypatch):
    monkeypatch.setattr(ruler_page, "RESULTS", tmp_path)
    assert not ruler_page.is_there()

    def row(method, task, mean, question="seen", context=2048):
        about = {"method": method, "task": task, "question": question, "n": 10}
        score = {"scores": [mean], "string_match": {"mean": mean}}
        return about | score | {"context": context}

    tasks = ruler_page.TASKS
    rows = [row("full", task, 1.0) for task in tasks]
    rows += [row("a:budget=8", task, (task == "vt") / 2, "after") for task in tasks]
    rows += [row("b", task, 1.0) for task in tasks[:-1]]  # not all yet
    document = {"model": "m", "text": "shipped", "rows": rows}
    (tmp_path / "2026-ruler.json").write_text(json.dumps(document))
    assert ruler_page.is_there()
    lines = ruler_page.table().splitlines()
    assert lines[2] == (
        "| 2,048 | `full` | - | 100 | 100 | 100 | 100 | 100 | 100 | 100 | 100.0 |"
    )
    assert lines[3] == (
        "| 2,048 | `a:budget=8` | after | 0 | 0 | 0 | 50 | 0 | 0 | 0 | 3.8 |"
    )
    assert lines[4] == ""
