"""Attention of a few query rows against a contiguous cache, with its log-sum-exp."""

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import newest, reference
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.shared.quantized import Rows, WithNewest, turned

_KERNELS: dict[Implementation, str] = {
    "mosaic_tpu": "pallas_kernels.decode_attention.mosaic_tpu",
    "mosaic_gpu": "pallas_kernels.decode_attention.mosaic_gpu",
    "triton": "pallas_kernels.decode_attention.triton",
}


def decode_attention(
    q: Float[Array, "B Hq T D"],
    k: Float[Rows, "B Hkv S D"],
    v: Float[Rows, "B Hkv S D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B H S"] | None = None,
    *,
    sm_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    with_logits: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "..."], ...]:
    """Softmax attention; key s is visible to row t iff 0 <= key position <= its own.

    Args:
        q, k, v: rotated queries and keys, values; query head h reads KV head h // G.
        query_positions: position of each query row.
        key_positions: position each slot holds, -1 = empty; H is Hkv or 1. None means
            slot s holds position s; a leading 1 serves all rows. Values in slots that
            no row sees must be finite.
        sm_scale: factor on the logits.
        window: if given, keys `window` or more positions back are not visible either.
        soft_cap: if given, logits become `soft_cap * tanh(logits / soft_cap)`.
        with_logits: return them too, for methods that score tokens by the attention
            they receive: `exp(logits - lse)` is the weight of a key.
        implementation, interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        `(out, lse)`, `(B, Hq, T, D)` and `(B, Hq, T)` in float32, and with logits also
        these, `(B, Hq, T, S)`, -inf where a row does not see the key. A row that sees
        no key has out 0 and lse -inf.

    Raises:
        ValueError: if the shapes disagree, or one of k and v alone has the newest
            tokens beside it, or the cap or the window is not positive.
        NotImplementedError: if the kernel asked for by name cannot.
    """
    _check(q, k, v)
    for name, bound in (("soft_cap", soft_cap), ("window", window)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{name}={bound} must be positive, or None.")
    if isinstance(k, WithNewest) and isinstance(v, WithNewest):
        how = {"implementation": implementation, "interpret": interpret}
        return newest.decode_attention(
            functools.partial(decode_attention, **how),
            q,
            k,
            v,
            query_positions,
            key_positions,
            sm_scale=sm_scale,
            window=window,
            soft_cap=soft_cap,
            with_logits=with_logits,
        )
    return dispatch(
        reference.decode_attention,
        _KERNELS,
        (q, k, v, query_positions, key_positions),
        {
            "sm_scale": sm_scale,
            "window": window,
            "soft_cap": soft_cap,
            "with_logits": with_logits,
        },
        implementation=implementation,
        interpret=interpret,
    )


def decode_logits(
    q: Float[Array, "B Hq T D"],
    k: Float[Rows, "B Hkv S D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B H S"] | None = None,
    *,
    sm_scale: float,
) -> Float[Array, "B Hq T S"]:
    """Scaled logits in float32, -inf where :func:`decode_attention` sees no key."""
    _check(q, k, k)
    if isinstance(k, WithNewest):
        return newest.decode_logits(
            q, k, query_positions, key_positions, sm_scale=sm_scale
        )
    return reference.decode_logits(
        q, k, query_positions, key_positions, sm_scale=sm_scale
    )


def streamed_attention(
    q: Float[Array, "B Hq T D"],
    take: Callable[[Any, int], tuple[Rows, Rows]],
    slots: int,
    query_positions: Int[Array, "B T"],
    *,
    sm_scale: float,
) -> tuple[Float[Array, "B Hq T D"], Float[Array, "B Hq T"]]:
    """Attends causally to keys and values that come in blocks, each of them once.

    As :func:`decode_attention` through XLA, to the last bit where that goes by blocks
    too: of more than 64 rows a KV head, or quantised ones, or where one block has all.
    No temporary grows with the cache.

    Args:
        q, query_positions, sm_scale: as there.
        take: `take(start, size)` of keys and values in slots `[start, start + size)`,
            each `(B, Hkv, size, D)`; the start may be traced.
        slots: slot s holds position s.

    Returns:
        `(out, lse)`, `(B, Hq, T, D)` and `(B, Hq, T)` in float32.
    """
    return reference.streamed_attention(
        q, take, slots, query_positions, sm_scale=sm_scale
    )


def weighted_values(
    weights: Float[Array, "B Hkv R S"], v: Float[Rows, "B Hkv S D"]
) -> Float[Array, "B Hkv R D"]:
    """Sums values by weights, in float32; a value whose weight is 0 must be finite."""
    return turned(v, reference.weighted_values(weights, v))


def _check(q, k, v):
    if isinstance(k, WithNewest) != isinstance(v, WithNewest):
        kinds = [type(x).__name__ for x in (k, v)]
        raise ValueError(
            f"k and v are {' and '.join(kinds)}: both must have the newest tokens "
            "beside them, or neither."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads {q.shape[1]} must be a multiple of KV heads {k.shape[1]}."
        )
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"shapes disagree: q {q.shape}, k {k.shape}, v {v.shape}.")
