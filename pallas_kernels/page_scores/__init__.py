"""How high the logits of a page can be, from the extremes of its keys."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dispatch import dispatch
from pallas_kernels.page_scores import reference

_KERNELS = {"mosaic_tpu": "pallas_kernels.page_scores.mosaic_tpu"}


def page_bounds(
    q: Float[Array, "B Hq D"],
    page_min: Float[Array, "B Hkv NP D"],
    page_max: Float[Array, "B Hkv NP D"],
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> Float[Array, "B Hq NP"]:
    """Upper bound of q . k over each page's keys, in float32, without softmax scale.

    Args:
        q: rotated queries of one row each; query head h reads KV head h // G.
        page_min, page_max: elementwise extremes of each page's rotated keys.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Raises:
        ValueError: if the shapes disagree.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    if page_min.shape != page_max.shape or q.shape[1] % page_min.shape[1]:
        raise ValueError(
            f"shapes disagree: q {q.shape}, page_min {page_min.shape}, "
            f"page_max {page_max.shape}."
        )
    return dispatch(
        reference.page_bounds,
        _KERNELS,
        (q, page_min, page_max),
        {},
        implementation=implementation,
        interpret=interpret,
    )
