"""Exact top-k selection over page or token scores."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.topk import reference

_KERNELS = {"mosaic_tpu": "pallas_kernels.topk.mosaic_tpu"}

ORDERS = "score", "index"


def top_k(
    scores: Float[Array, "*B N"],
    k: int,
    *,
    where: Bool[Array, "*#B N"] | None = None,
    count: Int[Array, "*B"] | None = None,
    order: str = "score",
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """The k highest scores along the last axis and where they are, exactly.

    The order is that of `jax.lax.top_k`: total, -0.0 below 0.0, NaN above infinity
    (one with its sign set is never chosen); among equals the lower index wins.

    Args:
        scores: of any float dtype; -inf is never chosen.
        k: static size of the result.
        where: broadcasts to the scores; what is False is never chosen.
        count: how many of a row to choose, at most k; None is k.
        order: of the result: "score", best first, or "index", rising, which is cheaper
            where a kernel runs, and reads memory in order.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        `(values, indices)`, the indices int32. Where a row has fewer than k to choose,
        the rest, at the end, is -inf and -1.

    Raises:
        ValueError: unless 1 <= k <= N, or if there is no such order.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"{k=} must be in [1, {scores.shape[-1]}], a row's scores.")
    if order not in ORDERS:
        raise ValueError(f"{order=} must be one of {', '.join(ORDERS)}.")
    if where is not None:
        scores = jnp.where(where, scores, -jnp.inf)
    return dispatch(
        reference.top_k,
        _KERNELS,
        (scores, count),
        {"k": k, "order": order},
        implementation=implementation,
        interpret=interpret,
    )
