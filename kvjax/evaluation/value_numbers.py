"""Values of a traced program that are equal, whatever it is given.

Value numbering, as compilers do it: what the same operations make of equal things is
equal. Things of different numbers may still be equal; those of one number always are.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

T = TypeVar("T")

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold what is called
_CALLERS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call")
_LARGEST = 1 << 20  # bytes of a constant that is compared by its content


def value_numbers(
    program: core.ClosedJaxpr, inputs: Sequence[Hashable]
) -> tuple[int, ...]:
    """Returns a number for each output of a program: equal ones have equal values.

    Args:
        inputs: something for each of the program's; equal for equal values.
    """
    numbers = _Numbers()
    given = [numbers.of(("input", one)) for one in inputs]
    return tuple(numbers.run(program.jaxpr, program.consts, given))


class _Numbers:
    """The numbers of all values seen so far."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, key: Hashable) -> int:
        """Returns the number of a value that `key` determines."""
        return self._numbers.setdefault(key, len(self._numbers))

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[int]
    ) -> list[int]:
        """Returns the numbers of a program's outputs, from those of its inputs."""
        known = {
            var: self.of(_constant(const))
            for var, const in zip(jaxpr.constvars, consts, strict=True)
        }
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            is_literal = isinstance(atom, core.Literal)
            return self.of(_literal(atom)) if is_literal else known[atom]

        for eqn, key in zip(jaxpr.eqns, _keys(jaxpr), strict=True):
            given = [read(atom) for atom in eqn.invars]
            called = _called(eqn)
            if called is not None:
                made = self.run(called.jaxpr, called.consts, given)
            else:
                what = eqn.primitive, key, *given
                if eqn.effects:
                    what = *what, object()
                avals = [var.aval for var in eqn.outvars]
                made = [self.of((what, i, str(aval))) for i, aval in enumerate(avals)]
            known.update(zip(eqn.outvars, made, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def _called(eqn: Any) -> core.ClosedJaxpr | None:
    """Returns the program that an operation only calls."""
    if eqn.primitive.name not in _CALLERS:
        return None
    found = next(eqn.params[name] for name in _CALLS if name in eqn.params)
    return found if isinstance(found, core.ClosedJaxpr) else None


class _Hashed:
    """A key of many parts, whose hash is found once."""

    def __init__(self, value: Hashable) -> None:
        self.value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _Hashed) or self._hash != other._hash:
            return False
        return self.value == other.value


def _once(function: Callable[[core.Jaxpr], T]) -> Callable[[core.Jaxpr], T]:
    """Has the function look at a program once, while that lives."""
    known: weakref.WeakKeyDictionary[core.Jaxpr, T] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def look(jaxpr: core.Jaxpr) -> T:
        if jaxpr not in known:
            known[jaxpr] = function(jaxpr)
        return known[jaxpr]

    return look


class _Itself:
    """Something that is equal to nothing else; it lives as long as this does."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


def _key(value: Any) -> Hashable:
    """Returns what determines a parameter of an operation."""
    if isinstance(value, core.ClosedJaxpr):
        return "program", _form(value.jaxpr), tuple(map(_constant, value.consts))
    if isinstance(value, core.Jaxpr):
        return "program", _form(value), ()
    if isinstance(value, dict):
        return tuple((name, _key(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return type(value), *map(_key, value)
    return _constant(value)


@_once
def _keys(jaxpr: core.Jaxpr) -> list[Hashable]:
    """Returns what determines the parameters of each of a program's operations."""
    return [
        None if _called(eqn) is not None else _Hashed(_key(eqn.params))
        for eqn in jaxpr.eqns
    ]


@_once
def _form(jaxpr: core.Jaxpr) -> Hashable:
    """Returns a program with its variables numbered as they come."""
    places: dict[Any, int] = {}

    def forms(atoms: Iterable[Any]) -> Hashable:
        return tuple(
            _literal(atom)
            if isinstance(atom, core.Literal)
            else (places.setdefault(atom, len(places)), str(atom.aval))
            for atom in atoms
        )

    head = forms([*jaxpr.constvars, *jaxpr.invars])
    lines = tuple(
        (
            eqn.primitive,
            _key(eqn.params),
            forms(eqn.invars),
            forms(eqn.outvars),
            object() if eqn.effects else None,
        )
        for eqn in jaxpr.eqns
    )
    return _Hashed((head, lines, forms(jaxpr.outvars)))


def _literal(atom: core.Literal) -> Hashable:
    return "literal", str(atom.aval), np.asarray(atom.val).tobytes()


def _constant(value: Any) -> Hashable:
    """Returns an array's content, another value itself, or what is like nothing."""
    if isinstance(value, Tracer):
        return _Itself(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.extended)
        is_here = getattr(value, "is_fully_addressable", True)
        if is_key or not is_here or value.nbytes > _LARGEST:
            return _Itself(value)
        return "array", value.shape, str(value.dtype), np.asarray(value).tobytes()
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return type(value), value
