"""Functions of methods are annotated, so that the checker of shapes sees them all.

`conftest.py` has every annotation of `kvjax` checked at every call of every test.
"""

import ast
import functools
import inspect
import pathlib
import textwrap

import pytest

from kvjax import built_in, registry

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ("methods", "stores", "attention", "dense.py")


def missing(source: str) -> list[str]:
    """Functions in the source, nested ones too, that leave something unsaid."""
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        arguments += [a for a in (given.vararg, given.kwarg) if a is not None]
        unsaid = [
            a.arg
            for a in arguments
            if a.annotation is None and a.arg not in ("self", "cls")
        ]
        if node.returns is None:
            unsaid.append("return")
        if unsaid:
            found.append(f"{node.name}: {', '.join(unsaid)}")
    return found


@pytest.mark.parametrize("name", [*registry.names(), *registry.transforms()])
def test_every_function_of_a_method_is_annotated(name):
    needed = {"method": built_in.quest(), "dense": built_in.full()}
    factory = registry.get(name)
    parameters = inspect.signature(factory).parameters
    method = factory(*(needed[p] for p in parameters if p in needed))
    functions = [value for value in method if callable(value)]
    assert len(functions) >= 6
    for function in functions:
        while isinstance(function, functools.partial):
            function = function.func
        source = inspect.getsource(inspect.unwrap(function))
        assert not missing(source), f"{name}: {function.__qualname__}"


def test_so_is_every_function_they_are_made_of():
    files = []
    for room in ROOMS:
        path = ROOT / "kvjax" / room
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert len(files) > 30
    unsaid = {str(f.relative_to(ROOT)): missing(f.read_text()) for f in files}
    assert not {file: found for file, found in unsaid.items() if found}


def test_what_is_missing_is_found():
    source = """
        def outer(x: int) -> int:
            def inner(y, *z: int):
                return y
            return inner(x)
    """
    assert missing(source) == ["inner: y, return"]
