"""kvjax: decoding with long contexts in JAX, without drowning in KV-cache traffic.

What is named here is imported, and JAX with it, when it is first used: the command line
looks after signals before. `models`, and Flax with it, are imported by `load` alone.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from kvjax.version import __version__ as __version__

if TYPE_CHECKING:
    from kvjax import testing as testing
    from kvjax.decoding.generate import generate as generate
    from kvjax.decoding.generate import stream as stream
    from kvjax.decoding.scoring import score as score
    from kvjax.decoding.serving import serve_rows as serve_rows
    from kvjax.interface import CacheSpec as CacheSpec
    from kvjax.interface import DecoderLM as DecoderLM
    from kvjax.interface import Diagnostics as Diagnostics
    from kvjax.interface import Hooks as Hooks
    from kvjax.interface import LanguageModel as LanguageModel
    from kvjax.interface import Lists as Lists
    from kvjax.interface import Method as Method
    from kvjax.interface import Rereading as Rereading
    from kvjax.interface import Traffic as Traffic
    from kvjax.registry import parse as parse
    from kvjax.registry import register as register
    from kvjax.registry.built_in import *  # noqa: F403  the one list of methods
    from kvjax.registry.describe import cite as cite
    from kvjax.rope import Rope as Rope
    from models import load as load

# Where each public name lies that is no method's.
_HOMES = {
    "CacheSpec": "kvjax.interface",
    "DecoderLM": "kvjax.interface",
    "Diagnostics": "kvjax.interface",
    "Hooks": "kvjax.interface",
    "LanguageModel": "kvjax.interface",
    "Lists": "kvjax.interface",
    "Method": "kvjax.interface",
    "Rereading": "kvjax.interface",
    "Rope": "kvjax.rope",
    "Traffic": "kvjax.interface",
    "cite": "kvjax.registry.describe",
    "generate": "kvjax.decoding.generate",
    "load": "models",
    "parse": "kvjax.registry",
    "register": "kvjax.registry",
    "score": "kvjax.decoding.scoring",
    "serve_rows": "kvjax.decoding.serving",
    "stream": "kvjax.decoding.generate",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _public()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_"):
        # Modules first: they are asked for before the methods can be imported.
        if importlib.util.find_spec(f"kvjax.{name}"):
            return importlib.import_module(f"kvjax.{name}")
        methods = vars(importlib.import_module("kvjax.registry.built_in"))
        if name in methods:
            return methods[name]
    raise AttributeError(f"module 'kvjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_public(), "__version__"]


def _public() -> list[str]:
    methods = vars(importlib.import_module("kvjax.registry.built_in"))
    factories = [name for name, value in methods.items() if callable(value)]
    return sorted([*_HOMES, *factories, "testing"])
