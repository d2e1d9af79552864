"""Functions of methods are short, and annotated: the checker of shapes sees them all.

`conftest.py` has every annotation of `kvjax` checked at every call of every test.
"""

import ast
import functools
import inspect
import pathlib
import textwrap

import jax
import jaxtyping
import pytest

from kvjax import registry
from kvjax.attention import partials
from kvjax.interface import CacheSpec, Method
from kvjax.rope import Rope

NAMES = [*registry.names(), *registry.transforms()]
ROOT = pathlib.Path(__file__).parents[2]
LONGEST_FACTORY, LONGEST_FUNCTION = 60, 120  # lines of code
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


def made_by(name: str) -> Method:
    spec = registry.example(name) if registry.is_transform(name) else name
    return registry.parse(spec)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_checked_where_a_step_begins(name):
    """A query of one row, without the axis of rows, reaches no computation."""
    method = made_by(name)
    alpha = 1.0 if partials.suits(registry.get(name), 1.0) else 1.5
    sizes = (2, 4, 2, 8, 64, "float32", Rope(8))
    spec = CacheSpec(*sizes, layer=7, num_layers=8, alpha=alpha)
    state = jax.eval_shape(lambda: method.finish(method.init(spec)))
    q = jax.ShapeDtypeStruct((2, 4, 8), "float32")
    with pytest.raises(jaxtyping.TypeCheckError, match="inspect_step"):
        jax.eval_shape(method.inspect_step, state, q)


@pytest.mark.parametrize("name", NAMES)
def test_every_function_of_a_method_is_annotated(name):
    method = made_by(name)
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


def lines_of(node: ast.FunctionDef) -> int:
    """Lines of code, the signature and the docstring not counted."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return node.end_lineno - body[0].lineno + 1 if body else 0


def test_a_method_is_read_in_parts():
    factories = set(NAMES)
    seen = set()
    for file in (ROOT / "kvjax" / "methods").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                is_factory = node.name in factories and file.stem in (
                    "method",
                    node.name,
                )
                most = LONGEST_FACTORY if is_factory else LONGEST_FUNCTION
                assert lines_of(node) <= most, f"{file}: {node.name}"
                seen |= {node.name} if is_factory else set()
    assert seen == factories


def test_what_is_missing_is_found():
    source = """
        def outer(x: int) -> int:
            def inner(y, *z: int):
                return y
            return inner(x)
    """
    assert missing(source) == ["inner: y, return"]
