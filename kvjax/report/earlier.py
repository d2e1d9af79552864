"""An earlier comparison in a report's folder, and whether it can go on."""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from kvjax import files
from kvjax.files import json_ready
from kvjax.report.documents import DATA, FORMAT, PACKAGES


def check_free(folder: pathlib.Path, *, overwrite: bool, go_on: bool) -> None:
    """Refuses a folder that holds a report, unless told what to do with it.

    Raises:
        ValueError: if it is to be overwritten and gone on with.
        FileExistsError: if there is a report and neither is wanted.
    """
    if overwrite and go_on:
        raise ValueError("give --overwrite or --continue, not both.")
    data = folder / DATA
    if data.exists() and not (overwrite or go_on):
        raise FileExistsError(
            f"{data} is there from an earlier run: go on with it by --continue, "
            "replace it by --overwrite, or give --out another folder."
        )


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The comparisons of a report: the first one, then its sections; none without it.

    Raises:
        ValueError: if the report is damaged.
    """
    path = folder / DATA
    if not path.exists():
        return []
    try:
        newest = json.loads(files.read_text(path))
        comparisons = [newest, *newest.get("sections", ())]
        for one in comparisons:
            dict(one["manifest"]["settings"])
            {row["method"]: row for row in one["rows"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): begin anew with "
            "--overwrite."
        ) from error
    return comparisons


def batch(comparison: Mapping[str, Any]) -> int | None:
    """Rows that were decoded together; None if it does not say."""
    rows = comparison["manifest"]["settings"].get("batch")
    return rows if isinstance(rows, int) else None


def rows(
    folder: pathlib.Path, comparison: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Rows by method, which a comparison of that manifest goes on with.

    Args:
        folder: of the report, for messages.
        comparison: of :func:`read`.
        manifest: of the one that goes on.

    Raises:
        ValueError: if the two are of different models, settings or versions; names
            the first difference.
    """
    check_alike(folder, comparison, manifest, FORMAT)
    return {row["method"]: row for row in comparison["rows"]}


def check_alike(
    folder: pathlib.Path,
    earlier: Mapping[str, Any],
    manifest: Mapping[str, Any],
    number: int,
    free: Collection[str] = (),
) -> None:
    """Refuses to go on with what is of another model, setting or version.

    Args:
        folder: of the report, for messages.
        earlier: the document that is there.
        manifest: of the run that goes on.
        number: of the document's format.
        free: settings that may differ.

    Raises:
        ValueError: naming the first difference.
    """
    before, settings = earlier["manifest"], earlier["manifest"]["settings"]
    pairs: dict[str, tuple[Any, Any]] = {"format": (earlier.get("format"), number)}
    for key in ("kvjax", "model", "backend", "device", "cpu_count", *PACKAGES):
        pairs[key] = before.get(key), manifest[key]
    wanted = json_ready(manifest["settings"])
    for key in wanted | settings:
        if key not in free:
            pairs[key] = settings.get(key), wanted.get(key)
    for key, (old, new) in pairs.items():
        if old != new:
            raise ValueError(
                f"{folder / DATA} was made with {key}={old!r} and cannot go on with "
                f"{new!r}: use that one, or --overwrite, or another --out."
            )
