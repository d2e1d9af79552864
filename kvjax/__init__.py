"""kvjax: decoding with long contexts in JAX, without drowning in KV-cache traffic.

What is named here is imported, and JAX with it, when it is first used: the command line
looks after signals before.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvjax.built_in import *  # noqa: F403  the one list of methods
    from kvjax.decoding.generate import generate as generate
    from kvjax.decoding.generate import stream as stream
    from kvjax.decoding.scoring import score as score
    from kvjax.interface import CacheSpec as CacheSpec
    from kvjax.interface import DecoderLM as DecoderLM
    from kvjax.interface import Diagnostics as Diagnostics
    from kvjax.interface import LanguageModel as LanguageModel
    from kvjax.interface import Method as Method
    from kvjax.interface import Traffic as Traffic
    from kvjax.registry import parse as parse
    from kvjax.rope import Rope as Rope
    from models import load as load

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(
        (
            *("CacheSpec", "DecoderLM", "Diagnostics", "LanguageModel", "Method"),
            "Traffic",
        ),
        "kvjax.interface",
    ),
    "Rope": "kvjax.rope",
    "generate": "kvjax.decoding.generate",
    "load": "models",
    "parse": "kvjax.registry",
    "score": "kvjax.decoding.scoring",
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
        methods = vars(importlib.import_module("kvjax.built_in"))
        if name in methods:
            return methods[name]
    raise AttributeError(f"module 'kvjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *_public()]


def _public() -> list[str]:
    methods = vars(importlib.import_module("kvjax.built_in"))
    return sorted([*_HOMES, *(name for name in methods if not name.startswith("_"))])
