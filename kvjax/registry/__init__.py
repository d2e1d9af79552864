"""Methods by name, and the one spelling of a configured method.

A spec string is ``name:option=value,...``; transforms are joined by ``+``, outer first:
``dense_layers:first=2+quest:budget=1024,page_size=16``. A name is that of a method of
kvjax, of a factory given to :func:`register`, or of an entry point in the group
``kvjax.methods`` of an installed package; ``package.module:factory,budget=64`` names a
factory by where it lies.
"""

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable

from kvjax.attention.partials import suits
from kvjax.attention.typed import passed_on
from kvjax.interface import RECIPES, Method, Recipe
from kvjax.registry import built_in, specs

Factory = typing.TypeVar("Factory", bound=Callable[..., Method])

# Packages name their factories here, for all who install them.
ENTRY_POINTS = "kvjax.methods"
# Where modules of methods are looked for besides `sys.path`.
folders: list[str] = []

_BUILT_IN = {
    name: value for name, value in vars(built_in).items() if inspect.isfunction(value)
}
_REGISTERED: dict[str, Callable[..., Method]] = {}
# What factories take that is no option: transforms have the first, some the second.
_METHODS_TAKEN = ("method", "dense")
# What a transform is shown around: it takes one that lists pages, or ranks a prompt.
_WRAPPED = ("quest", "snapkv")


def names(alpha: float | None = None) -> tuple[str, ...]:
    """Every method, `full` first; transforms not included.

    With `alpha`, those that a model of that alpha can use (1 is softmax).
    """
    fitting = [
        name
        for name, factory in _factories().items()
        if not _takes_method(factory) and (alpha is None or suits(factory, alpha))
    ]
    return ("full", *(name for name in sorted(fitting) if name != "full"))


def transforms() -> tuple[str, ...]:
    """Every transform: a factory that takes a method."""
    return tuple(sorted(name for name, f in _factories().items() if _takes_method(f)))


def every() -> tuple[str, ...]:
    """Every method and every transform."""
    return (*names(), *transforms())


def register(factory: Factory) -> Factory:
    """Makes a factory known by its name: in spec strings, and wherever all are listed.

    Can decorate it. A name that was registered before is replaced.

    Args:
        factory: a function whose arguments are options, keyword-only and with defaults,
            and that returns a :class:`kvjax.Method`. A transform also takes `method`.

    Raises:
        TypeError: if it is no factory.
        ValueError: if the name is one of kvjax's own.
    """
    name = getattr(factory, "__name__", repr(factory))
    check_factory(factory, name)
    if not name.isidentifier():
        raise TypeError(f"a factory called {name!r} has no name to be known by.")
    if name in _BUILT_IN:
        raise ValueError(f"{name!r} is a method of kvjax: choose another name.")
    if _REGISTERED.get(name, factory) is not factory:
        parse.cache_clear()
    _REGISTERED[name] = factory
    return factory


def get(name: str) -> Callable[..., Method]:
    """The factory called `name`, or that of `package.module:factory`.

    Raises:
        ValueError: if there is none, or it is no factory; the message has the nearest
            name.
    """
    for named in (_BUILT_IN, _REGISTERED):
        if name in named:
            return named[name]
    if name in _entry_points():
        return _loaded(name)
    module, colon, attribute = name.partition(":")
    if module in _known() and colon:
        raise ValueError(f"{attribute!r} in {name!r} must read option=value.")
    if colon and all(part.isidentifier() for part in module.split(".")):
        return _imported(module, attribute)
    hint = _nearest(name, _known())
    if "." in name:
        hint = "; that of a module reads package.module:factory,option=value."
    raise ValueError(f"unknown method {name!r}{hint}")


def is_transform(name: str) -> bool:
    """Says if the factory called `name` takes a method."""
    return _takes_method(get(name))


def options(name: str) -> dict[str, inspect.Parameter]:
    """The hyperparameters of `name`, in order."""
    parameters = _signature(get(name)).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


