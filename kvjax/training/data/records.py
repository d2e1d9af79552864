"""Texts of files of records, one after the other: JSONL and parquet.

A record is one text, in a field of it. Errors name the line, or the row.
"""

import json
import pathlib
from collections.abc import Iterator

from kvjax import files

_SHOWN = 6  # names of fields in an error
_ROWS = 1024  # of a parquet file, read at once


def jsonl(path: pathlib.Path, field: str) -> Iterator[str]:
    """The texts of a JSONL file; lines that are blank are no records.

    Raises:
        ValueError: at a line that is not UTF-8, no JSON object, or has no such text.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path} line {number}"
            content = files.decode(line, place)
            if content.strip():
                yield _text(content, place, field)


def _text(content: str, place: str, field: str) -> str:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        message = getattr(error, "msg", error)  # without a place of its own
        raise ValueError(f"{place} is not JSON: {message}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds no JSON object with a field {field!r}.")
    if field not in record:
        raise ValueError(f"{place} has no field {field!r}: {_instead(record)}.")
    return _checked(record[field], place, field)


def parquet(path: pathlib.Path, field: str) -> Iterator[str]:
    """The texts of a column of a parquet file.

    Raises:
        ImportError: without pyarrow.
        ValueError: if the file is none, has no such column, or at a row without text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"{path} needs pyarrow: pip install 'kvjax[parquet]', or give it as .jsonl."
        ) from error

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(f"{path} has no column {field!r}: {_instead(names)}.")
            for batch in file.iter_batches(_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _checked(value, f"{path} row {number}", field)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no parquet file, or damaged: {reason}") from error


def _instead(names) -> str:
    shown = ", ".join(sorted(map(repr, names))[:_SHOWN]) or "nothing"
    return f"it has {shown}; say which by data.field"


def _checked(value: object, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: field {field!r} is {type(value).__name__} and no text."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a pair
        raise ValueError(
            f"{place}: field {field!r} has a lone surrogate at character "
            f"{error.start}, which no UTF-8 text has."
        ) from error
    return value
