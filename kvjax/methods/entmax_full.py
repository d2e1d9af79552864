"""Dense entmax attention: baseline and oracle of the methods for entmax models."""

import dataclasses
import functools
from typing import Any

from kvjax import dense
from kvjax.attention.partials import mark_attention
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method
from kvjax.stores.contiguous import Contiguous, contiguous
from pallas_kernels.entmax import check_alpha


@typed
def entmax_full(*, alpha: float | None = None) -> Method:
    """Keeps every key and value; entmax over all of them, of the model's alpha or any.

    With the model's own alpha the same as :func:`kvjax.full`. Another alpha changes
    what the model computes: to see what a softmax model loses when its attention is
    made sparse, say.

    Args:
        alpha: above 1; None is the model's, which must then be an entmax model.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.contiguous.Contiguous`.

    State: k, v `(B, Hkv, S, D)` cache dtype; length `(B,)` int32. What is appended is
        kept.
    Reads per step and layer: 2*length*D*Hkv elements of KV, per row.
    Exact when: always.

    Raises:
        ValueError: if alpha is given and not a finite number above 1; from `init`, if
            it is not and the model's attention is softmax.

    Source:
        Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", ACL 2019,
        arXiv:1905.05702.
    Deviations:
        none known.

    Example:
        >>> method = kvjax.entmax_full(alpha=1.5)
        >>> state = method.init(spec)
    """
    if alpha is not None:
        check_alpha(alpha)
    return dense.method()._replace(
        init=functools.partial(init, alpha), exact_prompt=alpha is None
    )


def init(alpha: float | None, spec: CacheSpec, weights: Any = None) -> Contiguous:
    """Makes an empty store whose spec has the alpha to attend by."""
    del weights
    if alpha is not None:
        spec = dataclasses.replace(spec, alpha=float(alpha))
    if spec.alpha == 1:
        raise ValueError(
            f"method entmax_full with {alpha=} takes the model's alpha, and that "
            f"is {spec.alpha}, softmax: give alpha, as in entmax_full:alpha=1.5, "
            "or use an entmax model."
        )
    return contiguous(spec)


# What it takes without options.
mark_attention(entmax_full, "entmax")
