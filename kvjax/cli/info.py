"""`kvjax methods` and `kvjax cite`: what the methods say about themselves."""

import json
from typing import Annotated

import typer

import kvjax
from kvjax import registry
from kvjax.cli.options import JsonOption
from kvjax.registry import citations
from kvjax.registry.describe import cite as bibtex
from kvjax.registry.describe import described
from kvjax.report import terminal


def methods(as_json: JsonOption = False) -> None:
    """Every method and transform: what it does, its options, what a step reads."""
    known = described(*registry.every())
    if as_json:
        print(json.dumps([entry._asdict() for entry in known], indent=2))
        return
    wide = max(len(entry.name) for entry in known) + 2
    for entry in known:
        options = [f"{name}={value}" for name, value in entry.options.items()]
        lines = [entry.summary, f"options: {', '.join(options) or 'none'}"]
        lines.append(f"reads per step and layer: {entry.reads}")
        for begin, text in zip((entry.name, "", ""), lines, strict=True):
            terminal.say(f"{begin:<{wide}}{text}", later=" " * wide)


def cite(
    method: Annotated[
        list[str] | None,
        typer.Argument(help="Methods and transforms; kvjax alone if left out."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """BibTeX of the papers of methods, and of kvjax; where a method deviates."""
    if not as_json:
        print(bibtex(*(method or ())))
        return
    rows = [
        {
            "name": entry.name,
            "source": entry.source,
            "deviations": entry.deviations,
            "bibtex": citations.entries(entry.source),
        }
        for entry in described(*(method or ()))
    ]
    own = citations.software_entry(kvjax.__version__)
    print(json.dumps({"methods": rows, "kvjax": own}, indent=2))
