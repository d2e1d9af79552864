"""Options of factories, and the one message for a value of another type."""

import functools
import inspect
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.interface import Diagnostics, InspectStepFn, Method, State

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
        transform raises `TypeError` for what is no method in the place of one, and
        `ValueError` for a method whose `reread`, or `asked` or `settle` of its `hooks`,
        it does not pass on. What is made of a lossy method is lossy.
    """

    @functools.wraps(factory)
    def make(*methods: Any, **options: Any) -> Method:
        _check_methods(factory, dict(zip(_taken(factory), methods, strict=False)))
        _check_methods(factory, options)
        known = _accepted(factory)
        for name, value in options.items():
            if name in known and not _suits(value, known[name]):
                kinds = " or ".join(
                    _WORDS.get(kind, kind.__name__) for kind in known[name]
                )
                raise ValueError(
                    f"{factory.__name__}: {name}={value!r} must be of type {kinds}."
                )
        _check_outermost(factory.__name__, [*methods, *options.values()])
        made = factory(*methods, **options)
        return passed_on(factory.__name__, [*methods, *options.values()], made)

    return make  # pyright: ignore[reportReturnType]


def noted(note: Callable[..., str | None]) -> Callable[[Factory], Factory]:
    """Decorates a factory with what must be known of an answer under its options.

    Args:
        note: takes the options that were given; returns a line, or None.
    """

    def mark(factory: Factory) -> Factory:
        vars(factory)["note"] = note
        return factory

    return mark


def passed_on(name: str, given: Iterable[Any], made: Method) -> Method:
    """Returns what a transform made: lossy, or one that estimates, if what it wraps is.

    Args:
        name: the transform's.
        given: its arguments, some of which are methods.
        made: by it.

    Raises:
        ValueError: if it drops the second reading of what it wraps, that it wants to
            be told where a question begins, or what it decides over all layers; if
            that goes outermost.
    """
    wrapped = list(_methods(given))
    _check_outermost(name, wrapped)
    for method in wrapped:
        if method.reread is not None and made.reread is None:
            raise ValueError(
                f"{name} cannot wrap {method}, which reads its prompt twice: wrap one "
                "that reads it once, or have the transform pass `reread` on."
            )
        if method.hooks.asked is not None and made.hooks.asked is None:
            raise ValueError(
                f"{name} cannot wrap {method}, which is told where a prompt's question "
                "begins: wrap one that is not, or have the transform pass `hooks` on."
            )
        if method.hooks.settle is not None and made.hooks.settle is None:
            raise ValueError(
                f"{name} cannot wrap {method}, which decides over all layers: wrap one "
                "that decides layer by layer (squeezed with scope=layer), or have the "
                "transform pass `hooks` on."
            )
    if any(method.estimates for method in wrapped):
        made = made._replace(estimates=True)
    is_lossy = any(method.lossy for method in wrapped)
    return lossy(made) if is_lossy and not made.lossy else made


def _check_outermost(name: str, given: Iterable[Any]) -> None:
    """Raises ValueError if a method among them must not be wrapped."""
    for method in _methods(given):
        if method.repeats:
            raise ValueError(
                f"{name} cannot wrap {method}, which takes the copies of a token that "
                f"a model feeds: phd goes outermost, as in 'phd+{name}+quest'."
            )
        if method.hooks.prefill_after is not None:
            outer = re.split(r"\W", method.spec_text())[0]
            raise ValueError(
                f"{outer} goes outermost, as in '{outer}+retro+quest': {name} around "
                f"{method} would not hand on what its layers hand to each other."
            )


def lossy(method: Method) -> Method:
    """Marks a method whose keys and values are kept as other numbers than came.

    Its steps are exact in nothing, whatever is proved of the numbers that are kept.
    """
    step = functools.partial(_unproved, method.inspect_step)
    return method._replace(lossy=True, inspect_step=step)


def _unproved(
    inspect_step: InspectStepFn, state: State, q: Float[Array, "B Hq T D"]
) -> tuple[State, Float[Array, "B Hq T D"], Diagnostics]:
    state, out, diagnostics = inspect_step(state, q)
    exact = jnp.zeros_like(diagnostics.exact)
    return state, out, diagnostics._replace(exact=exact)


def _methods(given: Iterable[Any]) -> Iterator[Method]:
    for one in given:
        if isinstance(one, Method):
            yield one
        elif isinstance(one, Sequence) and not isinstance(one, str):
            yield from _methods(one)


def _check_methods(factory: Callable, given: Mapping[str, Any]) -> None:
    """Raises TypeError for a spec, a factory or anything else in a method's place."""
    for name, takes_lists in _taken(factory).items():
        if name not in given or isinstance(value := given[name], Method):
            continue
        if takes_lists and isinstance(value, Sequence) and not isinstance(value, str):
            continue  # the factory says what may be in it
        fix = "such as kvjax.parse('quest:budget=128')"
        if isinstance(value, str):
            fix = f"such as kvjax.parse({value!r})"
        elif callable(value):
            fix = "which a factory returns: call it"
        lists = " or a list of them" if takes_lists else ""
        raise TypeError(
            f"{factory.__name__}: {name}={value!r} must be a kvjax.Method{lists}, "
            f"{fix}."
        )


@functools.cache
def _taken(factory: Callable) -> dict[str, bool]:
    """The arguments that are methods, in order; whether each may be a list of them."""
    found = {}
    for name, parameter in inspect.signature(factory, eval_str=True).parameters.items():
        kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
        if Method in kinds:
            found[name] = Sequence[Method] in kinds
    return found


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
