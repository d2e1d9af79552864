"""The notebooks are those of their sources, and every cell of them runs."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import types

import compiling
import matplotlib
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"colab/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("build")

NAMES = ("entmax", "quickstart", "refreshkv_training", "tpu_decode")
NAMES += ("write_your_own_method",)
# What a run must have said, so that a cell that silently does less shows.
SAYS = {
    "entmax": r"certified=true +\d+ +\d\.\de-\d\d +100%",
    "quickstart": r"the same 64 tokens",
    "refreshkv_training": r"(?s)loss: (\d\.\d+ ?){4}.*model +perplexity \d",
    "tpu_decode": r"quest:budget=64 +\d+\.\d +\d+\.\d +\d+%",
    "write_your_own_method": (
        r"(?s)keeps 2\d promises.*caught: wrong breaks 'is_full_attention_when_.*"
        r"row 0, step 0: attended .*landmarks:budget=64 +256 KiB +\d+%"
    ),
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


def test_what_is_trained_for_is_what_decodes():
    """The paper trains at a fixed stride with nothing evicted; decoding evicts."""
    source = (ROOT / "colab/refreshkv_training.py").read_text("utf-8")
    assert "schedule: fixed" in source
    assert "eviction: exact" in source
    assert re.search(r'kvjax\.refreshkv\([^)]*schedule="fixed"', source)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    """By a kernel of this Python, compiling as these tests do, and fetching nothing.

    So the models are small: of SmolLM2's 30 layers every program compiles for long.
    """
    notebook = build.make(ROOT / f"colab/{name}.py")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        **compiling.ENVIRONMENT,
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
        "PIP_NO_INDEX": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }
    build.execute(notebook, env=env)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    said = "".join(out.get("text", "") for out in outputs)
    assert "NO ACCELERATOR" in said
    assert re.search(SAYS[name], said), said
    falls_back = "Going on with embedded-softmax" in said
    assert falls_back == (name in ("quickstart", "tpu_decode"))
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


# --- the first cell


@pytest.fixture
def cell(monkeypatch):
    """The first cell's functions, on a machine without a GPU where pip only notes."""
    module = load("first_cell")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    module.calls = []
    monkeypatch.setattr(module, "pip", lambda *words: module.calls.append(words))
    return module


