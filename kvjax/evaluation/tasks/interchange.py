"""Tasks in files of other projects: kvpress's columns, in JSONL or parquet.

A row is an example: `context`, `question`, `answer_prefix`, `answer` (a text or a list
of texts), `task` and `max_new_tokens`. Either side can run the other's data.
"""

import json
import pathlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kvjax import files
from kvjax.evaluation.tasks.ruler.fitting import Kind, Matched, Parts, prompted
from kvjax.interface import Tokenizer

COLUMNS = (
    "context",
    "question",
    "answer_prefix",
    "answer",
    "task",
    "max_new_tokens",
)
SUFFIXES = (".jsonl", ".parquet")
_ROWS = 256  # of a parquet file, read at once


class Row(NamedTuple):
    """A row of a file."""

    parts: Parts
    kind: Kind
    where: str  # file and line, for messages


def is_path(task: str) -> bool:
    """Returns whether a task's name means a file or a folder of tasks."""
    path = pathlib.Path(task).expanduser()
    return path.suffix in SUFFIXES or "/" in task or (task != "" and path.is_dir())


def read(path: str | pathlib.Path, *, n: int | None = None) -> list[Row]:
    """Reads the rows of a file, or of all files in a folder, in the order of names.

    Args:
        path: a `.jsonl` or `.parquet` file, or a folder that has some.
        n: rows of each task, the first; all if None.

    Returns:
        The rows. Tasks whose name begins with `qa` want one of their answers, others
        all.

    Raises:
        FileNotFoundError: if there is no such file, or none in the folder.
        ImportError: at a parquet file, without pyarrow.
        ValueError: naming the row, if a column is missing or holds something else.
    """
    rows, counted = [], {}
    for file in _files(pathlib.Path(path).expanduser()):
        for where, record in _records(file):
            parts, kind = _checked(where, record)
            counted[kind.task] = counted.get(kind.task, 0) + 1
            if n is None or counted[kind.task] <= n:
                rows.append(Row(parts, kind, where))
    if not rows:
        raise ValueError(f"{path} has no row: give one an example.")
    return rows


def examples(
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    context: int,
    is_chat: bool = False,
) -> list[Matched]:
    """Returns rows as examples, in their order.

    Args:
        tokenizer: of the model under test.
        rows: from :func:`read`.
        context: most tokens of prompt and answer together.
        is_chat: in the model's chat template.

    Raises:
        ValueError: naming the row, if one does not fit.
    """
    made = []
    for parts, kind, where in rows:
        one = prompted(tokenizer, parts, kind, is_chat=is_chat)
        if len(one.prompt) + kind.reply > context:
            raise ValueError(
                f"{where}: its prompt has {len(one.prompt)} tokens; with "
                f"max_new_tokens={kind.reply} that exceeds {context=}: raise it, or "
                "leave the row out."
            )
        made.append(one)
    return made


def write(path: str | pathlib.Path, made: Sequence[Matched]) -> None:
    """Writes examples to a `.jsonl` or `.parquet` file, whole or not at all.

    Raises:
        ValueError: if the name ends in neither.
        ImportError: if it ends in `.parquet`, without pyarrow.
        OSError: if it cannot be written.
    """
    path = pathlib.Path(path)
    check_name(path)
    records = [record(one) for one in made]
    if path.suffix == ".jsonl":
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in records]
        files.write_text(path, "".join(lines))
        return
    pyarrow = _pyarrow(path)
    table = pyarrow.Table.from_pylist(records)
    with files.replacing(path) as new:
        pyarrow.parquet.write_table(table, new)


def check_name(path: pathlib.Path) -> None:
    """Raises ValueError unless a file's name says how it is to be written."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}.")


def record(one: Matched) -> dict[str, Any]:
    """Returns an example as a row."""
    context, question, prefix, answers = one.parts
    values = (context, question, prefix, list(answers), one.task, one.kind.reply)
    return dict(zip(COLUMNS, values, strict=True))


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"{path} has no {' and no '.join(SUFFIXES)} file.")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file and no folder.")
    check_name(path)
    return [path]


def _records(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)


def _jsonl(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Not `splitlines`: what separates lines elsewhere may stand in a JSON string.
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise ValueError(f"{where} is no JSON: {reason}.") from None
        if not isinstance(found, dict):
            raise ValueError(
                f"{where} is a {type(found).__name__}, and must be an object with the "
                f"keys {', '.join(COLUMNS)}."
            )
        yield where, found


def _parquet(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    pyarrow = _pyarrow(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path.name, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS, columns=list(COLUMNS)):
                for found in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", found
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no parquet file, or damaged: {reason}") from error


def _pyarrow(path: pathlib.Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"{path} needs pyarrow: pip install 'kvjax[parquet]', or take .jsonl."
        ) from error
    return pyarrow


def _check_columns(where: str, names: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        there = ", ".join(map(str, names)) or "nothing"
        raise ValueError(f"{where} has no {' and no '.join(missing)}, only {there}.")


def _checked(where: str, found: Mapping[str, Any]) -> tuple[Parts, Kind]:
    _check_columns(where, list(found))
    for name in ("context", "question", "answer_prefix", "task"):
        _check_text(where, name, found[name])
    if not (found["context"] + found["question"]).strip():
        raise ValueError(f"{where}: context and question say nothing.")
    answers = found["answer"]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}: answer={answers!r} must be a text, or several.")
    for answer in answers:
        _check_text(where, "answer", answer)
        if not answer.strip():
            raise ValueError(f"{where}: an answer says nothing.")
    reply = found["max_new_tokens"]
    if isinstance(reply, float) and reply.is_integer():
        reply = int(reply)  # as pandas has a column with gaps
    if not isinstance(reply, int) or isinstance(reply, bool) or reply < 1:
        raise ValueError(
            f"{where}: max_new_tokens={reply!r} must be a whole number of at least 1."
        )
    texts = (found["context"], found["question"], found["answer_prefix"])
    kind = Kind(found["task"], reply, found["task"].startswith("qa"))
    return Parts(*texts, tuple(answers)), kind


def _check_text(where: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}={reprlib.repr(value)} must be a text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {name} holds half of a surrogate pair.") from None
