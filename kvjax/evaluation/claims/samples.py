"""Values of single samples, kept on disk as they come: a kill loses no finished one.

A key says what is measured, and its samples are numbered from 0 on: more of them later
go on where fewer ended.
"""

import hashlib
import json
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvjax import files

FOLDER = "samples"  # of a run's folder
SPENT = "seconds", "cpu_seconds"  # of wall clock, and of all threads
# Of a measurement that begins: the samples that are kept, and those that are missing.
Begun = Callable[[int, int], Any]


# Measures the samples from one number to another: a value each, for JSON.
Make = Callable[[int, int], Sequence[Any]]


class DamagedError(ValueError):
    """A file of samples that cannot be read; the message says what to do."""


class Samples:
    """The values of one run, a file a key.

    Args:
        folder: where they are kept; None keeps them in memory alone.
        ended: called when the last missing sample of a key has been measured.
    """

    def __init__(
        self,
        folder: pathlib.Path | None = None,
        *,
        ended: Callable[[], Any] = lambda: None,
    ):
        self._folder, self._ended = folder, ended
        self._found: dict[str, dict[str, Any]] = {}
        # Seconds that earlier runs took for what this one asked for.
        self.reused: tuple[float, ...] = (0.0, 0.0)
        self.report(lambda kept, missing: None, lambda done: None)

    def report(self, begun: Begun, progress: Callable[[float], Any]) -> None:
        """Says how far measuring is.

        Args:
            begun: called when a key is asked for.
            progress: called with the share of its missing samples that are done.
        """
        self._begun, self._progress = begun, progress

    def values(
        self, key: Sequence[Any], count: int, make: Make, *, batch: int
    ) -> list[Any]:
        """Returns the first `count` values of a key; measures those that are missing.

        Args:
            key: JSON-ready, all that a value depends on but its number.
            count: of samples.
            make: measures some of them.
            batch: samples at a time, after which they are on disk.
        """
        name = _name(key)
        if name not in self._found:
            self._found[name] = self._read(name, key)
        found = self._found[name]
        kept = len(found["values"])
        missing = max(count - kept, 0)
        self._begun(min(kept, count), missing)
        for first in range(kept, count, batch):
            start, processor = time.perf_counter(), time.process_time()
            last = min(first + batch, count)
            found["values"] += files.json_ready(list(make(first, last)))
            if len(found["values"]) != last:
                raise ValueError(f"{key}: samples {first} to {last} gave other counts.")
            found["seconds"] += time.perf_counter() - start
            found["cpu_seconds"] += time.process_time() - processor
            self._write(name, found)
            self._progress((last - kept) / missing)
        if missing:
            self._ended()
        return found["values"][:count]

    def _read(self, name: str, key: Sequence[Any]) -> dict[str, Any]:
        empty = {"key": list(key), "values": [], "seconds": 0.0, "cpu_seconds": 0.0}
        path = self._folder / name if self._folder else None
        if path is None or not path.is_file():
            return empty
        try:
            found = json.loads(files.read_text(path))
            values = list(found["values"])
            spent = {name: float(found[name]) for name in SPENT}
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"{path} is damaged ({type(error).__name__}: {error}): remove it, and "
                "its samples are measured again."
            ) from error
        pairs = zip(self.reused, SPENT, strict=True)
        self.reused = tuple(before + spent[name] for before, name in pairs)
        return empty | {"values": values} | spent

    def _write(self, name: str, found: dict[str, Any]) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(found, allow_nan=False) + "\n"
            files.write_text(self._folder / name, text)


def _name(key: Sequence[Any]) -> str:
    """The file of a key: words of it for people, and a digest."""
    text = json.dumps(list(key))
    words = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(map(str, key))).strip("-")
    return f"{words[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