@functools.cache
def parse(spec: str, /, **defaults: int | float | bool | str) -> Method:
    """Builds the method a spec string describes; the same string, the same object.

    Args:
        spec: for example `quest:budget=1024,page_size=16`.
        **defaults: used where the method has such an option and `spec` is silent;
            transforms do not take them.

    Raises:
        TypeError: if it is no text.
        ValueError: unknown method or option, or a value that does not fit.
    """
    if not isinstance(spec, str):
        raise TypeError(f"{spec=} must be text such as 'quest:budget=128'.")
    *outer, innermost = specs.parts(spec)
    name, given = _split(innermost)
    if is_transform(name):
        _, _, inner = example(name).rpartition("+")
        raise ValueError(
            f"{spec!r} ends in the transform {name!r}: join it to a method, for "
            f"example '{innermost}+{inner}'."
        )
    fitting = {key: v for key, v in defaults.items() if key in options(name)}
    given = fitting | given
    method = _made(name, **given)
    _remember(method, [], name, given)
    for index in reversed(range(len(outer))):
        transform, options_given = _split(outer[index])
        if not is_transform(transform):
            raise ValueError(
                f"{transform!r} in {spec!r} is no transform: known are "
                f"{', '.join(transforms())}."
            )
        parameters = _signature(get(transform)).parameters
        wrapped = [method] + [built_in.full()] * ("dense" in parameters)
        method = _made(transform, *wrapped, **options_given)
        _remember(method, outer[index:], name, given)
    return method


def example(name: str) -> str:
    """Returns the spec of a transform around a method that it takes."""
    for inner in _WRAPPED:
        try:
            parse(f"{name}+{inner}")
        except ValueError:
            continue
        return f"{name}+{inner}"
    return f"{name}+{_WRAPPED[0]}"


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


def notes(spec: str) -> list[str]:
    """Returns what must be known of answers under a spec: a line of each part's.

    Raises:
        ValueError: as :func:`parse`.
    """
    parse(spec)
    lines = []
    for name, given in map(_split, specs.parts(spec)):
        note = getattr(get(name), "note", None)
        lines.append(note(**given) if callable(note) else None)
    return [line for line in lines if line]


def canonical(spec: str) -> str:
    """The spec with every option of every part, in order: equal for equal methods.

    Raises:
        ValueError: as :func:`parse`.
    """
    parse(spec)
    written = []
    for part in specs.parts(spec):
        name, given = _split(part)
        defaults = {key: p.default for key, p in options(name).items()}
        written.append(_joined(name, defaults | given))
    return "+".join(written)


# --- factories


def _factories() -> dict[str, Callable[..., Method]]:
    """Every factory that has a name; warns of those that cannot be imported."""
    factories = _BUILT_IN | _REGISTERED
    for name in _entry_points().keys() - factories.keys():
        try:
            factories[name] = _loaded(name)
        except ValueError as error:
            # Another's package must not keep anybody from the methods that there are.
            warnings.warn(f"left out: {error}", stacklevel=3)
    return factories


def _known() -> list[str]:
    return [*_BUILT_IN, *_REGISTERED, *_entry_points()]


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """Factories of installed packages, by name; none of them is imported by it."""
    return {e.name: e for e in importlib.metadata.entry_points(group=ENTRY_POINTS)}


@functools.cache
def _loaded(name: str) -> Callable[..., Method]:
    """The factory of an entry point."""
    entry = _entry_points()[name]
    try:
        return _imported(entry.module, entry.attr)
    except Exception as error:
        # Whatever another's file raises.
        package = entry.dist.name if entry.dist else "a package"
        raise ValueError(f"method {name!r} of {package}: {error}") from error


def _imported(module: str, attribute: str) -> Callable[..., Method]:
    """The factory that `package.module:factory` names."""
    name = f"{module}:{attribute}"
    sys.path += [folder for folder in folders if folder not in sys.path]
    try:
        opened = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{module} cannot be imported: {error}.") from error
        near = difflib.get_close_matches(module, _known(), n=1)
        hint = f"; did you mean the method {near[0]!r}?" if near else "."
        raise ValueError(
            f"there is no module {module!r} to take {name!r} from{hint}"
        ) from None
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{module} cannot be imported: {error}.") from error
    factory = getattr(opened, attribute, None)
    if factory is None:
        near = difflib.get_close_matches(attribute, vars(opened), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"module {module!r} has no {attribute!r}{hint}")
    try:
        check_factory(factory, name)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return factory


