"""The lm-evaluation-harness, of the extra `lm-eval`: looked up when it runs."""

from typing import Any

def __getattr__(name: str) -> Any: ...
