"""The site: `sphinx-build -W docs docs/_build` (needs `pip install '.[docs]'`).

Docstrings are plain text with backticks and a few sections; what reStructuredText would
read as markup of its own is escaped, and the sections of methods become paragraphs.
"""

import collections
import pathlib
import re
import shutil
import sys

import kvjax

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import command_pages  # noqa: E402  beside this file

from kvjax import registry  # noqa: E402

project = "kvjax"
copyright = "the kvjax authors"
release = version = kvjax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "kvjax"
html_static_path = ["_static"]
html_css_files = ["kvjax.css"]

nb_execution_mode = "off"  # the tests run them
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"
highlight_language = "none"  # lists of axes are no Python
smartquotes = False  # per="kv" is code even where nothing says so
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["lm_eval"]  # of an extra that nobody needs to read of it
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Files of the repository that are no page here.
suppress_warnings = ["myst.xref_missing"]

# Sphinx reads what lies below this folder only.
_notebooks = HERE / "notebooks"
shutil.rmtree(_notebooks, ignore_errors=True)
_notebooks.mkdir()
for _notebook in sorted((HERE.parent / "colab").glob("*.ipynb")):
    shutil.copy(_notebook, _notebooks)

_commands = HERE / "commands"
shutil.rmtree(_commands, ignore_errors=True)
_commands.mkdir()
command_pages.write(_commands)
# Of the reference: every method, from the registry.
(_commands / "methods.txt").write_text(
    "".join(f".. autofunction:: kvjax.{name}\n" for name in registry.every()), "utf-8"
)

_SECTION = re.compile(
    r"^(State|Reads per step and layer|Exact when|Source|Deviations|Shapes|Fields): ?"
)


def _paragraphs(lines: list[str]) -> list[str]:
    """Sections that only our docstrings have, each as one paragraph."""
    out, index = [], 0
    while index < len(lines):
        found = _SECTION.match(lines[index])
        if found is None or lines[index + 1 : index + 2] == ["-" * len(found[0])]:
            out.append(lines[index])
            index += 1
            continue
        parts = [lines[index][found.end() :].strip()]
        index += 1
        while index < len(lines) and (not lines[index] or lines[index][0] == " "):
            parts.append(lines[index].strip())
            index += 1
        said = " ".join(part for part in parts if part)
        out += ["", f"**{found[1]}:** {said}", ""]
    return out


def _plain(line: str) -> str:
    """Escapes what is markup outside of backticks and roles."""
    pieces = re.split(r"(``.*?``|:\w+:`[^`]*`|`[^`]*`)", line)
    for index in range(0, len(pieces), 2):
        pieces[index] = re.sub(
            r"(?<!\*)\*(?!\*)|\||_(?=\W|$)|`", r"\\\g<0>", pieces[index]
        )
    return "".join(pieces)


def _before_napoleon(app, what, name, obj, options, lines):
    if what == "module":
        lines[:] = _lists(lines)
        return
    escaped = [_plain(line) for line in lines]
    lines[:] = _paragraphs(escaped)


def _lists(lines: list[str]) -> list[str]:
    """Indented lines of a module, such as its axes, as they stand; the rest escaped."""
    out, is_list = [], False
    for before, line in zip(["", *lines], lines, strict=False):
        is_indented = line.startswith("    ")
        if is_indented and not before and not is_list:
            out += ["::", ""]
            is_list = True
        elif line and not is_indented:
            is_list = False
        out.append(line if is_list else _plain(line))
    return out


def _skip(app, what, name, obj, skip, options):
    # "Alias for field number 0" tells nobody anything.
    return True if isinstance(obj, collections._tuplegetter) else None


def setup(app):
    """What Sphinx calls with its application."""
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-skip-member", _skip)
