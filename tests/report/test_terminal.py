"""At any width names and numbers are whole: what a terminal of 80 columns shows."""

import json
import pathlib
import re

import pytest

from kvjax import cli
from kvjax.report import table, terminal

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
COMPARED = json.loads((RESULTS / "2026-11-29-compare-embedded.json").read_text("utf-8"))
CONFIG = pathlib.Path(__file__).parents[2] / "docs/configs/llama-3.1-8b.json"
LONG = (
    "retro:window=4+dense_layers:first=2+entmaxkv:selector=gaussian,max_quantile=0.995"
)
WIDTHS = (80, 120)


def check_whole(out: str, cells: list[list[str]], columns: int) -> None:
    """No line is too long, every number is a word, every name a run of whole pieces."""
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= columns
    firsts = {line.split("  ")[0] for line in lines}
    for name, *numbers in cells:
        for number in numbers:
            whole = rf"(?<!\S){re.escape(number)}(?!\S)"
            assert re.search(whole, out), f"{number} of {name} at {columns}"
        folded = (set(terminal.fold(name, n).split("\n")) for n in range(columns))
        assert any(pieces <= firsts for pieces in folded), f"{name} at {columns}"


@pytest.mark.parametrize("columns", range(1, 60))
def test_a_spec_breaks_behind_its_marks_alone(columns):
    lines = terminal.fold(LONG, columns).split("\n")
    assert "".join(lines) == LONG
    assert all(line[-1] in ":,+" for line in lines[:-1])
    for line in lines:
        assert len(line) <= columns or len(terminal.pieces(line)) == 1


@pytest.mark.parametrize("columns", [1, 24, 40, 60, *WIDTHS])
def test_a_table_is_whole_at_any_width(columns, capsys):
    headings = ["method", "read / token, at most", *(f"number {i}" for i in range(9))]
    names = ["full", LONG, "quest:budget=128"]
    rows = [
        [name, *(f"{i}.{j}00 [0, 1]" for j in range(10))]
        for i, name in enumerate(names)
    ]
    terminal.show(headings, rows, columns=columns)
    out = capsys.readouterr().out
    # Narrower than a name and a number it cannot be.
    check_whole(out, rows, max(columns, 60))


