"""Documents for people and programs: a table, one HTML page, one JSON file.

The page is self-contained: figures are inline SVG, and it loads nothing.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax import files

FORMAT = 2  # of results.json; a change that breaks readers adds one


DATA = "results.json"


PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def manifest(
    *, version: str, model: str, arguments: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Lists what is needed to run it again: versions, device, arguments, seeds, date.

    Args:
        version: of kvjax.
        model: its name or folder.
        arguments: of the command line, after the program's name.
        settings: every setting, defaults included.
    """
    import jax

    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "kvjax": version,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": device.device_kind,
        "backend": device.platform,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "model": model,
        "arguments": list(arguments),
        "settings": dict(settings),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def results(
    rows: Sequence,
    manifest: Mapping[str, Any],
    kept: Sequence = (),
    *,
    complete: bool = True,
) -> dict[str, Any]:
    """A comparison's rows, its manifest and `kept_tokens.Kept`s, JSON-ready.

    A row is a :class:`kvjax.evaluation.compare.Row`, or what this made of one. A
    comparison may have `sections`, which are others on other models, and `left_out`:
    names of methods by the reason.
    """
    return files.json_ready(
        {
            "format": FORMAT,
            "manifest": dict(manifest),
            "complete": complete,
            "rows": [_as_dict(row) for row in rows],
            "kept": [
                found._replace(
                    positions=[x.tolist() for x in found.positions]
                )._asdict()
                for found in kept
            ],
        }
    )


def _as_dict(row) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    fields = row._asdict()
    for name, value in fields.items():
        if hasattr(value, "_asdict"):
            fields[name] = value._asdict()
        elif name.endswith("_by_depth"):
            keys = ("depth", "correct", "asked")
            fields[name] = [dict(zip(keys, cell, strict=True)) for cell in value]
    return fields


def write_data(folder: pathlib.Path, results: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results.json` alone, as after each row."""
    data = folder / DATA
    files.write_text(data, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return data
