"""Problems of `page_scores`: see :mod:`pallas_kernels.shared.cases`."""

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.page_scores import page_bounds, page_moments
from pallas_kernels.shared.cases import (
    HEAD_DIM,
    KV_HEADS,
    LONG,
    Q_HEADS,
    SHORT,
    Case,
    array,
    bytes_of,
)


def arguments(
    num_pages: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (Q_HEADS, KV_HEADS),
    head_dim: int = HEAD_DIM,
    dtype: Any = jnp.bfloat16,
) -> tuple[Any, ...]:
    """Shapes of the queries and of two statistics of each page."""
    statistics = array(batch, heads[1], num_pages, head_dim, dtype=dtype)
    return array(batch, heads[0], head_dim, dtype=dtype), statistics, statistics


def num_bytes(first: Any, second: Any) -> int:
    """Bytes of the statistics: what must be read, once."""
    return bytes_of(first, second)


def _case(function: Any, context: int, page_size: int, **static: Any) -> Case:
    function = functools.partial(function, **static)
    return Case(function, arguments(context // page_size))


CASES = {
    "page_bounds-P16-1M": _case(page_bounds, LONG, 16),
    "page_bounds-mean-P64-128K": _case(page_bounds, SHORT, 64, group_reduce="mean"),
    "page_bounds-max-P64-128K": _case(page_bounds, SHORT, 64, group_reduce="max"),
    "page_moments-P16-1M": _case(page_moments, LONG, 16),
    "page_moments-P64-128K": _case(page_moments, SHORT, 64),
    # At the edges of what kernels say they support.
    "page_bounds-of-five": Case(page_bounds, arguments(5, batch=2, heads=(8, 8))),
}
