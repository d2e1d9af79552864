"""How high the logits of a page can be, from the extremes of its keys."""

from jaxtyping import Array, Float

from pallas_kernels.page_scores import reference


def page_bounds(
    q: Float[Array, "B Hq D"],
    page_min: Float[Array, "B Hkv NP D"],
    page_max: Float[Array, "B Hkv NP D"],
) -> Float[Array, "B Hq NP"]:
    """Upper bound of q . k over each page's keys, in float32, without softmax scale.

    Args:
        q: rotated queries of one row each; query head h reads KV head h // G.
        page_min, page_max: elementwise extremes of each page's rotated keys.

    Raises:
        ValueError: if the shapes disagree.
    """
    if page_min.shape != page_max.shape or q.shape[1] % page_min.shape[1]:
        raise ValueError(
            f"shapes disagree: q {q.shape}, page_min {page_min.shape}, "
            f"page_max {page_max.shape}."
        )
    return reference.page_bounds(q, page_min, page_max)
