"""Who may import whom, how long a file may be, and how errors are raised."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("kvjax", "models", "pallas_kernels")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
LONGEST_FILE = 500

SHARED = {
    f"kvjax.{name}"
    for name in (
        *("cache", "partials", "selection", "paging", "accounting"),
        *("dense", "support", "thresholds", "reading"),
    )
}
SHARED |= {"kvjax.cascading", "kvjax.rings", "kvjax.refreshing", "kvjax.retrospection"}
SHARED |= {
    f"kvjax.{name}"
    for name in (
        *("completion", "estimators", "feature_maps", "map_files", "stores"),
        "summarising",
    )
}
BASE = {"kvjax.interface", "kvjax.rope", "kvjax.files"}
BASE |= {"kvjax.text_stream", "kvjax.text_tokens"}  # text, for models and their users
# Of the scripts that say how the embedded models were made, not of the models.
MAKES_EMBEDDED = {"kvjax.words", "kvjax.training.data.text"}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports_of(path: pathlib.Path, known=MODULES) -> set[str]:
    """Our modules that the file names in an import, wherever in the file it is."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{path}: relative import; write it absolutely.")
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return {name for name in found if name.split(".")[0] in PACKAGES}


def is_allowed(module: str, imported: str) -> bool:
    """The table of DESIGN section 3."""
    package = imported.split(".")[0]
    if module == "kvjax.__main__" or module.startswith("kvjax.cli"):
        return True  # the composition root
    if module.startswith("pallas_kernels"):
        return package == "pallas_kernels"
    if module.startswith("models.embedded.") and imported in MAKES_EMBEDDED:
        return True
    if module.split(".")[0] == "models":
        return package == "models" or imported in BASE
    if module in BASE:
        return False
    if module in SHARED:
        return imported in BASE | SHARED or package == "pallas_kernels"
    if module == "kvjax":
        return imported in BASE | {"kvjax.methods", "kvjax.registry"}
    if module == "kvjax.methods":
        return imported.startswith("kvjax.methods.")
    if module.startswith("kvjax.methods."):
        return imported in BASE | SHARED or package == "pallas_kernels"
    if module == "kvjax.named":  # what a user calls a method
        return imported in BASE | {"kvjax.registry"}
    if module == "kvjax.registry":
        return imported in BASE | {"kvjax.methods", "kvjax.partials"}
    uses_kernels = module in ("kvjax.training.attention", "kvjax.bench")
    if uses_kernels and package == "pallas_kernels":
        return True
    if module == "kvjax.evaluation.heads" and imported == "pallas_kernels.entmax":
        return True
    # Everything else takes methods and models as arguments.
    is_library = package == "kvjax" and imported != "kvjax"
    roots = ("kvjax.methods", "kvjax.registry", "kvjax.cli")
    return is_library and not imported.startswith(roots)


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module):
    wrong = {i for i in imports_of(MODULES[module]) if not is_allowed(module, i)}
    assert not wrong, f"{module} must not import {', '.join(sorted(wrong))}"


def test_imports_have_no_cycle():
    graph = {name: imports_of(path) - {name} for name, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises on a cycle
    assert set(order) >= set(MODULES)


def test_the_table_forbids_what_it_should(tmp_path):
    """The test above can fail: each line is a violation."""
    for module, imported in [
        ("kvjax.methods.h2o", "kvjax.methods.tova"),
        ("kvjax.methods.h2o", "kvjax.registry"),
        ("kvjax.generate", "kvjax.methods"),
        ("kvjax.generate", "models.llama"),
        ("kvjax.evaluation.fidelity", "kvjax.methods.full"),
        ("kvjax.cache", "kvjax.generate"),
        ("kvjax.rope", "kvjax.interface"),
        ("models.llama.model", "kvjax.cache"),
        ("models.llama.model", "kvjax"),
        ("pallas_kernels.page_scores", "kvjax.interface"),
        ("kvjax.sampling", "kvjax"),
        ("kvjax.training.loop", "models"),
        ("kvjax.training.loop", "kvjax.cli.common"),
        ("kvjax.report", "kvjax.cli"),
    ]:
        assert not is_allowed(module, imported), (module, imported)
    source = "def f():\n    from kvjax import cache\n    import kvjax.methods.full\n"
    (tmp_path / "late.py").write_text(source)
    found = imports_of(tmp_path / "late.py")
    assert found == {"kvjax.cache", "kvjax.methods.full"}


def test_importing_kvjax_needs_jax_and_numpy_only():
    heavy = [
        "flax",
        "models",
        "typer",
        "rich",
        "jinja2",
        "matplotlib",
        "torch",
        "transformers",
        "optax",
        "orbax",
        "grain",
        "pydantic",
        "yaml",
        "safetensors",
        "tokenizers",
        "gguf",
        "huggingface_hub",
        "kvjax.cli",
    ]
    code = f"import sys, kvjax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short_and_errors_are_exceptions(module):
    source = MODULES[module].read_text()
    assert len(source.splitlines()) < LONGEST_FILE
    tree = ast.parse(source)
    asserts = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not asserts, f"assert in library code, lines {asserts}: raise ValueError"
    assert ast.get_docstring(tree), "the module says in two sentences what is here"
