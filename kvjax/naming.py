"""The names of what no spec string made: a method by its factory, a model."""

import dataclasses
import functools
import inspect
import numbers
from typing import Any

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


def model_text(name: str, decoder: Any, params: Any) -> str:
    """Returns one line about a model and its weights."""
    # A matrix in 4 bits is several arrays, and says itself how many weights.
    nodes = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "size"))
    leaves = [node for node in nodes if hasattr(node, "size")]
    count = sum(leaf.size for leaf in leaves)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    sizes = f"{count:,} parameters" + (f" ({', '.join(dtypes)})" if dtypes else "")
    return (
        f"LanguageModel({name!r}, {type(decoder).__name__}, {sizes}, "
        f"{decoder.num_layers} layers, context {decoder.context:,}, "
        f"vocabulary {decoder.vocab_size:,})"
    )
