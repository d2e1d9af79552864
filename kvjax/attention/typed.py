"""Options of factories, and the one message for a value of another type."""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from kvjax.interface import Method

Factory = TypeVar("Factory", bound=Callable[..., Method])

# What stands for a number of the type, those of NumPy too. True is none.
_NUMBERS = {int: numbers.Integral, float: numbers.Real}
_WORDS = {type(None): "None"}


def typed(factory: Factory) -> Factory:
    """Decorates a factory of methods: an option of another type is refused.

    Without it `budget=64.0` becomes a shape, or not, wherever it is used first.

    Returns:
        The factory, which raises `ValueError` for a number or a text in the place of
        another type. Words of a `Literal` and structures are left to the factory. A
        transform also raises it for a method whose `reread` it does not pass on.
    """

    @functools.wraps(factory)
    def make(*methods: Any, **options: Any) -> Method:
        known = _accepted(factory)
        for name, value in options.items():
            if name in known and not _suits(value, known[name]):
                kinds = " or ".join(
                    _WORDS.get(kind, kind.__name__) for kind in known[name]
                )
                raise ValueError(
                    f"{factory.__name__}: {name}={value!r} must be of type {kinds}."
                )
        made = factory(*methods, **options)
        check_reread(factory.__name__, [*methods, *options.values()], made)
        return made

    return make  # pyright: ignore[reportReturnType]


def check_reread(name: str, given: Iterable[Any], made: Method) -> None:
    """Raises ValueError if a transform drops the second reading of what it wraps."""
    for one in given:
        if isinstance(one, Method):
            if one.reread is not None and getattr(made, "reread", None) is None:
                raise ValueError(
                    f"{name} cannot wrap {one}, which reads its prompt twice: wrap one "
                    "that reads it once, or have the transform pass `reread` on."
                )
        elif isinstance(one, Sequence) and not isinstance(one, str):
            check_reread(name, one, made)


@functools.cache
def _accepted(factory: Callable) -> dict[str, tuple[type, ...]]:
    """The types of each option that takes plain values alone."""
    found = {}
    for name, parameter in inspect.signature(factory, eval_str=True).parameters.items():
        kinds = (parameter.annotation,)
        if typing.get_origin(parameter.annotation) in (types.UnionType, typing.Union):
            kinds = typing.get_args(parameter.annotation)
        if all(kind in (int, float, bool, str, type(None)) for kind in kinds):
            found[name] = kinds
    return found


def _suits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return any(isinstance(value, _NUMBERS.get(kind, kind)) for kind in kinds)
