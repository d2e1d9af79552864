"""`kvjax methods` and `kvjax cite`: what the methods say about themselves."""

import json
from typing import Annotated

import typer

import kvjax
from kvjax import citations, registry
from kvjax.cli.options import JsonOption
from kvjax.describe import describe
from kvjax.report import terminal


def methods(as_json: JsonOption = False) -> None:
    """Every method and transform: what it does, its options, what a step reads."""
    names = (*registry.names(), *registry.transforms())
    known = [describe(registry.get(name)) for name in names]
    if as_json:
        print(json.dumps([entry._asdict() for entry in known], indent=2))
        return
    wide = max(len(entry.name) for entry in known) + 2
    for entry in known:
        options = [f"{name}={value}" for name, value in entry.options.items()]
        said = [entry.summary, f"options: {', '.join(options) or 'none'}"]
        said.append(f"reads per step and layer: {entry.reads}")
        for begin, text in zip((entry.name, "", ""), said, strict=True):
            terminal.say(f"{begin:<{wide}}{text}", later=" " * wide)


def cite(
    method: Annotated[
        list[str] | None,
        typer.Argument(help="Methods and transforms; kvjax alone if left out."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """BibTeX of the papers of methods, and of kvjax; where a method deviates."""
    # Options of a configured method do not matter here: quest:budget=64 is quest.
    parts = [part for spec in method or () for part in spec.split("+")]
    names = dict.fromkeys(part.partition(":")[0].strip() for part in parts)
    about = [describe(registry.get(name)) for name in names]
    own = citations.software_entry(kvjax.__version__)
    papers = [citations.arxiv_ids(entry.source) for entry in about]
    if as_json:
        rows = [
            {
                "name": entry.name,
                "source": entry.source,
                "deviations": entry.deviations,
                "bibtex": [citations.paper_entry(arxiv) for arxiv in ids],
            }
            for entry, ids in zip(about, papers, strict=True)
        ]
        print(json.dumps({"methods": rows, "kvjax": own}, indent=2))
        return
    for entry in about:
        print(_comment(f"{entry.name}: {entry.source}"))
        print(_comment(f"Deviations: {entry.deviations}"))
    for arxiv in dict.fromkeys(arxiv for ids in papers for arxiv in ids):
        print(f"\n{citations.paper_entry(arxiv)}")
    print(f"\n{own}" if about else own)


def _comment(text: str) -> str:
    # BibTeX skips what is outside of entries, and takes an @ for the next one's start.
    return terminal.wrapped("% " + text.replace("@", " at "), 79, later="% ")
