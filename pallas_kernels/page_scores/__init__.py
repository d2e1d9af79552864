"""The logits of a page from statistics of its keys: a bound, or mean and variance."""

from typing import Any, Literal

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.page_scores import reference

_KERNELS: dict[Implementation, str] = {
    "mosaic_tpu": "pallas_kernels.page_scores.mosaic_tpu",
    "triton": "pallas_kernels.page_scores.triton",
}


def page_bounds(
    q: Float[Array, "B Hq D"],
    page_min: Float[Array, "B Hkv NP D"],
    page_max: Float[Array, "B Hkv NP D"],
    *,
    group_reduce: Literal["none", "mean", "max"] = "none",
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "B H NP"]:
    """Upper bound of q . k over each page's keys, in float32, without softmax scale.

    Args:
        q: rotated queries of one row each; query head h reads KV head h // G.
        page_min, page_max: elementwise extremes of each page's rotated keys.
        group_reduce: of the bounds of the query heads that share a KV head; H is Hq
            with "none", else Hkv.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Raises:
        ValueError: if the shapes disagree, or there is no such reduction.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    reference.check_reduce(group_reduce)
    _check(q, page_min=page_min, page_max=page_max)
    return dispatch(
        reference.page_bounds,
        _KERNELS,
        (q, page_min, page_max),
        {"group_reduce": group_reduce},
        implementation=implementation,
        interpret=interpret,
    )


def page_moments(
    q: Float[Array, "B Hq D"],
    page_mean: Float[Array, "B Hkv NP D"],
    page_variance: Float[Array, "B Hkv NP D"],
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B Hq NP"], Float[Array, "B Hq NP"]]:
    """Mean and variance of q . k over each page's keys, without softmax scale.

    The mean is exact; the variance takes the channels of the keys as independent, as
    EntmaxKV's Gaussian selector does.

    Args:
        q: rotated queries of one row each; query head h reads KV head h // G.
        page_mean, page_variance: elementwise, of each page's rotated keys.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        `(mean, variance)` in float32; one read of the statistics gives both.

    Raises:
        ValueError: if the shapes disagree.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    _check(q, page_mean=page_mean, page_variance=page_variance)
    return dispatch(
        reference.page_moments,
        _KERNELS,
        (q, page_mean, page_variance),
        {},
        implementation=implementation,
        interpret=interpret,
    )


def _check(q, **statistics):
    first, second = (x.shape for x in statistics.values())
    if first != second or q.shape[1] % first[1] or q.shape[2] != first[3]:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in statistics.items())
        raise ValueError(f"shapes disagree: q {q.shape}, {shapes}.")
