"""The public face: what `import kvjax` alone gives, and when it imports what."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest

import kvjax
import models
import pallas_kernels
from kvjax import decoding, registry
from kvjax.decoding import generate, scoring
from kvjax.registry import built_in

CALLED = ("load", "generate", "stream", "serve_rows", "score")
CALLED += ("parse", "register", "cite")
TYPES = ("CacheSpec", "DecoderLM", "Diagnostics", "LanguageModel", "Method", "Rope")
TYPES += ("Hooks", "Lists", "Rereading", "Traffic")
METHODS = [name for name, value in vars(built_in).items() if callable(value)]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_all_says_what_is_public():
    assert sorted([*CALLED, *TYPES, *METHODS, "testing"]) == kvjax.__all__
    for name in CALLED:
        assert callable(getattr(kvjax, name)), name
    for name in TYPES:
        assert inspect.isclass(getattr(kvjax, name)), name
    assert kvjax.generate is generate.generate
    assert kvjax.stream is generate.stream
    assert kvjax.score is scoring.score
    assert kvjax.load is models.load
    assert kvjax.parse is registry.parse
    assert kvjax.register is registry.register


def test_dir_shows_that_and_no_internals():
    assert decoding  # one that is imported by now
    assert dir(kvjax) == sorted([*kvjax.__all__, "__version__"])


def test_star_imports_all():
    code = "from kvjax import *; print(sorted(n for n in dir() if n[0] != '_'))"
    assert run(code) == str(kvjax.__all__)


def test_methods_are_functions_and_their_modules_modules():
    assert kvjax.quest is registry.get("quest")
    assert inspect.ismodule(importlib.import_module("kvjax.methods").quest)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'kvjax' has no attribute 'qest'"):
        _ = kvjax.qest
    assert not hasattr(kvjax, "_nothing")


def test_nothing_heavy_is_imported_before_a_model_is_loaded():
    code = """
import sys, kvjax
def heavy():
    return [m for m in ("flax", "models", "tokenizers", "typer") if m in sys.modules]
print("jax" in sys.modules, heavy())
kvjax.__all__, dir(kvjax), kvjax.quest(budget=64), kvjax.cite("quest")
kvjax.generate, kvjax.stream, kvjax.score, kvjax.register, kvjax.testing
print(heavy())
kvjax.load
print("models" in sys.modules)
"""
    assert run(code).splitlines() == ["False []", "[]", "True"]


def test_cite_gives_entries_of_papers_and_of_kvjax():
    text = kvjax.cite("retro+quest:budget=64", "quest")
    assert text.count("@misc{") == 2
    assert text.count("% Deviations: ") == 2
    assert "@misc{tang2024quest," in text
    assert text.endswith(kvjax.cite())
    assert kvjax.cite().startswith("@software{kvjax2026,")
    with pytest.raises(ValueError, match="did you mean 'quest'"):
        kvjax.cite("qest")


def modules_of(package: types.ModuleType):
    """Names of the package's modules, and of those of its packages, with their parent.

    Packages are imported; some modules need what is not installed.
    """
    for info in pkgutil.iter_modules(package.__path__):
        yield package, info.name
        if info.ispkg:
            inner = importlib.import_module(f"{package.__name__}.{info.name}")
            yield from modules_of(inner)


@pytest.mark.parametrize("package", [kvjax, models, pallas_kernels])
def test_no_module_is_hidden_by_a_function_of_its_name(package):
    names = list(modules_of(package))
    assert len(names) > 10
    for parent, name in names:
        found = vars(parent).get(name)
        assert found is None or inspect.ismodule(found), f"{parent.__name__}.{name}"
