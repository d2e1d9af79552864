"""What a method's factory says of itself: its signature and docstring, taken apart.

The docstring's sections are those every factory has (`Reads per step and layer`, `Exact
when`, `Source`, `Deviations`), so that no list of methods is kept by hand.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple


class Description(NamedTuple):
    """A factory in words."""

    name: str
    summary: str
    options: dict[str, Any]  # keyword-only arguments and their defaults
    reads: str  # per decode step and layer
    exact_when: str
    source: str
    deviations: str


def describe(factory: Callable) -> Description:
    """Reads signature and docstring of a method's factory, or of a transform."""
    lines = (inspect.getdoc(factory) or "").splitlines() or [""]
    parameters = inspect.signature(factory).parameters.values()
    return Description(
        name=factory.__name__,
        summary=lines[0],
        options={p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
        reads=_section(lines, "Reads per step and layer:"),
        exact_when=_section(lines, "Exact when:"),
        source=_section(lines, "Source:"),
        deviations=_section(lines, "Deviations:"),
    )


def _section(lines: list[str], title: str) -> str:
    """What a docstring says after `title`, up to the next line without indentation."""
    starts = [index for index, line in enumerate(lines) if line.startswith(title)]
    if not starts:
        return "not said"
    found = [lines[starts[0]].removeprefix(title)]
    for line in lines[starts[0] + 1 :]:
        if line and not line.startswith(" "):
            break
        found.append(line)
    return " ".join(" ".join(found).split())
