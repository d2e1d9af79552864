"""How docstrings begin: with a verb that has a subject, or with a noun."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("kvjax", "models", "pallas_kernels")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))

# A reader without the code at hand cannot know whose: "Of the newest tokens".
FORBIDDEN = {"Of", "As", "What", "Which", "Whether", "How", "Where", "Why"}


def _first_words(source: str) -> dict[int, str]:
    """First words of all docstrings, by the line of what they are of."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    words = {}
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
        if docstring:
            words[getattr(node, "lineno", 1)] = docstring.split()[0].rstrip(",:;.")
    return words


@pytest.mark.parametrize("path", FILES, ids=lambda x: str(x.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    words = _first_words(path.read_text())
    wrong = {line: word for line, word in words.items() if word in FORBIDDEN}
    assert not wrong, f"{path}: say who does it, or what it is"


def test_every_docstring_is_seen():
    source = '''"""What."""
class A:
    """Of B."""
    def f(self):
        """Returns."""
        def g():
            """Whether, or not."""
'''
    assert list(_first_words(source).values()) == ["What", "Of", "Returns", "Whether"]
