"""A method's factory in its own words: its signature and docstring, taken apart.

The docstring's sections are those every factory has (`Reads per step and layer`, `Exact
when`, `Source`, `Deviations`), so that no list of methods is kept by hand.
"""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from kvjax import registry
from kvjax.registry import citations, specs
from kvjax.version import __version__


class Description(NamedTuple):
    """A factory in words."""

    name: str
    summary: str
    options: dict[str, Any]  # keyword-only arguments and their defaults
    reads: str  # per decode step and layer
    exact_when: str
    source: str
    deviations: str


def describe(factory: Callable, name: str | None = None) -> Description:
    """Reads signature and docstring of a method's factory, or of a transform.

    Args:
        name: what it is called by; its own if left out.
    """
    lines = (inspect.getdoc(factory) or "").splitlines() or [""]
    parameters = inspect.signature(factory).parameters.values()
    return Description(
        name=factory.__name__ if name is None else name,
        summary=lines[0],
        options={p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
        reads=_section(lines, "Reads per step and layer:"),
        exact_when=_section(lines, "Exact when:"),
        source=_section(lines, "Source:"),
        deviations=_section(lines, "Deviations:"),
    )


def described(*methods: str) -> list[Description]:
    """Returns what the factories in specs say of themselves, each once.

    Options of a configured method do not matter: `quest:budget=64` is `quest`.

    Raises:
        TypeError: if one is no text.
        ValueError: if a name is unknown.
    """
    for spec in methods:
        if not isinstance(spec, str):
            raise TypeError(f"{spec!r} must be text such as 'quest:budget=128'.")
    names = dict.fromkeys(name for spec in methods for name in specs.names(spec))
    return [describe(registry.get(name), name) for name in names]


def cite(*methods: str) -> str:
    """Returns BibTeX of the papers behind methods, and of kvjax.

    Comments before the entries say what each method is from, and where it deviates.

    Args:
        *methods: names, or specs such as `retro+quest:budget=64`; kvjax alone without.

    Raises:
        TypeError: if one is no text.
        ValueError: if a name is unknown.
    """
    about = described(*methods)
    comments = [
        _comment(text)
        for entry in about
        for text in (f"{entry.name}: {entry.source}", f"Deviations: {entry.deviations}")
    ]
    papers = (paper for entry in about for paper in citations.entries(entry.source))
    blocks = [*dict.fromkeys(papers), citations.software_entry(__version__)]
    return "\n".join([*comments, "\n" * bool(about) + "\n\n".join(blocks)])


def _comment(text: str) -> str:
    # BibTeX skips what is outside of entries, and takes an @ for the next one's start.
    return textwrap.fill(
        "% " + text.replace("@", " at "),
        79,
        subsequent_indent="% ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _section(lines: list[str], title: str) -> str:
    """Reads a docstring after `title`, up to the next line without indentation."""
    starts = [index for index, line in enumerate(lines) if line.startswith(title)]
    if not starts:
        return "not said"
    found = [lines[starts[0]].removeprefix(title)]
    for line in lines[starts[0] + 1 :]:
        if line and not line.startswith(" "):
            break
        found.append(line)
    return " ".join(" ".join(found).split())
