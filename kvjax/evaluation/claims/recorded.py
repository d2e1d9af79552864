"""The records of benchmarks: the files under `benchmarks/results`, newest first.

They come with the package. Where the folder is missing, what only they know is not
measured.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvjax import files
from kvjax.evaluation.claims.claim import NotMeasuredError

# In an installed package they lie beside this file.
_HERE = pathlib.Path(__file__)
FOLDER = _HERE.with_name("results")
if not FOLDER.is_dir():
    FOLDER = _HERE.parents[3] / "benchmarks" / "results"


class Entry(NamedTuple):
    """One measured thing, and when and where."""

    data: Mapping[str, Any]
    when: str  # date and machine, for the table


def documents(folder: pathlib.Path, pattern: str) -> list[tuple[Mapping, str]]:
    """The JSON files that match, newest name first, each with its date and machine."""
    dated = []
    for path in sorted(folder.glob(pattern), key=lambda path: path.name, reverse=True):
        document = json.loads(files.read_text(path))
        if isinstance(document, dict):
            dated.append((document, _when(path.name, document)))
    return dated


def runs(folder: pathlib.Path) -> list[tuple[str, Mapping]]:
    """The newest `kvjax reproduce` of each model, with its file's name.

    Those of the embedded models come first, others by their names.
    """
    newest: dict[str, tuple[str, Mapping]] = {}
    for path in sorted(folder.glob("*-reproduce*.json"), reverse=True):
        document = json.loads(files.read_text(path))
        newest.setdefault(document.get("model", ""), (path.name, document))
    return [newest[model] for model in sorted(newest)]


def _when(name: str, document: Mapping) -> str:
    about = document.get("manifest", document)
    in_name = re.match(r"\d{4}-\d{2}-\d{2}", name)
    date = in_name[0] if in_name else str(about.get("date", "on a day not recorded"))
    device = str(about.get("device", "a device not recorded"))
    cores = about.get("cores", about.get("cpu_count"))
    is_cpu = device.startswith("cpu") or about.get("backend") == "cpu"
    if is_cpu and cores:
        device = f"{cores} cores"
    return f"{date[:10]}, {device}"


def entries(folder: pathlib.Path, pattern: str, part: str) -> list[Entry]:
    """Entries of one part in the newest file that has any, in their order.

    Raises:
        NotMeasuredError: if no file has any.
    """
    for document, when in documents(folder, pattern):
        matching = [e for e in document.get("entries", ()) if e.get("part") == part]
        if matching:
            return [Entry(data, when) for data in matching]
    raise NotMeasuredError(
        f"no recorded run has it: no {pattern} has an entry with part={part!r}."
    )


def first(
    candidates: list[Entry],
    what: str,
    wanted: Callable[[Mapping], bool] = lambda e: True,
) -> Entry:
    """The first entry that is wanted.

    Raises:
        NotMeasuredError: if none is; `what` says what is missing.
    """
    for entry in candidates:
        if wanted(entry.data):
            return entry
    raise NotMeasuredError(f"the recorded runs lack {what}.")


def kernels(folder: pathlib.Path, on_gpu: bool) -> tuple[list[Mapping], str]:
    """Rows of the newest `kvjax bench kernels` on that kind of device.

    Raises:
        NotMeasuredError: if there is none.
    """
    for document, when in documents(folder, "*.json"):
        about = document.get("manifest", {})
        is_bench = about.get("arguments", [])[:2] == ["bench", "kernels"]
        if is_bench and (about.get("backend") not in ("cpu", "tpu")) == on_gpu:
            return document["rows"], when
    where = "a GPU" if on_gpu else "a CPU"
    raise NotMeasuredError(
        f"no `kvjax bench kernels --json` of {where} is among the recorded runs."
    )
