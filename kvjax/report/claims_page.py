"""The table of claims for people: in a terminal, as Markdown and as an HTML page."""

import importlib.resources
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax import files
from kvjax.evaluation.claims.claim import FROM_SHAPES, NOW, VERDICTS, Row, as_dict
from kvjax.report import pictures, terminal
from kvjax.report.figures import claims

FORMAT = 1  # of results.json; a change that breaks readers adds one
HEADINGS = ("claim", "the paper", "here", "n", "measured", "verdict")


def document(
    rows: Sequence[Row],
    manifest: Mapping[str, Any],
    *,
    quick: bool,
    asked: int,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """JSON-ready: what was found, row by row, and how often each verdict was reached.

    Args:
        rows: those that are finished.
        manifest: of `documents.manifest`.
        quick: whether the sizes are the small ones.
        asked: how many rows there will be.
        about: on another model than the embedded ones its name, the `context` of the
            longest inputs, and `n`, the samples that are asked for.
    """
    entries = [as_dict(row) for row in rows]
    count = {verdict: 0 for verdict in VERDICTS}
    for row in rows:
        count[row.verdict] += 1
    results = {
        "format": FORMAT,
        "manifest": dict(manifest),
        "quick": quick,
        "finished": len(rows) == asked,
        **(about or {}),
        "verdicts": count,
        "rows": entries,
    }
    return files.json_ready(results)


def value_and_interval(row: Mapping[str, Any]) -> str:
    """The value with its interval."""
    if row["value"] is None:
        return "-"
    low, high = row["interval"]
    value = number(row["value"])
    if low is None or high is None or low == high:
        return value
    return f"{value} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Three significant digits, and no exponent where it can be helped."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:.3g}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row under `HEADINGS`."""
    measured = row["measured"] or "-"
    return [
        f"{row['claim']} ({row['source']})",
        row["paper"],
        f"{value_and_interval(row)}\n{row['measures']}; bar {row['bar']}",
        str(row["n"]) if row["n"] else "-",
        measured,
        row["verdict"],
    ]


def summary(found: Mapping[str, Any]) -> str:
    """Counts of each verdict, in a line."""
    counts = found["verdicts"]
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    sizes = "small sizes (--quick)" if found["quick"] else "full sizes"
    if "context" in found:
        sizes = f"{found['model']}, inputs of up to {found['context']:,} tokens"
    formulas = sum(row["measured"] == FROM_SHAPES for row in found["rows"])
    note = f" By formulas, not by a run: {formulas}." if formulas else ""
    return f"{len(found['rows'])} claims, {sizes}: {verdicts}.{note}"


CAPTION = (
    "95% intervals; n counts independent samples: windows, examples, heads or repeats. "
    "A value that is counted has no interval. Reproduced: up to the bar, and the "
    "interval excludes no effect. Direction only: smaller, or the interval does not. "
    f'Measured: "{NOW}", when and where the recorded run was made, or '
    f'"{FROM_SHAPES}", by formulas of kvjax that no run can contradict.'
)


def print_table(found: Mapping[str, Any]) -> None:
    """Prints the table, the reasons and the commands beneath.

    Where the terminal is too narrow for the columns, it is a list: no word is cut.
    """
    from rich.console import Console

    console = Console(
        width=terminal.width(), markup=False, emoji=False, highlight=False
    )
    table = _table(found["rows"])
    # Measured by one that has room: a narrow one says it needs no more than it has.
    if Console(width=10_000).measure(table).minimum <= console.width:
        console.print(table)
    else:
        for row in found["rows"]:
            for heading, cell in zip(HEADINGS, cells(row), strict=True):
                line = f"{heading}: {' '.join(cell.split())}"
                print(terminal.wrapped(line, console.width, later="    "))
            print()
    terminal.say(CAPTION)
    for row in found["rows"]:
        terminal.say(f"{row['name']}: {row['verdict']}. {row['reason']}")
        print(f"    {row['command']}")
    terminal.say(summary(found))


def _table(rows: Sequence[Mapping[str, Any]]):
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, show_lines=True, show_edge=False, padding=(0, 1, 0, 0)
    )
    for column, heading in enumerate(HEADINGS):
        words = [
            heading,
            *(word for row in rows for word in cells(row)[column].split()),
        ]
        # Sentences break between words, never in one.
        table.add_column(heading, min_width=max(map(len, words)))
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown(found: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """The table and the reasons, for a page of the docs.

    Args:
        found: of the embedded models.
        others: of other models, a column each.
    """
    by_model = {
        other["model"]: {row["name"]: row for row in other["rows"]} for other in others
    }
    rows = {row["name"]: cells(row) for row in found["rows"]}
    for other in others:
        for row in other["rows"]:
            rows.setdefault(row["name"], [*cells(row)[:2], "-", "-", "-", "-"])
    heading = ["claim", "the paper", "here", "n", "measured", "verdict", *by_model]
    lines = [f"| {' | '.join(heading)} |", "|---|---|---|--:|---|---|"]
    lines[1] += "---|" * len(by_model)
    for name, row_cells in rows.items():
        row_cells = [f"`{name}`: {row_cells[0]}", *row_cells[1:]]
        row_cells += [_in_one_cell(column.get(name)) for column in by_model.values()]
        text = [cell.replace("\n", "; ").replace("|", "\\|") for cell in row_cells]
        lines.append("| " + " | ".join(text) + " |")
    lines += ["", *(summary(one) for one in (found, *others)), ""]
    lines += [f"- `{row['name']}`: {row['reason']}" for row in found["rows"]]
    for model, column in by_model.items():
        lines += ["", f"On {model}:", ""]
        lines += [f"- `{name}`: {row['reason']}" for name, row in column.items()]
    return "\n".join(lines) + "\n"


def _in_one_cell(row: Mapping[str, Any] | None) -> str:
    """The value of another model, what it measures and what follows from it."""
    if row is None:
        return "-"
    if row["value"] is None:
        return str(row["verdict"])
    value = f"{value_and_interval(row)}\n{row['measures']}; bar {row['bar']}"
    return f"{value}; n {row['n']}\n**{row['verdict']}**"


def html(found: Mapping[str, Any]) -> str:
    """The whole report as one page."""
    import jinja2

    source = (
        importlib.resources.files("kvjax.report") / "templates" / "reproduce.html.jinja"
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(source.read_text(encoding="utf-8"))
    details = {row["name"]: row["details"] for row in found["rows"]}
    shown = [
        (title, pictures.svg(figure, title))
        for title, figure in claims.every(found["rows"], details)
    ]
    return template.render(
        summary=summary(found),
        caption=CAPTION,
        headings=HEADINGS,
        rows=[(row, cells(row)) for row in found["rows"]],
        figures=shown,
        manifest=found["manifest"],
    )


def write_results(folder: pathlib.Path, found: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results.json`, whole or not at all."""
    path = folder / "results.json"
    files.write_text(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return path


def write_page(folder: pathlib.Path, found: Mapping[str, Any]) -> pathlib.Path:
    """Writes `report.html`, whole or not at all."""
    path = folder / "report.html"
    files.write_text(path, html(found))
    return path
