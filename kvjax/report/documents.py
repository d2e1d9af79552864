"""Documents for programs: a comparison as one JSON file, and its rows as columns.

The JSON holds everything, the columns of `results.csv` and `results.parquet` what is a
number.
"""

import csv
import datetime
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax import files
from kvjax.evaluation import fronts, records

FORMAT = 3  # of results.json; a change that breaks readers adds one


DATA = "results.json"
CSV = "results.csv"
PARQUET = "results.parquet"


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

    A row is a :class:`kvjax.evaluation.compare_rows.Row`, or what this made of one.
    `pareto` names the methods on the front of each result
    (:mod:`kvjax.evaluation.fronts`). A comparison may have `sections`, which are others
    on other models, and `left_out`: names of methods by the reason.
    """
    found = files.json_ready([records.as_dict(row) for row in rows])
    return files.json_ready(
        {
            "format": FORMAT,
            "manifest": dict(manifest),
            "complete": complete,
            "rows": found,
            "pareto": fronts.fronts(found),
            "kept": [
                found._replace(
                    positions=[x.tolist() for x in found.positions]
                )._asdict()
                for found in kept
            ],
        }
    )


def write_data(folder: pathlib.Path, results: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results.json` alone, as after each row."""
    data = folder / DATA
    files.write_text(data, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return data


def columns(results: Mapping[str, Any]) -> dict[str, list[Any]]:
    """All rows, those of sections too, as columns; see `kvjax.evaluation.records`."""
    parts = [
        records.columns(one["rows"], {"model": one["manifest"]["model"]})
        for one in (results, *results.get("sections", ()))
        if one["rows"]
    ]
    counts = [len(part["model"]) for part in parts]
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: [
            value
            for part, count in zip(parts, counts, strict=True)
            for value in part.get(name, [None] * count)
        ]
        for name in names
    }


def write_columns(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes `results.csv`, and `results.parquet` where pyarrow is installed."""
    table = columns(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    files.write_text(folder / CSV, text.getvalue())
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow
        import pyarrow.parquet

        target = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(table), target)
        files.write_bytes(folder / PARQUET, target.getvalue())
