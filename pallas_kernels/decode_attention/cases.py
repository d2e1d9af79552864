"""Problems of `decode_attention`: see :mod:`pallas_kernels.shared.cases`."""

import functools
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shared.cases import (
    HEAD_DIM,
    KV_HEADS,
    LONG,
    Q_HEADS,
    SHORT,
    Case,
    array,
    bytes_of,
    stored,
)


def arguments(
    slots: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (Q_HEADS, KV_HEADS),
    rows: int = 1,
    head_dim: int = HEAD_DIM,
    dtype: Any = jnp.bfloat16,
    held: tuple[int, int] | None = None,
    bits: tuple[Literal[8, 4], Literal[8, 4]] | None = None,
) -> tuple[Any, ...]:
    """Shapes of the arrays; `held` are batch and heads of the slots' positions.

    Keys and values are of `bits`, if given.
    """
    shape = batch, heads[1], slots, head_dim
    kept = (array(*shape, dtype=dtype),) * 2
    if bits is not None:
        kept = tuple(stored(*shape, bits=(b,), dtype=dtype) for b in bits)
    return (
        array(batch, heads[0], rows, head_dim, dtype=dtype),
        *kept,
        array(batch, rows, dtype=jnp.int32),
        None if held is None else array(*held, slots, dtype=jnp.int32),
    )


def num_bytes(k: Any, v: Any) -> int:
    """Bytes of the keys and values: what must be read, once."""
    return bytes_of(k, v)


def _case(slots: int, *, static: Any = None, **sizes: Any) -> Case:
    function = functools.partial(decode_attention, sm_scale=0.1, **static or {})
    return Case(function, arguments(slots, **sizes))


CASES = {
    "decode_attention-1M": _case(LONG),
    "decode_attention-T4-window-128K": _case(
        SHORT + 8, rows=4, static={"window": 4096}
    ),
    "decode_attention-T4-window-cap-128K": _case(
        SHORT + 8, rows=4, static={"window": 4096, "soft_cap": 50.0}
    ),
    "decode_attention-ring-4K": _case(4096 + 64, held=(1, KV_HEADS)),
    "decode_attention-logits-128K": _case(SHORT, static={"with_logits": True}),
    # What a model that repeats tokens asks for: the query heads of all K copies.
    "decode_attention-K3-copies-128K": _case(SHORT, heads=(3 * Q_HEADS, KV_HEADS)),
    "decode_attention-K16-copies-128K": _case(SHORT, heads=(16 * Q_HEADS, KV_HEADS)),
    "decode_attention-prompt-T1024-128K": _case(SHORT, rows=1024),
    "decode_attention-K8V4-1M": _case(LONG, bits=(8, 4)),
    "decode_attention-int8-1M": _case(LONG, bits=(8, 8)),
    "decode_attention-int4-1M": _case(LONG, bits=(4, 4)),
    "decode_attention-int4-T4-window-cap-128K": _case(
        SHORT + 8,
        rows=4,
        bits=(4, 4),
        static={"window": 4096, "soft_cap": 50.0},
    ),
    "decode_attention-int8-ring-logits-64K": _case(
        SHORT // 2, held=(1, KV_HEADS), bits=(8, 8), static={"with_logits": True}
    ),
    # At the edges of what kernels say they support.
    "decode_attention-T4-ring-below-a-block": _case(
        24, batch=2, heads=(8, 8), rows=4, held=(1, 8), static={"window": 9}
    ),
    "decode_attention-K8V4-T4-ring-logits-D64": _case(
        256,
        batch=2,
        heads=(8, 8),
        rows=4,
        head_dim=64,
        held=(1, 8),
        bits=(8, 4),
        static={"window": 9, "with_logits": True},
    ),
    "decode_attention-int4-T4-and-a-rest-D256-f32": _case(
        1152,
        batch=2,
        heads=(8, 1),
        rows=4,
        head_dim=256,
        dtype=jnp.float32,
        bits=(4, 4),
        static={"window": 9},
    ),
    "decode_attention-T4-rows-and-a-rest-D256-f32": _case(
        1032,
        batch=2,
        heads=(32, 1),
        rows=4,
        head_dim=256,
        dtype=jnp.float32,
        static={"window": 9},
    ),
}
