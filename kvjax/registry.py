"""Methods by name, and the one spelling of a configured method.

A spec string is ``name:option=value,...``; transforms are joined by ``+``, outer first:
``dense_layers:first=2+quest:budget=1024,page_size=16``.
"""

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable

from kvjax import built_in
from kvjax.attention.partials import suits
from kvjax.interface import Method, remember_spec

_FACTORIES = {
    name: value for name, value in vars(built_in).items() if inspect.isfunction(value)
}


# Made by every call alike, and by name.
remember_spec(built_in.full(), "full")


def names(alpha: float | None = None) -> tuple[str, ...]:
    """Every method, `full` first; transforms not included.

    With `alpha`, those that a model of that alpha can use (1 is softmax).
    """
    found = sorted(name for name in _FACTORIES if not is_transform(name))
    if alpha is not None:
        found = [name for name in found if suits(_FACTORIES[name], alpha)]
    return ("full", *(name for name in found if name != "full"))


def transforms() -> tuple[str, ...]:
    """Every transform: a factory that takes a method."""
    return tuple(sorted(name for name in _FACTORIES if is_transform(name)))


def get(name: str) -> Callable[..., Method]:
    """The factory called `name`.

    Raises:
        ValueError: if there is none; the message has the nearest name.
    """
    if name not in _FACTORIES:
        raise ValueError(f"unknown method {name!r}{_nearest(name, _FACTORIES)}")
    return _FACTORIES[name]


def is_transform(name: str) -> bool:
    """Whether the factory called `name` takes a method."""
    return "method" in inspect.signature(_FACTORIES[name]).parameters


def options(name: str) -> dict[str, inspect.Parameter]:
    """The hyperparameters of `name`, in order."""
    parameters = inspect.signature(get(name)).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


@functools.cache
def parse(spec: str, /, **defaults: int | float | bool | str) -> Method:
    """Builds the method a spec string describes; the same string, the same object.

    Args:
        spec: for example `quest:budget=1024,page_size=16`.
        **defaults: used where the method has such an option and `spec` is silent;
            transforms do not take them.

    Raises:
        ValueError: unknown method or option, or a value that does not fit.
    """
    *outer, innermost = [part.strip() for part in spec.split("+")]
    name, given = _split(innermost)
    if is_transform(name):
        raise ValueError(
            f"{spec!r} ends in the transform {name!r}: join it to a method, for "
            f"example '{innermost}+quest'."
        )
    fitting = {key: v for key, v in defaults.items() if key in options(name)}
    method = get(name)(**(fitting | given))
    written = _joined(name, fitting | given)
    for part in reversed(outer):
        name, given = _split(part)
        if not is_transform(name):
            raise ValueError(
                f"{name!r} in {spec!r} is no transform: known are "
                f"{', '.join(transforms())}."
            )
        parameters = inspect.signature(get(name)).parameters
        wrapped = [method] + [built_in.full()] * ("dense" in parameters)
        method = get(name)(*wrapped, **given)
    remember_spec(method, "+".join([*outer, written]))
    return method


def as_method(method: Method | str) -> Method:
    """Returns the method that a spec string such as `quest:budget=128` describes.

    The same string gives the same object, so that compiled code is kept per string.

    Raises:
        TypeError: if it is neither.
        ValueError: as :func:`kvjax.registry.parse`.
    """
    if isinstance(method, str):
        return parse(method)
    if not isinstance(method, Method):
        raise TypeError(
            f"method={method!r} must be a kvjax.Method, or text such as "
            "'quest:budget=128'."
        )
    return method


def canonical(spec: str) -> str:
    """The spec with every option of every part, in order: equal for equal methods.

    Raises:
        ValueError: as :func:`parse`.
    """
    parse(spec)
    parts = []
    for part in spec.split("+"):
        name, given = _split(part.strip())
        defaults = {key: p.default for key, p in options(name).items()}
        parts.append(_joined(name, defaults | given))
    return "+".join(parts)


def _joined(name: str, given: dict) -> str:
    settings = (f"{key}={value}" for key, value in given.items())
    return f"{name}:{','.join(settings)}".rstrip(":")


def _split(part: str) -> tuple[str, dict]:
    name, _, text = part.partition(":")
    known = options(name)
    given = {}
    for item in filter(None, text.split(",")):
        key, equals, value = (s.strip() for s in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} in {part!r} must read option=value.")
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{_nearest(key, known)}")
        if key in given:
            raise ValueError(f"option {key!r} is given twice in {part!r}.")
        given[key] = _convert(name, known[key], value)
    return name, given


def _convert(name: str, option: inspect.Parameter, text: str):
    accepted = option.annotation
    if isinstance(accepted, types.UnionType):
        if text.lower() == "none":
            return None
        accepted = next(a for a in typing.get_args(accepted) if a is not type(None))
    if typing.get_origin(accepted) is typing.Literal:
        choices = typing.get_args(accepted)
        if text not in choices:
            raise ValueError(
                f"{name}: {option.name}={text!r} must be one of {', '.join(choices)}."
            )
        return text
    if accepted is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: {option.name}={text!r} must be true or false.")
        return text.lower() == "true"
    try:
        return accepted(text)
    except ValueError:
        raise ValueError(
            f"{name}: {option.name}={text!r} must be of type {accepted.__name__}."
        ) from None


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known) or 'none'}."
