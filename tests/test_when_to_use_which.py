"""The page that says when to use which: each figure stands on the page it names."""

import pathlib
import re

import pytest

from kvjax import registry

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "when_to_use_which.md").read_text("utf-8")
LINES = re.findall(r"^- .*?(?=^- |^\n|\Z)", PAGE, re.DOTALL | re.MULTILINE)
NUMBER = r"(?<![\w.,])-?\.?\d[\d,.e-]*\d|(?<![\w.,])-?\d(?![\w])"


def numbers(text: str) -> set[str]:
    """Numbers of a text, those in code and in addresses left out."""
    without = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    return set(re.findall(NUMBER, without))


def linked(line: str) -> str:
    (address,) = re.findall(r"\]\(([^)#]*)", line)
    return (DOCS / address).read_text("utf-8")


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[2:24])
def test_figures_stand_where_they_are_said_to(line):
    assert numbers(line)
    assert numbers(line) <= numbers(linked(line))


def test_every_method_is_named():
    assert len(LINES) > 15
    missing = [name for name in registry.every() if not re.search(rf"\b{name}\b", PAGE)]
    assert set(missing) <= {"entmax_full"}


def test_a_figure_that_is_not_there_is_seen():
    line = "- `h2o:budget=5` is 0.1234 of 3 [0.1, -2] there. [Notes](../NOTES.md)"
    assert numbers(line) == {"0.1234", "3", "0.1", "-2"}
    assert "0.1234" not in numbers(linked(line))