def test_rows_of_one_name_are_told_apart_in_every_part(capsys):
    headings = ["method", "budget", *(f"a number {i}" for i in range(6))]
    rows = [
        [name, budget, *(f"{budget}.{i}00 [0, 1]" for i in range(6))]
        for name in ("quest", "snapkv")
        for budget in ("64", "128")
    ]
    terminal.show(headings, rows, columns=44)
    parts = capsys.readouterr().out.strip().split("\n\n")
    assert len(parts) > 1
    for part in parts:
        lines = [line.split()[:2] for line in part.splitlines()[-4:]]
        assert lines == [row[:2] for row in rows]


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_comparison_is_whole(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    table.print_table(COMPARED)
    out = capsys.readouterr().out
    assert out.count("budget=128") == 1 + len(
        COMPARED["sections"]
    )  # once a table of its own
    for sheet in table.sheets(COMPARED):
        assert "quest" in [row[0] for row in sheet.rows]
        check_whole(out, sheet.rows, columns)


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_plan_is_whole(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    plan = ["plan", "--model", str(CONFIG), "--method", "full", "--method", "quest"]
    plan += ["--method", "dense_layers:first=2+quest", "--budget", "4096"]
    plan += ["--context", "8192", "--device", "H200", "--device", "v5p"]
    plan += ["--device", "a-device-of-mine:48:864"]
    assert cli.run([*plan, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert cli.run(plan) == 0
    out = capsys.readouterr().out
    assert out.startswith("budget=4096 in all rows but full.")
    names = ["full", "quest", "dense_layers:first=2+quest"]
    cells = [
        [
            name,
            *(
                f"{row[key] / 1e9:.2f}"
                for key in ("prompt_state", "decode_state", "peak")
            ),
            *(f"{d['most_tokens_per_second']:,.0f}" for d in row["devices"].values()),
        ]
        for name, row in zip(names, document["rows"], strict=True)
    ]
    check_whole(out, cells, columns)


def test_a_small_model_is_not_rounded_away(capsys):
    plan = ["plan", "--context", "512", "--method", "full", "--device", "slow:1:0.001"]
    assert cli.run([*plan, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert cli.run(plan) == 0
    out = capsys.readouterr().out
    assert f"Weights {document['weights'] / 1e9:.2g} GB" in out
    (row,) = document["rows"]
    rate = row["devices"]["slow"]["most_tokens_per_second"]
    assert 0.01 < rate < 1
    (line,) = (line for line in out.splitlines() if line.startswith("full"))
    expected = [f"{row['peak'] / 1e9:.2g}", f"{rate:.2g}"]
    assert [line.split()[4], line.split()[-1]] == expected


@pytest.mark.parametrize("columns", WIDTHS)
def test_timings_and_tasks_are_whole(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    row = {
        "name": "page_attention, entmax",
        "context": 131072,
        "num_bytes": 2**30,
        "floor": 0.0123456,
        "median": 0.1234567,
        "low": 0.1234567,
        "high": 0.2345678,
        "times_full": 12.34,
    }
    settings = {"num_kv_heads": 8, "group": 4, "head_dim": 128, "dtype": "float32"}
    settings |= {"batch": 1, "page_size": 64, "budget": 2048}
    about = {"device": "cpu", "backend": "cpu", "jax": "1", "settings": settings}
    cli.bench._print({"manifest": about, "rows": [row]})
    out = capsys.readouterr().out
    numbers = ["131,072", "1.00 GiB", "12.346", "123.457", "123.457-234.568", "8.7"]
    check_whole(out, [[row["name"], *numbers, "10%", "12.3"]], columns)
    share = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    mean = {"mean": 0.123456}
    keys = ("error", "dropped", "support", "exact", "refreshed")
    layers = [{"layer": i} | dict.fromkeys(keys, mean) for i in range(3)]
    found = {"task": "fidelity", "method": LONG, "context": 512, "n": 4}
    table.print_task(found | {"top1_agreement": share, "kl": mean, "layers": layers})
    out = capsys.readouterr().out
    check_whole(out.partition("\n\n")[2], [["1", "0.1235", "0.12", "12%"]], columns)
    assert max(len(line) for line in out.splitlines()) <= max(columns, len(LONG) + 10)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("command", ["methods", "reproduce --list"])
def test_lists_are_whole(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.run(command.split()) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


def test_what_all_rows_share_is_said_once():
    specs = ["full", "quest:budget=64,page_size=16", "retro:window=4+h2o:budget=64"]
    assert terminal.shared_options(specs) == (
        ["full", "quest:page_size=16", "retro:window=4+h2o"],
        "budget=64 in all rows but full.",
    )
    assert terminal.shared_options(specs[1:])[1] == "budget=64 in all rows."


@pytest.mark.parametrize(
    "specs",
    [
        ["full", "quest:budget=64"],  # one row shares nothing
        ["quest:budget=64", "quest:budget=128", "h2o:budget=128"],  # another value
        ["full", "tova", "snapkv", "quest:budget=64", "h2o:budget=64"],  # few have it
        ["quest", "quest:budget=64", "h2o:budget=64"],  # then two would be called quest
        [],
    ],
)
def test_what_they_do_not_share_stays(specs):
    assert terminal.shared_options(specs) == (specs, "")


def test_a_file_has_a_width_of_its_own(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.width() == terminal.FILE_WIDTH
    for said, columns in (
        ("80", 80),
        ("0", terminal.FILE_WIDTH),
        ("", terminal.FILE_WIDTH),
    ):
        monkeypatch.setenv("COLUMNS", said)
        assert terminal.width() == columns
