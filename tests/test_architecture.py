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

# Who may import whom, by folder: a room imports rooms of lower floors, and itself. A
# new file in a room of this table needs no line here. A file right under kvjax is a
# room.
FLOORS = (
    ("pallas_kernels", "version", "naming", "hooks", "copies"),
    ("cache_spec",),
    ("interface", "rope", "files", "text", "interrupts"),
    ("attention", "parallel"),
    ("stores",),
    ("accounting", "dense"),
    ("methods",),  # each a room of its own
    ("registry",),
    ("decoding",),
    ("cost", "evaluation", "lm_eval"),
    ("training",),
    ("report",),
    ("models",),
    ("cli", "testing"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = {("evaluation", "cost")}  # on one floor
KERNELS = ("attention", "stores", "dense", "methods", "cost")
# Who alone knows the methods: others take one as an argument.
METHODS = ("kvjax.methods", "kvjax.registry.built_in")
KNOWS_METHODS = ("registry", "cli", "testing")
# Models know kvjax by what every model needs, and are known to the top alone.
OF_MODELS = ("interface", "parallel", "rope", "copies", "files", "text")
WRITTEN = {
    # What is measured, trained or claimed of one method, by its own parts.
    ("kvjax.cost.bench_kernels", "kvjax.methods.entmaxkv"),
    ("kvjax.evaluation.claims.papers", "kvjax.methods"),
    ("kvjax.evaluation.claims.measure.layers", "kvjax.methods.entmaxkv"),
    ("kvjax.training.feature_maps", "kvjax.methods.topk_completion"),
    ("kvjax.training.refreshkv", "kvjax.methods.refreshkv"),
    # The normaliser that weights are trained and looked at under.
    ("kvjax.training.attention", "pallas_kernels"),
    ("kvjax.evaluation.heads", "pallas_kernels.entmax"),
    # The scripts that say how the embedded models were made.
    ("models.embedded", "kvjax.evaluation.tasks.words"),
    ("models.embedded", "kvjax.training.data.text"),
}


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


def room_of(module: str) -> str:
    """The room's name in `FLOORS`; `kvjax` itself is on none."""
    package, *inside = module.split(".")
    return inside[0] if package == "kvjax" and inside else package


def method_of(module: str) -> str | None:
    """The method whose file or folder holds the module."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["kvjax", "methods"] and len(parts) > 2 else None


def is_inside(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def is_allowed(module: str, imported: str) -> bool:
    if module in ("kvjax", "kvjax.__main__"):
        return True  # the public face, which imports late, and the way in
    if any(is_inside(module, a) and is_inside(imported, b) for a, b in WRITTEN):
        return True
    here, there = room_of(module), room_of(imported)
    if imported == "kvjax":
        return here == "cli"
    if here == "methods" == there:
        return method_of(module) == method_of(imported)
    if here == there:
        return True
    if here == "models":
        return there in OF_MODELS
    if here not in KNOWS_METHODS and any(is_inside(imported, m) for m in METHODS):
        return False
    if there == "pallas_kernels" and here not in KERNELS:
        return False
    return FLOOR[there] < FLOOR[here] or (here, there) in BESIDE


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in MODULES} - {"kvjax", "__main__"}
    assert rooms <= set(FLOOR), "name the room in FLOORS, or put the file in one"


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
        ("kvjax.methods.quest", "kvjax.methods.retro.history"),
        ("kvjax.methods.h2o", "kvjax.registry"),
        ("kvjax.methods.h2o", "kvjax.decoding.sampling"),
        ("kvjax.decoding.generate", "kvjax.methods"),
        ("kvjax.decoding.generate", "kvjax.registry.built_in"),
        ("kvjax.decoding.generate", "models.llama"),
        ("kvjax.decoding.saved_prompt", "kvjax.training.checkpoint"),
        ("kvjax.decoding.generate", "pallas_kernels.topk"),
        ("kvjax.evaluation.fidelity", "kvjax.methods.full"),
        ("kvjax.evaluation.compare", "kvjax.report.documents"),
        ("kvjax.evaluation.compare", "kvjax.training.loop"),
        ("kvjax.stores.buffers", "kvjax.decoding.generate"),
        ("kvjax.stores.paged", "kvjax.methods.entmaxkv.page_bounds"),
        ("kvjax.attention.selection", "kvjax.stores.buffers"),
        ("kvjax.rope", "kvjax.stores.buffers"),
        ("kvjax.cost.planning", "kvjax.evaluation.memory"),
        ("models.llama.model", "kvjax.stores.buffers"),
        ("models.llama.model", "kvjax"),
        ("pallas_kernels.page_scores", "kvjax.interface"),
        ("kvjax.decoding.sampling", "kvjax"),
        ("kvjax.training.loop", "models"),
        ("kvjax.training.loop", "kvjax.cli.options"),
        ("kvjax.training.loop", "kvjax.methods.refreshkv"),
        ("kvjax.report.documents", "kvjax.cli"),
        ("kvjax.lm_eval.requests", "kvjax.evaluation.statistics"),
        ("kvjax.lm_eval.model", "models"),
        ("kvjax.evaluation.compare", "kvjax.lm_eval.requests"),
    ]:
        assert not is_allowed(module, imported), (module, imported)
    source = "def f():\n    from kvjax import dense\n    import kvjax.methods.full\n"
    (tmp_path / "late.py").write_text(source)
    found = imports_of(tmp_path / "late.py")
    assert found == {"kvjax.dense", "kvjax.methods.full"}


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
        "lm_eval",
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


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short_and_errors_are_exceptions(module):
    source = MODULES[module].read_text()
    assert len(source.splitlines()) < LONGEST_FILE
    tree = ast.parse(source)
    asserts = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not asserts, f"assert in library code, lines {asserts}: raise ValueError"
    assert ast.get_docstring(tree), "the module says in two sentences what is here"
