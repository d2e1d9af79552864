"""Rows of a comparison as a flat table: a line a method, a column a number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.evaluation import fronts
from kvjax.registry import specs


def as_dict(row: Any) -> dict[str, Any]:
    """A row of :mod:`kvjax.evaluation.compare` as JSON has it; or what is one."""
    if isinstance(row, Mapping):
        return dict(row)
    fields = row._asdict()
    for name, value in fields.items():
        if hasattr(value, "_asdict"):
            fields[name] = value._asdict()
        elif name.endswith("_by_depth") and value is not None:
            keys = ("depth", "correct", "asked")
            fields[name] = [dict(zip(keys, cell, strict=True)) for cell in value]
    return fields


def columns(
    rows: Sequence[Any], about: Mapping[str, Any] | None = None
) -> dict[str, list[Any]]:
    """The rows as lists of equal lengths by the names of the columns.

    An interval is four columns: `kl`, `kl_low`, `kl_high` and `kl_n`. What has no value
    is None, ends that are infinite too; columns without any value are left out. Those
    that begin with `on_front_of_` say where a row is on a Pareto front
    (:mod:`kvjax.evaluation.fronts`), `budget` is the method's, if it has one.

    Args:
        rows: of :func:`kvjax.evaluation.compare.compare`, or of a `results.json`.
        about: columns of one value, put first.
    """
    found = [as_dict(row) for row in rows]
    lines = []
    for row in found:
        line: dict[str, Any] = dict(about or {})
        line |= {"method": row["method"], "budget": budget(row["method"])}
        for name, value in row.items():
            if name.endswith("_by_depth"):
                continue
            if isinstance(value, Mapping):
                ends = {key: _finite(value[key]) for key in ("low", "high", "n")}
                line[name] = _finite(value["mean"])
                line |= {f"{name}_{key}": end for key, end in ends.items()}
            else:
                line[name] = _finite(value)
        lines.append(line)
    for name, methods in fronts.fronts(found).items():
        for line in lines:
            line[f"on_front_of_{name}"] = line["method"] in methods
    names = dict.fromkeys(name for line in lines for name in line)
    table = {name: [line.get(name) for line in lines] for name in names}
    return {
        name: values
        for name, values in table.items()
        if any(value is not None for value in values)
    }


def _finite(value: Any) -> Any:
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value


def budget(spec: str) -> int | None:
    """The budget of a spec, the innermost method's if several have one."""
    for part in reversed(specs.parts(spec)):
        for option in specs.split(part)[1]:
            key, _, value = option.partition("=")
            if key.strip() == "budget" and value.strip().isdigit():
                return int(value)
    return None
