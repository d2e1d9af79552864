"""Top-k selection over page or token scores, exact unless asked otherwise."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.topk import reference

_KERNELS: dict[Implementation, str] = {
    "mosaic_tpu": "pallas_kernels.topk.mosaic_tpu",
    "triton": "pallas_kernels.topk.triton",
}

ORDERS = "score", "index"


def top_k(
    scores: Float[Array, "*B N"],
    k: int,
    *,
    where: Bool[Array, "*#B N"] | None = None,
    count: Int[Array, "*B"] | None = None,
    order: str = "score",
    recall: float = 1.0,
    implementation: Implementation | None = None,
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
        recall: below 1, the share of the true k that may be expected is at least this:
            a TPU then takes the best of bins (`jax.lax.approx_max_k`), which pays where
            k is far below N; every other device stays exact.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        `(values, indices)`, the indices int32. Where a row has fewer than k to choose,
        the rest, at the end, is -inf and -1.

    Raises:
        ValueError: unless 1 <= k <= N and 0 < recall <= 1, if there is no such order,
            or if a kernel, which is exact, is asked for by name to be less.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"{k=} must be in [1, {scores.shape[-1]}], a row's scores.")
    if order not in ORDERS:
        raise ValueError(f"{order=} must be one of {', '.join(ORDERS)}.")
    if not 0 < recall <= 1:
        raise ValueError(f"{recall=} must be in (0, 1]; 1 is exact.")
    if where is not None:
        scores = jnp.where(where, scores, -jnp.inf)
    if recall < 1:
        if implementation not in (None, "xla"):
            raise ValueError(f"{implementation=} is exact: {recall=} needs 'xla'.")
        return reference.top_k(scores, count, k=k, order=order, recall=recall)
    return dispatch(
        reference.top_k,
        _KERNELS,
        (scores, count),
        {"k": k, "order": order},
        implementation=implementation,
        interpret=interpret,
    )
