"""Problems of `top_k`: see :mod:`pallas_kernels.shared.cases`."""

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.shared.cases import KV_HEADS, LONG, SHORT, Case, array, bytes_of
from pallas_kernels.topk import top_k


def arguments(
    num_scores: int, *, batch: int = 1, heads: int = KV_HEADS
) -> tuple[Any, ...]:
    """The shape of the scores, a row for each KV head."""
    return (array(batch, heads, num_scores, dtype=jnp.float32),)


def num_bytes(scores: Any) -> int:
    """Bytes of the scores: what must be read, once."""
    return bytes_of(scores)


def _case(num_scores: int, k: int) -> Case:
    return Case(functools.partial(top_k, k=k, order="index"), arguments(num_scores))


CASES = {
    "top_k-64-of-2K": _case(SHORT // 64, 64),
    "top_k-2048-of-64K": _case(LONG // 16, 2048),
    "top_k-8192-of-1M": _case(LONG, 8192),
}
