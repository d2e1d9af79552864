"""Attention over a list of pages per KV head or per query head."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.entmax import check_alpha
from pallas_kernels.page_attention import reference

_KERNELS = {
    "mosaic_tpu": "pallas_kernels.page_attention.mosaic_tpu",
    "mosaic_gpu": "pallas_kernels.page_attention.mosaic_gpu",
    "triton": "pallas_kernels.page_attention.triton",
}


class Surrogate(NamedTuple):
    """Weights of linear attention, of positive features that are exp of a product.

    A token of key k weighs `sum_f shares[f] * exp(directions[f] . k - shift[f])`, which
    is computed in float32 in full precision, whatever the pages hold.
    """

    directions: Float[Array, "B Hkv F D"]  # float32
    shift: Float[Array, "B Hkv F"]
    shares: Float[Array, "B Hq T F"]


def page_attention(
    q: Float[Array, "B Hq T D"],
    pages: Float[Array, "B Hkv NP P D2"],
    page_ids: Int[Array, "B H K"],
    query_positions: Int[Array, "B T"],
    mask: Bool[Array, "B H K T"] | None = None,
    tau: Float[Array, "B Hq T"] | None = None,
    initial: tuple[Float[Array, "B Hq T D"], Float[Array, "B Hq T"]] | None = None,
    surrogate: Surrogate | None = None,
    *,
    sm_scale: float,
    alpha: float = 1.0,
    first_position: int = 0,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Attention over the listed pages, causal by position.

    Args:
        q: rotated queries; query head h reads KV head h // G.
        pages: keys and values fused along the last axis (D2 = 2 D); page p holds the
            positions p * P ... p * P + P - 1.
        page_ids: distinct pages to read, -1 = none, anywhere; H is Hkv or Hq. Values
            of a listed page that no row sees must be finite.
        query_positions: position of each query row.
        mask: if given, a row sees those of the listed pages where it is True.
        tau: if given, with alpha above 1, the threshold in units of z = (alpha - 1) *
            logits, float32: weights are max(z - tau, 0) ** (1 / (alpha - 1)) as they
            are, so that disjoint lists with the same threshold just add up.
        initial: if given, with alpha 1, `(out, lse)` in float32 of attention over other
            tokens, from which the softmax starts: the results are of the union. A row
            that saw none has lse -inf and a finite out.
        surrogate: if given, with alpha 1, other weights of the same tokens, from the
            same read: what linear attention gave them, to be taken out of its sums.
        sm_scale: factor on the logits.
        alpha: above 1 the weights are alpha-entmax over the listed pages instead.
        first_position: tokens before it are not seen; with alpha 1.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        `(out, lse)` in float32. A row that sees no key has out 0 and lse -inf. Under
        entmax the second is :func:`pallas_kernels.entmax.entmax_attention`'s value;
        with `tau` it is the mass, the sum of the weights, 0 where there is no key. With
        a surrogate two more: `(B, Hq, T, D)`, the listed values summed by its weights,
        and `(B, Hq, T)`, those weights' sum. Neither has anything of `initial` in it.

    Raises:
        ValueError: if the shapes disagree, alpha is below 1, there is a `tau` without
            entmax, or what is of softmax alone with it.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    if pages.shape[4] != 2 * q.shape[3]:
        raise ValueError(
            f"pages {pages.shape} must hold keys and values of q {q.shape}: "
            f"{pages.shape[4]=} must be 2 * {q.shape[3]}."
        )
    if page_ids.shape[1] not in (pages.shape[1], q.shape[1]):
        raise ValueError(
            f"page_ids {page_ids.shape} must list pages for {pages.shape[1]} KV heads "
            f"or {q.shape[1]} query heads."
        )
    if mask is not None and mask.shape != (*page_ids.shape, q.shape[2]):
        raise ValueError(
            f"mask {mask.shape} must have a flag for each of page_ids "
            f"{page_ids.shape} and of the {q.shape[2]} query rows."
        )
    if alpha != 1:
        check_alpha(alpha)
    if tau is not None and alpha == 1:
        raise ValueError(f"tau is a threshold of entmax: {alpha=} must be above 1.")
    if tau is not None and (tau.shape, tau.dtype) != (q.shape[:3], jnp.float32):
        raise ValueError(
            f"tau {tau.dtype}{tau.shape} must be float32 for the rows {q.shape[:3]}."
        )
    if alpha != 1 and (first_position or initial or surrogate):
        raise ValueError(
            f"initial, surrogate and first_position are of softmax: {alpha=} must be 1."
        )
    if initial is not None:
        # As the results are.
        wide = "float64" if q.dtype == jnp.float64 else "float32"
        _check_rows("initial", initial, (q.shape, q.shape[:3]), wide)
    if surrogate is not None:
        features = surrogate.shift.shape[2:]
        heads = pages.shape[:2]
        shapes = (*heads, *features, q.shape[3]), (*heads, *features)
        _check_rows("surrogate", surrogate, (*shapes, (*q.shape[:3], *features)))
    return dispatch(
        reference.page_attention,
        _KERNELS,
        (q, pages, page_ids, query_positions, mask, tau, initial, surrogate),
        {
            "sm_scale": sm_scale,
            "alpha": float(alpha),
            "first_position": int(first_position),
        },
        implementation=implementation,
        interpret=interpret,
    )


def _check_rows(name, arrays, shapes, dtype="float32"):
    found = [f"{x.dtype}{x.shape}" for x in arrays]
    wanted = [f"{dtype}{tuple(shape)}" for shape in shapes]
    if found != wanted:
        raise ValueError(f"{name} {found} must be {wanted}.")
