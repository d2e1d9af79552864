"""The notebooks are those of their sources, and every cell of them runs."""

import importlib.util
import json
import os
import pathlib
import re

import compiling
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("build", ROOT / "colab/build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)

NAMES = ("entmax", "quickstart", "refreshkv_training", "tpu_decode")
NAMES += ("write_your_own_method",)
# What a run must have said, so that a cell that silently does less shows.
SAYS = {
    "entmax": r"certified=true +\d+ +\d\.\de-\d\d +100%",
    "quickstart": r"the same 64 tokens",
    "refreshkv_training": r"(?s)loss: (\d\.\d+ ?){4}.*model +perplexity \d",
    "tpu_decode": r"quest:budget=64 +\d+\.\d +\d+\.\d",
    "write_your_own_method": r"(?s)caught: row.*landmarks +256 KiB +\d+%",
}


def test_there_is_a_notebook_of_every_source():
    assert tuple(path.stem for path in build.sources()) == NAMES
    found = sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb"))
    assert tuple(found) == NAMES == tuple(SAYS)


def code_of(notebook):
    return [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_that_of_its_source(name):
    path = ROOT / f"colab/{name}.ipynb"
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    made = build.make(path.with_suffix(".py"))
    assert code_of(kept) == code_of(made), f"run: python colab/build.py {name}"
    assert kept.metadata == made.metadata
    assert "Open in Colab" in kept.cells[0].source
    for cell in kept.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            assert str(ROOT) not in json.dumps(output)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    """By a kernel of this Python, compiling as these tests do."""
    notebook = build.make(ROOT / f"colab/{name}.py")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": " ".join(compiling.FLAGS),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "TMPDIR": str(tmp_path),
    }
    build.execute(notebook, env=env)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    said = "".join(out.get("text", "") for out in outputs)
    assert "NO ACCELERATOR" in said
    assert re.search(SAYS[name], said), said
    if name in ("quickstart", "entmax"):
        assert any("image/png" in out.get("data", {}) for out in outputs)


def test_the_badge_goes_to_the_repository(monkeypatch):
    source = ROOT / "colab/quickstart.py"
    address = "https://github.com/someone/kvjax"
    monkeypatch.setattr(build, "repository", lambda: address)
    title, setup, *_ = build.make(source).cells
    colab = "https://colab.research.google.com/github/someone/kvjax/blob/main/colab/"
    assert f"]({colab}quickstart.ipynb)" in title.source
    assert f'REPOSITORY = "{address}"' in setup.source
    monkeypatch.setattr(build, "repository", lambda: "")
    assert "](quickstart.ipynb)" in build.make(source).cells[0].source
