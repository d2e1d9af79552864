"""jax-triton, of the extra `triton`: looked up when it runs, not when it is checked."""

from typing import Any

def __getattr__(name: str) -> Any: ...
