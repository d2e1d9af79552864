"""The site builds without a warning, from pages, docstrings and notebooks."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("index", "eight_billion", "fidelity", "api", "notebooks/entmax")


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
    return " ".join(re.sub(r"<[^>]+>", "", text).split())


def test_every_page_is_there_and_says_something(site):
    for page in PAGES:
        assert len(words(site, page)) > 1000, page
    reference = words(site, "api")
    # A section that only our docstrings have; one of every docstring; a plain star.
    assert "Reads per step and layer: 2*NP*D*Hkv elements of summaries" in reference
    assert "Raises ValueError" in reference
    assert "kvjax.prefix.restore" in (site / "api.html").read_text("utf-8")
    assert "The certificate" in words(site, "notebooks/entmax")
