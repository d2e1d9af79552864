"""kvjax: decoding with long contexts in JAX, without drowning in KV-cache traffic."""

from kvjax.interface import CacheSpec as CacheSpec
from kvjax.interface import DecoderLM as DecoderLM
from kvjax.interface import Diagnostics as Diagnostics
from kvjax.interface import LanguageModel as LanguageModel
from kvjax.interface import Method as Method
from kvjax.interface import Traffic as Traffic
from kvjax.methods import *  # noqa: F403  the registry is the one list of methods
from kvjax.registry import parse as parse

__version__ = "0.1.0"
