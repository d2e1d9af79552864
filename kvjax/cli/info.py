"""`kvjax methods` and `kvjax cite`: what the methods say about themselves."""

import json
from typing import Annotated

import typer

from kvjax import registry
from kvjax.cli.common import JsonOption
from kvjax.describe import describe


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
        print(f"{entry.name:<{wide}}{entry.summary}")
        print(f"{'':<{wide}}options: {', '.join(options) or 'none'}")
        print(f"{'':<{wide}}reads per step and layer: {entry.reads}")


def cite(
    name: Annotated[str, typer.Argument(help="A method or transform.")],
    as_json: JsonOption = False,
) -> None:
    """The paper a method comes from, and where the method deviates from it."""
    entry = describe(registry.get(name))
    if as_json:
        keys = ("name", "source", "deviations")
        print(json.dumps({key: getattr(entry, key) for key in keys}, indent=2))
        return
    print(entry.source)
    print(f"Deviations: {entry.deviations}")
