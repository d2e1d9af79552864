"""The attention that each key received from a prompt's rows."""

from typing import Any, Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.page_scores.reference import check_reduce
from pallas_kernels.received_attention import reference
from pallas_kernels.shared.quantized import Rows

_KERNELS: dict[Implementation, str] = {
    "mosaic_tpu": "pallas_kernels.received_attention.mosaic_tpu"
}


def received_attention(
    q: Float[Array, "B Hq T D"],
    k: Float[Rows, "B Hkv S D"],
    lse: Float[Array, "B Hq T"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B h S"] | None = None,
    row_weights: Float[Array, "B T"] | None = None,
    *,
    sm_scale: float,
    group_reduce: Literal["none", "mean", "max"] = "none",
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "B H S"]:
    """The softmax weights of each key, summed over rows: a second pass over the keys.

    The first is :func:`pallas_kernels.decode_attention.decode_attention`, whose `lse`
    makes the weights exact; they never exist all at once.

    Args:
        q, k: rotated queries and keys; query head h reads KV head h // G.
        lse: of each row, over all the keys it sees.
        query_positions: position of each row; -1 is no row.
        key_positions: position each slot holds, -1 = empty. None means slot s holds
            position s; a leading 1 serves all rows.
        row_weights: factor of each row; None is 1.
        sm_scale: factor on the logits.
        group_reduce: of a row's weights over the query heads that share a KV head,
            before rows are added; H is Hq with "none", else Hkv.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        The sums in float32, 0 for a key that no row sees.

    Raises:
        ValueError: if the shapes disagree, or there is no such reduction.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    check_reduce(group_reduce)
    if q.shape[1] % k.shape[1] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"shapes disagree: q {q.shape}, k {k.shape}.")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse {lse.shape} must have a number for each row {q.shape}.")
    return dispatch(
        reference.received_attention,
        _KERNELS,
        (q, k, lse, query_positions, key_positions, row_weights),
        {"sm_scale": sm_scale, "group_reduce": group_reduce},
        implementation=implementation,
        interpret=interpret,
    )