def lists_gpus(monkeypatch, cell, text, code=0):
    done = subprocess.CompletedProcess([], code, stdout=text)
    monkeypatch.setattr(cell.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(cell.subprocess, "run", lambda *_, **__: done)


def without(monkeypatch, cell, *missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        cell.importlib.util,
        "find_spec",
        lambda n: None if n in missing else find_spec(n),
    )


@pytest.mark.parametrize(
    ("listed", "flavour", "extra"),
    [
        ("7.5, 580.65.06\n", "cuda13", "kvjax[gguf,hub,train,cuda,triton] @ git+"),
        ("9.0, 580.65.06\n9.0, 580.65.06\n", "cuda13", "kvjax[gguf,hub,train,cuda] @"),
        ("7.5, 550.54.15\n", "cuda12", "kvjax[gguf,hub,train,triton] @ git+https://"),
    ],
)
def test_a_gpu_gets_its_plugin(monkeypatch, cell, listed, flavour, extra, tmp_path):
    lists_gpus(monkeypatch, cell, listed)
    assert cell.device(tmp_path) == flavour
    first, *others = cell.requirements(flavour, "git+https://h.org/kvjax")
    assert first.startswith(extra)
    assert others == (["jax[cuda12]"] if flavour == "cuda12" else [])


def test_a_driver_that_lists_nothing_is_no_gpu(monkeypatch, cell, tmp_path):
    lists_gpus(monkeypatch, cell, "NVIDIA-SMI has failed", code=9)
    assert cell.device(tmp_path) == ""
    (tmp_path / "nvidia0").touch()
    assert cell.device(tmp_path) == "cuda13"


@pytest.mark.parametrize("file", ["accel0", "vfio/0"])
def test_a_tpu_gets_its_plugin(cell, file, tmp_path):
    assert cell.device(tmp_path) == ""
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio/vfio").touch()  # the driver's own, on any machine
    assert cell.device(tmp_path) == ""
    (tmp_path / file).touch()
    assert cell.device(tmp_path) == "tpu"
    assert cell.requirements("tpu", "/a/b") == ["/a/b[gguf,hub,train,tpu]"]


def test_where_kvjax_comes_from(monkeypatch, cell, tmp_path):
    """A notebook in the repository, what the user says, the repository's address."""
    assert cell.source(ROOT) == str(ROOT)
    with pytest.raises(
        cell.SetupError, match="set KVJAX, at the top of this cell"
    ) as e:
        cell.source(tmp_path)
    assert e.value._render_traceback_() == [cell.HELP]
    cell.REPOSITORY = "https://h.org/kvjax"
    assert cell.source(tmp_path) == "git+https://h.org/kvjax"
    wheel = tmp_path / "kvjax-1-py3-none-any.whl"
    wheel.touch()
    for given, expected in {
        str(wheel): str(wheel),
        "git+ssh://h.org/x": "git+ssh://h.org/x",
        "https://h.org/kvjax-1-py3-none-any.whl": "https://h.org/kvjax-1-py3-none-any.whl",
    }.items():
        cell.KVJAX = given
        assert cell.source(ROOT) == expected
    cell.KVJAX = "kvjax.whl"
    with pytest.raises(cell.SetupError, match="is no file, no folder and no address"):
        cell.source(ROOT)


def test_what_is_installed_is_used(monkeypatch, cell):
    monkeypatch.setattr(cell, "is_installed", lambda: True)
    cell.install("cuda13")
    assert cell.calls == []
    without(monkeypatch, cell, "gguf")
    cell.install("cuda13")
    assert cell.calls.pop() == ("install", "-q", "kvjax[gguf,hub,train,cuda]")
    # A folder of that name can be imported, and is no kvjax.
    monkeypatch.setattr(cell, "is_installed", lambda: False)
    monkeypatch.setattr(cell, "source", lambda: "/here")
    monkeypatch.setattr(cell, "stale_plugins", lambda: ["jax-cuda12-plugin"])
    cell.install("cuda13")
    assert cell.calls == [
        ("install", "-q", "/here[gguf,hub,train,cuda]"),
        ("uninstall", "-q", "-y", "jax-cuda12-plugin"),
    ]


def test_plugins_of_another_release_are_stale(monkeypatch, cell):
    names = {
        "jaxlib": "0.11.0",
        "jax-cuda12-plugin": "0.7.2",
        "jax-cuda12-pjrt": "0.7.2",
    }
    names |= {"jax-cuda13-plugin": "0.11.0", "jax-cuda13-pjrt": "0.11.0"}
    installed = [types.SimpleNamespace(name=n, version=v) for n, v in names.items()]
    monkeypatch.setattr(cell.importlib.metadata, "distributions", lambda: installed)
    assert cell.stale_plugins() == ["jax-cuda12-plugin", "jax-cuda12-pjrt"]


def test_no_accelerator_is_not_one_that_is_not_used(monkeypatch, cell):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert cell.advice("", "cpu", "0.11.0").startswith("NO ACCELERATOR")
    words = cell.advice("cuda12", "cpu", "0.11.0")
    assert words.startswith("AN ACCELERATOR IS HERE")
    assert "pip install -U 'jax[cuda12]==0.11.0'" in words
    assert cell.advice("cuda12", "gpu", "0.11.0") == ""


def test_outside_the_repository_it_ends_without_a_traceback(tmp_path):
    """In a kernel that does not find kvjax: the three ways out, and nothing else."""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                "import importlib.metadata as m, os\n"
                "found = list(m.distributions())\n"
                "m.distributions = lambda: [d for d in found if d.name != 'kvjax']\n"
                f"os.chdir({str(tmp_path)!r})"
            ),
            nbformat.v4.new_code_cell(build.first_cell("")),
        ]
    )
    notebook.metadata.language_info = {"name": "python"}
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        build.execute(notebook)
    (error,) = [o for o in notebook.cells[1].outputs if o.output_type == "error"]
    assert error.traceback == [load("first_cell").HELP]
