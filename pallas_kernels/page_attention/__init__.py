"""Softmax attention over a list of pages per KV head or per query head."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.page_attention import newest, reference
from pallas_kernels.shared import page_lists
from pallas_kernels.shared.quantized import Rows, WithNewest

_KERNELS: dict[Implementation, str] = {
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
    pages: Float[Rows, "B Hkv NP P D2"],
    page_ids: Int[Array, "B H K"],
    query_positions: Int[Array, "B T"],
    mask: Bool[Array, "B H K T"] | None = None,
    initial: tuple[Float[Array, "B Hq T D"], Float[Array, "B Hq T"]] | None = None,
    surrogate: Surrogate | None = None,
    *,
    sm_scale: float,
    first_position: int = 0,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Softmax attention over the listed pages, causal by position.

    Args:
        q: rotated queries; query head h reads KV head h // G.
        pages: keys and values fused along the last axis (D2 = 2 D); page p holds the
            positions p * P ... p * P + P - 1.
        page_ids: distinct pages to read, -1 = none, anywhere; H is Hkv or Hq. Values
            of a listed page that no row sees must be finite.
        query_positions: position of each query row.
        mask: if given, a row sees those of the listed pages where it is True.
        initial: if given, `(out, lse)` in float32 of attention over other tokens, from
            which the softmax starts: the results are of the union. A row that saw none
            has lse -inf and a finite out.
        surrogate: if given, other weights of the same tokens, from the same read: what
            linear attention gave them, to be taken out of its sums.
        sm_scale: factor on the logits.
        first_position: tokens before it are not seen.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        `(out, lse)` in float32. A row that sees no key has out 0 and lse -inf. With a
        surrogate two more: `(B, Hq, T, D)`, the listed values summed by its weights,
        and `(B, Hq, T)`, those weights' sum. Neither has anything of `initial` in it.

    Raises:
        ValueError: if the shapes disagree.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    page_lists.check(q, pages, page_ids, mask)
    if initial is not None:
        # As the results are.
        wide = "float64" if q.dtype == jnp.float64 else "float32"
        _check_rows("initial", initial, (q.shape, q.shape[:3]), wide)
    if surrogate is not None:
        features = surrogate.shift.shape[2:]
        heads = pages.shape[:2]
        shapes = (*heads, *features, q.shape[3]), (*heads, *features)
        _check_rows("surrogate", surrogate, (*shapes, (*q.shape[:3], *features)))
    if isinstance(pages, WithNewest):
        if surrogate is not None:
            raise NotImplementedError(
                "a surrogate of pages with the newest tokens beside them: use none."
            )
        how = {"implementation": implementation, "interpret": interpret}
        return newest.page_attention(
            functools.partial(page_attention, **how),
            q,
            pages,
            page_ids,
            query_positions,
            mask,
            initial,
            sm_scale=sm_scale,
            first_position=int(first_position),
        )
    return dispatch(
        reference.page_attention,
        _KERNELS,
        (q, pages, page_ids, query_positions, mask, initial, surrogate),
        {"sm_scale": sm_scale, "first_position": int(first_position)},
        implementation=implementation,
        interpret=interpret,
    )


def _check_rows(name, arrays, shapes, dtype="float32"):
    actual = [f"{x.dtype}{x.shape}" for x in arrays]
    expected = [f"{dtype}{tuple(shape)}" for shape in shapes]
    if actual != expected:
        raise ValueError(f"{name} {actual} must be {expected}.")
