"""The fidelity cards name what exists, for every method, and its deviations.

`python tests/test_fidelity_cards.py` writes the generated parts anew, and a card that
is missing but for its rows.
"""

import ast
import functools
import pathlib
import re

import pytest

from kvjax import registry
from kvjax.registry.describe import describe

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/fidelity.md"
NAMES = registry.every()
# What a new card begins with.
HEADINGS = "| what the paper says | where | tested by |\n|---|---|---|\n"


def about(name: str) -> str:
    told = describe(registry.get(name))
    return "\n\n".join(
        [
            told.summary,
            f"**Source:** {told.source}",
            f"**Exact when:** {told.exact_when}",
            f"**Deviations:** {told.deviations}",
        ]
    )


def between(text: str, name: str) -> re.Match:
    pattern = f"<!-- about {name} -->\n(.*?)<!-- /about {name} -->"
    return re.search(pattern, text, re.DOTALL)


@functools.cache
def cards() -> dict[str, list[list[str]]]:
    """The rows of each card's table."""
    _, *sections = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    found = {}
    for section in sections:
        name, _, body = section.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("| ")][1:]
        found[name] = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows
        ]
    return found


def with_cards() -> list[str]:
    """The methods whose cards are written: the other pages are about them."""
    return [name for name in NAMES if cards().get(name)]


@functools.cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_every_method_has_a_card_and_no_other():
    """The one thing about a method that nothing else can say."""
    missing = [name for name in NAMES if name not in with_cards()]
    assert not missing, (
        f"docs/fidelity.md has no card of {', '.join(missing)}. "
        "`python tests/test_fidelity_cards.py` writes it but for its rows; add one for "
        "each thing that the paper says: | what | `kvjax/methods/FILE.py:function` | "
        "`tests/methods/FILE.py:test_function` |. Then `python tests/test_readme.py` "
        "puts the method on the other pages."
    )
    assert sorted(cards()) == sorted(NAMES)


@pytest.mark.parametrize("name", with_cards())
def test_a_card_names_what_exists(name):
    for said, where, test in cards()[name]:
        assert said
        for cell, folder in ((where, ("kvjax/", "pallas_kernels/")), (test, "tests/")):
            path, function = re.fullmatch(r"`([\w/]+\.py):(\w+)`", cell).groups()
            assert path.startswith(folder), cell
            assert function in functions(path), f"{cell}: no such function"
        assert test.partition(":")[2].startswith("test_")


@pytest.mark.parametrize("name", with_cards())
def test_a_card_says_what_the_docstring_says(name):
    found = between(PAGE.read_text("utf-8"), name)[1].strip()
    assert found == about(name), "run: python tests/test_fidelity_cards.py"


@pytest.mark.parametrize("name", NAMES)
def test_official_code_is_named_with_its_commit(name):
    source = describe(registry.get(name)).source
    _, is_there, after = source.partition("Official code: ")
    if is_there:
        assert re.match(r"[\w-]+/[\w-]+@[0-9a-f]{7}\b", after), source


def test_cards_say_what_else_the_official_code_does():
    told = {name: describe(registry.get(name)) for name in ("cascade", "entmaxkv")}
    for said in ("eager path", "original positions", "acceptance by powers of 3"):
        assert said in told["cascade"].deviations
    assert "8a33875, the third generation" in told["entmaxkv"].source
    assert "`fixed` and `corrected` are those of 8a33875" in (
        told["entmaxkv"].deviations
    )


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    for name in NAMES:
        if name not in cards():
            text += f"\n## {name}\n\n<!-- about {name} -->\n<!-- /about {name} -->\n\n"
            text += HEADINGS
        start, end = between(text, name).span(1)
        text = text[:start] + about(name) + "\n" + text[end:]
    PAGE.write_text(text, "utf-8")
