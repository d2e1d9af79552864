"""alpha-entmax: softmax with exact zeros, its threshold, and attention with it.

With z = (alpha - 1) * scores, p_i = max(z_i - tau, 0) ** (1 / (alpha - 1)), and tau is
the one number for which the p_i sum to 1. alpha = 2 is sparsemax, alpha -> 1 softmax.
"""

import math
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.entmax import reference
from pallas_kernels.entmax.equations import Threshold as Threshold
from pallas_kernels.shared.quantized import Rows


def entmax(
    scores: Float[Array, "..."],
    *,
    alpha: float,
    where: Bool[Array, "..."] | None = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """Probabilities along `axis`, exactly zero where a score is below the threshold.

    Differentiable, forwards and backwards, by the implicit function theorem: with
    s = p ** (2 - alpha) on the support, dp = s * (dz - sum(s * dz) / sum(s)) for a
    change dz of the scores. Any constant may be added to the scores; +inf shares the
    mass with its equals.

    Args:
        scores: of any float dtype; computed in float32, or float64 if they are.
        alpha: above 1. 1.5 and 2 are fastest, then 1 + 1/n; others take an exp and a
            log an element and pass over the scores.
        where: broadcasts to the scores; False gets probability 0, as does -inf.
        axis: of the distribution.

    Returns:
        As `scores`. Nothing to choose from gives zeros; a NaN makes its row NaN.

    Raises:
        ValueError: unless alpha is a finite number above 1.
    """
    check_alpha(alpha)
    return reference.entmax(scores, float(alpha), where, axis)


def entmax_threshold(
    scores: Float[Array, "*B S"],
    *,
    alpha: float,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*B"]:
    """The threshold tau of :func:`entmax` over the last axis, and differentiable.

    In units of z = (alpha - 1) * scores; tau / (alpha - 1) is in units of the scores.
    A row with nothing to choose from has +inf.

    Raises:
        ValueError: unless alpha is a finite number above 1.
    """
    check_alpha(alpha)
    return reference.entmax_threshold(scores, float(alpha), where)


def solve(
    scores: Float[Array, "*B S"],
    *,
    alpha: float,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Threshold:
    """The threshold over the last axis, relative to the largest score; no gradient.

    `scores` are float32 or float64, -inf where masked. Together with :func:`weights`
    the pieces of :func:`entmax`, for attention that computes its weights again from
    the threshold alone: weighted values of disjoint sets of keys then just add up.

    Args:
        scores: what to choose from.
        alpha: above 1.
        axis_name: inside a `jax.shard_map`, axes of the mesh over which the scores of
            a row are spread: two numbers a row cross them for each step.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.
    """
    if axis_name is not None:
        return reference.solve(scores, alpha=float(alpha), axis_name=axis_name)
    return dispatch(
        reference.solve,
        reference.KERNELS,
        (scores,),
        {"alpha": float(alpha)},
        implementation=implementation,
        interpret=interpret,
    )


def weights(
    scores: Float[Array, "*B S"], threshold: Threshold, *, alpha: float
) -> tuple[Float[Array, "*B S"], Float[Array, "*B S"]]:
    """`(p, s)`: probabilities up to rounding of their sum, and p ** (2 - alpha)."""
    return reference.weights(scores, threshold, alpha)


def entmax_attention(
    q: Float[Array, "B Hq T D"],
    k: Float[Rows, "B Hkv S D"],
    v: Float[Rows, "B Hkv S D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B H S"] | None = None,
    *,
    alpha: float,
    sm_scale: float,
) -> tuple[Float[Array, "B Hq T D"], Float[Array, "B Hq T"]]:
    """Attention as :func:`pallas_kernels.decode_attention.decode_attention`, by entmax.

    Returns:
        `(out, value)` in float32. The value is max over p of p . scores + H(p), H the
        Tsallis entropy of order alpha: what log-sum-exp is to softmax. It grows with
        the set of keys and tends to log-sum-exp as alpha -> 1, but two sets cannot be
        merged by it. A row that sees no key has out 0 and value -inf.

    Raises:
        ValueError: if the shapes disagree or alpha is not above 1.
    """
    check_alpha(alpha)
    return reference.entmax_attention(
        q, k, v, query_positions, key_positions, float(alpha), sm_scale
    )


def check_alpha(alpha: float) -> None:
    """Raises `ValueError` unless alpha is a finite number above 1."""
    if not (alpha > 1 and math.isfinite(alpha)):
        raise ValueError(f"{alpha=} must be finite and above 1; alpha 1 is softmax.")
