"""Problems of entmax's threshold: see :mod:`pallas_kernels.shared.cases`."""

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.entmax import solve
from pallas_kernels.shared.cases import LONG, Q_HEADS, SHORT, Case, array, bytes_of


def arguments(num_scores: int, heads: int = Q_HEADS) -> tuple[Any, ...]:
    """The shape of the scores, a row for each query head."""
    return (array(1, heads, num_scores, dtype=jnp.float32),)


def num_bytes(scores: Any) -> int:
    """Bytes of the scores: what must be read, once."""
    return bytes_of(scores)


def _case(num_scores: int, alpha: float, heads: int = Q_HEADS) -> Case:
    return Case(functools.partial(solve, alpha=alpha), arguments(num_scores, heads))


CASES = {
    "entmax-1.5-8K": _case(8192, 1.5),
    "entmax-1.5-128K": _case(SHORT, 1.5),
    "entmax-1.7-128K": _case(SHORT, 1.7),
    "entmax-1.5-1M": _case(LONG, 1.5),
    # At the edge of what kernels say they support.
    "entmax-3-1K": _case(1024, 3.0, heads=1),
}
