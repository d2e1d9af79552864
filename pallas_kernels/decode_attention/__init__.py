"""Attention of a few query rows against a contiguous cache, with its log-sum-exp."""

from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import reference


def decode_attention(
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv S D"],
    v: Float[Array, "B Hkv S D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B H S"] | None = None,
    *,
    sm_scale: float,
) -> tuple[Float[Array, "B Hq T D"], Float[Array, "B Hq T"]]:
    """Softmax attention; key s is visible to row t iff 0 <= key position <= its own.

    Args:
        q, k, v: rotated queries and keys, values; query head h reads KV head h // G.
        query_positions: position of each query row.
        key_positions: position each slot holds, -1 = empty; H is Hkv or 1. None means
            slot s holds position s. Values in slots that no row sees must be finite.
        sm_scale: factor on the logits.

    Returns:
        `(out, lse)` in float32. A row that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: if the shapes disagree.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads {q.shape[1]} must be a multiple of KV heads {k.shape[1]}."
        )
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"shapes disagree: q {q.shape}, k {k.shape}, v {v.shape}.")
    return reference.decode_attention(
        q, k, v, query_positions, key_positions, sm_scale=sm_scale
    )