def check_factory(factory: object, name: str) -> None:
    """Raises TypeError unless it can be a factory of methods, as far as it says."""
    wanted = "a function of keyword-only options that returns a kvjax.Method"
    if not callable(factory) or inspect.isclass(factory):
        raise TypeError(f"{name} is no factory, but {_kind(factory)}; give {wanted}.")
    try:
        signature = _signature(factory)
    except (ValueError, NameError) as error:
        raise TypeError(f"{name} is no factory: {error}; give {wanted}.") from error
    returned = signature.return_annotation
    if inspect.isclass(returned) and not issubclass(
        returned, (Method, inspect.Parameter.empty)
    ):
        raise TypeError(
            f"{name} is no factory of methods: it returns {returned.__name__}; give "
            f"{wanted}."
        )
    for p in signature.parameters.values():
        is_option = p.kind is p.KEYWORD_ONLY and p.default is not p.empty
        if not (is_option or p.name in _METHODS_TAKEN):
            raise TypeError(
                f"{name} is no factory of methods: its argument {p.name!r} must be "
                f"keyword-only and have a default; give {wanted}."
            )


def _remember(method: Method, outer: list[str], name: str, given: dict) -> None:
    """Notes what a method was made of: transforms around a factory with options."""
    defaults = {key: p.default for key, p in options(name).items()}
    spec = "+".join([*outer, _joined(name, given)])
    remake = functools.partial(_remade, outer, name, given)
    RECIPES[method] = Recipe(spec, defaults | given, remake)


def _remade(outer: list[str], name: str, given: dict, **changed: int) -> Method:
    """Returns the method with other options of its innermost factory."""
    return parse("+".join([*outer, _joined(name, given | changed)]))


def _kind(value: object) -> str:
    if isinstance(value, Method):
        return "a method that one made"
    return "a class" if inspect.isclass(value) else f"of type {type(value).__name__}"


def _signature(factory: Callable) -> inspect.Signature:
    """The signature, with annotations that are text read as what they mean."""
    return inspect.signature(factory, eval_str=True)


def _takes_method(factory: Callable[..., Method]) -> bool:
    return "method" in _signature(factory).parameters


def _made(name: str, *methods: Method, **given) -> Method:
    """Makes the method; what the factory returns must be one.

    Whatever value it does not take is a mistake of the spec, in anybody's factory.
    """
    factory = get(name)
    try:
        method = factory(*methods, **given)
    except ValueError as error:
        said = str(error) or type(error).__name__
        names_itself = said.startswith((name, getattr(factory, "__name__", name)))
        raise ValueError(said if names_itself else f"{name}: {said}") from error
    if not isinstance(method, Method):
        raise ValueError(
            f"{name} returned a {type(method).__name__}; a factory returns a "
            "kvjax.Method."
        )
    return passed_on(name, methods, method)


# --- text


def _joined(name: str, given: dict) -> str:
    return specs.join(name, [f"{key}={value}" for key, value in given.items()])


def _split(part: str) -> tuple[str, dict]:
    name, written = specs.split(part)
    known = options(name)
    given = {}
    for item in written:
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
    if accepted is option.empty:
        accepted = type(option.default)
    if typing.get_origin(accepted) in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        accepted = next(a for a in typing.get_args(accepted) if a is not type(None))
    if typing.get_origin(accepted) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(accepted)}
        if text not in choices:
            raise ValueError(
                f"{name}: {option.name}={text!r} must be one of {', '.join(choices)}."
            )
        return choices[text]
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


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known) or 'none'}."


# Made by every call alike, and by name.
_remember(built_in.full(), [], "full", {})
