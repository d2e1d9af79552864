"""Tables in a terminal, as wide as it is: names and numbers stay whole at any width.

Where the columns do not fit beside each other, the table comes in parts, each with the
names. Specs of methods break behind `:`, `,` and `+` alone, and an option that all rows
have in common is said once, above.
"""

import os
import re
import textwrap
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kvjax.registry import specs as method_specs

PROSE_WIDTH = 100
FILE_WIDTH = 150  # of what is no terminal and says no COLUMNS
MOST_EXCEPTIONS = 3  # rows without an option that is still said above


def width() -> int:
    """Returns the columns of the terminal, of `COLUMNS`, or of a file."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    console = Console()
    return console.width if console.is_terminal else FILE_WIDTH


def show(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    columns: int | None = None,
) -> None:
    """Prints a table on stdout; the first column is names, the others numbers.

    Args:
        headings: of the columns; they break at spaces.
        rows: cells, in the order of the headings.
        columns: of the terminal; :func:`width` if left out.
    """
    columns = width() if columns is None else columns
    for index, table in enumerate(_parts(headings, rows, columns)):
        if index:
            print()
        # No wider than it must be, but never cut.
        console = _console(max(columns, _natural(table)))
        console.print(table)


def say(text: str, *, columns: int | None = None, later: str = "") -> None:
    """Prints a paragraph on stdout, broken between words, in lines that can be read."""
    columns = min(width(), PROSE_WIDTH) if columns is None else columns
    print(wrapped(text, columns, later=later))


def wrapped(text: str, columns: int, *, later: str = "") -> str:
    """Returns the text in lines of at most so many columns, words whole.

    Args:
        later: what lines after the first begin with.
    """
    return textwrap.fill(
        text,
        columns,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fold(name: str, columns: int) -> str:
    """Returns a spec in lines, which end behind `:`, `,` or `+` where they must."""
    lines = [""]
    for piece in pieces(name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > columns:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return "\n".join(line.rstrip() for line in lines)


def shared_options(specs: Sequence[str]) -> tuple[list[str], str]:
    """Takes options that all specs share out of them, but for a few that lack them.

    Returns:
        The specs without them, and a sentence that says what was taken out of which;
        the specs as they are and "" where there is no such option.
    """
    specs, said = list(specs), []
    for option in dict.fromkeys(_options(specs)):
        shorter = _without(specs, option)
        if shorter is not None:
            lacking = [s for s, new in zip(specs, shorter, strict=True) if s == new]
            but = f" but {', '.join(lacking)}" if lacking else ""
            said.append(f"{option} in all rows{but}.")
            specs = shorter
    return specs, " ".join(said)


def without_value(spec: str, key: str) -> str:
    """Returns the spec without an option, whatever its value."""
    parts = []
    for part in spec.split("+"):
        matching = [o for o in _options([part]) if o.partition("=")[0].strip() == key]
        for option in matching:
            part = _strip(part, option)
        parts.append(part)
    return "+".join(parts)


def _options(specs: Iterable[str]) -> list[str]:
    parts = [part for spec in specs for part in method_specs.parts(spec)]
    return [option for part in parts for option in method_specs.split(part)[1]]


def _without(specs: list[str], option: str) -> list[str] | None:
    """The specs without an option; None unless nearly all have it, and have it once."""
    counts = [_options([spec]).count(option) for spec in specs]
    lacking = [spec for spec, count in zip(specs, counts, strict=True) if not count]
    holding = len(specs) - len(lacking)
    key = option.partition("=")[0]
    has_others = any(o.partition("=")[0] == key for o in _options(lacking))
    if max(counts) > 1 or has_others or holding < 2:
        return None
    if len(lacking) > min(MOST_EXCEPTIONS, holding):
        return None
    shorter = ["+".join(_strip(p, option) for p in s.split("+")) for s in specs]
    return shorter if len(set(shorter)) == len(set(specs)) else None


def _strip(part: str, option: str) -> str:
    name, options = method_specs.split(part)
    return method_specs.join(name, [o for o in options if o != option])


def pieces(name: str) -> list[str]:
    """Returns a spec cut where it may break: behind `:`, `,` and `+`."""
    return re.split(r"(?<=[:,+])(?!$)", name)


def _longest_piece(names: Iterable[str]) -> int:
    return max(len(piece.strip()) for name in names for piece in pieces(name))


def _parts(headings, rows, columns: int) -> list[Table]:
    """One table if all columns fit, with headings and names folded where that helps."""
    names = [row[0] for row in rows]
    every = list(range(1, len(headings)))
    longest = max([len(name) for name in [*names, headings[0]]])
    narrowest = max(_longest_piece(names), len(headings[0])) if names else longest
    whole = _table(headings, rows, every, longest, fold_headings=False)
    if _natural(whole) <= columns:
        return [whole]
    spare = columns - _natural(_table(headings, rows, every, narrowest))
    if spare >= 0:
        return [_table(headings, rows, every, min(longest, narrowest + spare))]
    limit = min(longest, max(narrowest, columns // 3))
    # What tells rows of one name apart, such as a budget, is in every part.
    key = every[:1] if len(set(names)) < len(names) else []
    parts, chosen = [], key
    for column in every[len(key) :]:
        wider = _table(headings, rows, [*chosen, column], limit)
        if chosen != key and _natural(wider) > columns:
            parts.append(_table(headings, rows, chosen, limit))
            chosen = key
        chosen = [*chosen, column]
    return [*parts, _table(headings, rows, chosen, limit)]


def _table(
    headings, rows, chosen: Sequence[int], limit: int, *, fold_headings: bool = True
) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(headings[0], no_wrap=True)
    for column in chosen:
        widest = max((len(row[column]) for row in rows), default=0)
        heading = headings[column]
        if fold_headings:
            heading = _heading(heading, widest)
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(fold(row[0], limit), *(row[column] for column in chosen))
    return table


def _heading(text: str, columns: int) -> str:
    """A heading in lines, no wider than its cells where words allow."""
    lines = []
    for line in text.split("\n"):
        columns_of_line = max([columns, *map(len, line.split())])
        lines += wrapped(line, columns_of_line).split("\n")
    return "\n".join(lines)


def _console(columns: int) -> Console:
    # Brackets are intervals here, not markup, and colons are of specs.
    return Console(width=columns, markup=False, emoji=False, highlight=False)


def _natural(table: Table) -> int:
    wide = _console(10_000)
    return wide.measure(table).maximum
