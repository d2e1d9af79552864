"""Entmax attention over a list of pages per KV head or per query head."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.entmax import check_alpha
from pallas_kernels.page_entmax import reference
from pallas_kernels.shared import page_lists
from pallas_kernels.shared.quantized import Rows

_KERNELS: dict[Implementation, str] = {
    "mosaic_tpu": "pallas_kernels.page_entmax.mosaic_tpu",
    "triton": "pallas_kernels.page_entmax.triton",
}


def page_entmax(
    q: Float[Array, "B Hq T D"],
    pages: Float[Rows, "B Hkv NP P D2"],
    page_ids: Int[Array, "B H K"],
    query_positions: Int[Array, "B T"],
    mask: Bool[Array, "B H K T"] | None = None,
    tau: Float[Array, "B Hq T"] | None = None,
    *,
    sm_scale: float,
    alpha: float,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B Hq T D"], Float[Array, "B Hq T"]]:
    """Attention whose weights are alpha-entmax over the listed pages, causal.

    Args:
        q, pages, page_ids, query_positions, mask: as of
            :func:`pallas_kernels.page_attention.page_attention`.
        tau: if given, the threshold in units of z = (alpha - 1) * logits, float32:
            weights are max(z - tau, 0) ** (1 / (alpha - 1)) as they are, so that
            disjoint lists with the same threshold just add up.
        sm_scale: factor on the logits.
        alpha: above 1.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        `(out, value)` in float32, the value being
        :func:`pallas_kernels.entmax.entmax_attention`'s. A row that sees no key has out
        0 and value -inf. With `tau` the second is the mass, the sum of the weights, 0
        where there is no key.

    Raises:
        ValueError: if the shapes disagree, or unless alpha is a finite number above 1.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    page_lists.check(q, pages, page_ids, mask)
    check_alpha(alpha)
    if tau is not None and (tau.shape, tau.dtype) != (q.shape[:3], jnp.float32):
        raise ValueError(
            f"tau {tau.dtype}{tau.shape} must be float32 for the rows {q.shape[:3]}."
        )
    return dispatch(
        reference.page_entmax,
        _KERNELS,
        (q, pages, page_ids, query_positions, mask, tau),
        {"sm_scale": sm_scale, "alpha": float(alpha)},
        implementation=implementation,
        interpret=interpret,
    )
