"""The benchmark of RULER goes on after a kill; its page shows whole lines alone."""

import importlib.util
import json
import pathlib
import types

import ruler_page

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
