"""kvjax: decoding with long contexts in JAX, without drowning in KV-cache traffic.

What is named here is imported, and JAX with it, when it is first used: the command line
looks after signals before.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvjax.interface import CacheSpec as CacheSpec
    from kvjax.interface import DecoderLM as DecoderLM
    from kvjax.interface import Diagnostics as Diagnostics
    from kvjax.interface import LanguageModel as LanguageModel
    from kvjax.interface import Method as Method
    from kvjax.interface import Traffic as Traffic
    from kvjax.methods import *  # noqa: F403  the registry is the one list of methods
    from kvjax.registry import parse as parse

__version__ = "0.1.0"

_HOMES = {"parse": "registry"} | dict.fromkeys(
    (
        *("CacheSpec", "DecoderLM", "Diagnostics", "LanguageModel", "Method"),
        "Traffic",
    ),
    "interface",
)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _public()
    if not name.startswith("_"):
        # Modules first: they are asked for before the methods can be imported.
        if name not in _HOMES and importlib.util.find_spec(f"kvjax.{name}"):
            return importlib.import_module(f"kvjax.{name}")
        home = vars(importlib.import_module(f"kvjax.{_HOMES.get(name, 'methods')}"))
        if name in home:
            return home[name]
    raise AttributeError(f"module 'kvjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})


def _public() -> list[str]:
    methods = vars(importlib.import_module("kvjax.methods"))
    return [*_HOMES, *(name for name in methods if not name.startswith("_"))]
