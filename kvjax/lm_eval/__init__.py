"""The lm-evaluation-harness, run on a model under a method.

`kvjax.lm_eval.KvjaxLM` is a model of the harness; it is imported, and the package
`lm_eval` with it, when it is first used: `pip install 'kvjax[lm-eval]'`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvjax.lm_eval.model import KvjaxLM as KvjaxLM

__all__ = ["KvjaxLM"]


def __getattr__(name: str) -> Any:
    if name == "KvjaxLM":
        return importlib.import_module("kvjax.lm_eval.model").KvjaxLM
    raise AttributeError(f"module 'kvjax.lm_eval' has no attribute {name!r}")
