"""Names of methods that no spec string made, the specs of others, and of a model."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


def spec_of(method: Any) -> str:
    """Returns the factory that made a :class:`kvjax.Method`, with what it bound.

    A factory makes its functions itself, or binds options to those of its module, which
    has its name, or is the `method` of a folder of that name.
    """
    # `init` last: a decorator of a factory may have put its own in that place.
    for function in (method.traffic, method.inspect_step, method.init):
        name, nested, _ = getattr(function, "__qualname__", "").partition(".<locals>")
        if nested:
            return name
        if isinstance(function, functools.partial):
            return _with_options(_module_name(function.func), function, type(method))
    return _module_name(method.init)


_PLAIN = (str, numbers.Number, type(None))  # of options that a spec string can have


def _with_options(name: str, bound: functools.partial, method: type) -> str:
    """Returns the name with the plain options that are bound, and a method in it."""
    names = list(inspect.signature(bound.func).parameters)[: len(bound.args)]
    options = dict(zip(names, bound.args, strict=True))
    for value in bound.args:
        if dataclasses.is_dataclass(value):
            fields = [field for field in dataclasses.fields(value) if field.init]
            options |= {field.name: getattr(value, field.name) for field in fields}
    plain = [f"{k}={v}" for k, v in options.items() if isinstance(v, _PLAIN)]
    inner = [v.spec_text() for v in options.values() if isinstance(v, method)]
    return "+".join([name + ":" * bool(plain) + ",".join(plain), *inner])


def _module_name(function: Any) -> str:
    *_, folder, name = ["", *getattr(function, "__module__", "").split(".")]
    return folder if name == "method" else name


class Recipe(NamedTuple):
    """The spec that a method was made of, for transforms that make more of its kind."""

    spec: str
    options: Mapping[str, Any]  # of the innermost factory, with its defaults
    remake: Callable[..., Any]  # takes some of these options, with other values


RECIPES: dict[Any, Recipe] = {}  # of every method that was made of a spec


def of_model(model: Any) -> str:
    """Returns a :class:`kvjax.LanguageModel` in a line: it has millions of numbers."""

    # A matrix in 4 bits is several arrays, and says itself how many weights.
    def has_size(node: Any) -> bool:
        return hasattr(node, "size")

    nodes = filter(has_size, jax.tree.leaves(model.params, is_leaf=has_size))
    weights = [(node.size, str(node.dtype)) for node in nodes]
    dtypes = sorted({dtype for _, dtype in weights})
    count = sum(size for size, _ in weights)
    sizes = f"{count:,} parameters" + (f" ({', '.join(dtypes)})" if dtypes else "")
    decoder = model.decoder
    return (
        f"LanguageModel({model.name!r}, {type(decoder).__name__}, {sizes}, "
        f"{decoder.num_layers} layers, context {decoder.context:,}, "
        f"vocabulary {decoder.vocab_size:,})"
    )
