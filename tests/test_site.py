"""The site builds without a warning, from pages, docstrings and notebooks."""

import html
import pathlib
import re
import subprocess
import sys

import pytest
import typer

from kvjax import cli, registry

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("index", "comparisons", "tour", "your_own_method", "eight_billion")
PAGES += ("fidelity", "api", "notebooks/entmax", "tree")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E"]
    # Beside the pages nothing of the build: other workers read them.
    done = subprocess.run(
        [*command, "-d", out / "doctrees", ROOT / "docs", out / "html"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def words(site, page):
    text = (site / f"{page}.html").read_text("utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def test_every_page_is_there_and_says_something(site):
    for page in PAGES:
        assert len(words(site, page)) > 1000, page
    reference = words(site, "api")
    # A section that only our docstrings have; one of every docstring; a plain star.
    assert "Reads per step and layer: 2*NP*D*Hkv elements of summaries" in reference
    assert "Raises ValueError" in reference
    assert "kvjax.decoding.saved_prompt.restore" in (site / "api.html").read_text(
        "utf-8"
    )
    page = (site / "api.html").read_text("utf-8")
    for name in registry.every():
        assert f'id="kvjax.{name}"' in page, name
    assert "The certificate" in words(site, "notebooks/entmax")


def test_the_first_page_has_install_a_command_a_figure_and_a_result(site):
    first = words(site, "index")
    assert "pip install ." in first
    assert "kvjax compare" in first
    assert "`" not in first  # the README's table is a table here
    assert "budget=128 in all rows" in first  # of both models' tables
    page = (site / "index.html").read_text("utf-8")
    assert re.search(r'<img[^>]+src="_images/compare-smollm2\.png"', page)
    assert 'class="table-wrapper' in page
    assert "kvjax.css" in page


def test_every_command_has_a_page_that_says_what_its_help_says(site):
    commands = typer.main.get_command(cli.app).commands
    listed = words(site, "commands/index")
    for name, command in commands.items():
        assert f"kvjax {name}" in listed
        said = words(site, f"commands/{name}")
        assert " ".join(command.help.replace("`", "").split()) in said
        for parameter in command.params:
            assert " ".join(parameter.help.replace("`", "").split()) in said
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in said


def test_the_axes_are_a_list_as_it_stands(site):
    page = (site / "api.html").read_text("utf-8")
    (axes,) = re.findall(
        r"<pre>(?:<span></span>)?(B    sequences.*?)</pre>", page, re.DOTALL
    )
    lines = re.sub(r"<[^>]+>", "", axes).splitlines()
    assert lines[3].startswith("N    slots a method keeps")
