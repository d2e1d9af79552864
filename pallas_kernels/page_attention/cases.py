"""Problems of `page_attention`: see :mod:`pallas_kernels.shared.cases`."""

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.page_attention import Surrogate, page_attention
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
    context: int,
    page_size: int,
    *,
    tokens: int = 4096,
    batch: int = 1,
    heads: tuple[int, int] = (Q_HEADS, KV_HEADS),
    lists: int | None = None,
    rows: int = 1,
    head_dim: int = HEAD_DIM,
    dtype: Any = jnp.bfloat16,
    masked: bool = False,
    bits: tuple[Literal[8, 4], Literal[8, 4]] | None = None,
) -> tuple[Any, ...]:
    """Shapes up to the mask: lists of `tokens` of a cache of `context`.

    Keys and values are of `bits`, if given.
    """
    num_lists, listed = lists or heads[1], tokens // page_size
    pages = batch, heads[1], context // page_size, page_size, 2 * head_dim
    mask = array(batch, num_lists, listed, rows, dtype=jnp.bool_)
    return (
        array(batch, heads[0], rows, head_dim, dtype=dtype),
        stored(*pages, bits=bits, dtype=dtype) if bits else array(*pages, dtype=dtype),
        array(batch, num_lists, listed, dtype=jnp.int32),
        array(batch, rows, dtype=jnp.int32),
        mask if masked else None,
    )


def beside(q: Any, pages: Any, features: int) -> tuple[Any, Surrogate]:
    """Shapes of what other tokens gave, and of a surrogate of so many features."""
    single: Any = functools.partial(array, dtype=jnp.float32)
    heads = pages.shape[:2]
    surrogate = Surrogate(
        single(*heads, features, q.shape[3]),
        single(*heads, features),
        single(*q.shape[:3], features),
    )
    return (single(*q.shape), single(*q.shape[:3])), surrogate


def num_bytes(pages: Any, page_ids: Any) -> int:
    """Bytes of the listed pages: what must be read, once."""
    per_page = bytes_of(pages) // math.prod(pages.shape[:3])
    return math.prod(page_ids.shape) * per_page


def _case(context: int, page_size: int, **sizes: Any) -> Case:
    function = functools.partial(page_attention, sm_scale=0.1)
    return Case(function, arguments(context, page_size, **sizes))


def _completed(context: int, page_size: int, features: int, **sizes: Any) -> Case:
    """The problem of completion, whose weights are of two kinds."""
    function = functools.partial(page_attention, sm_scale=0.1, first_position=4)
    shapes = arguments(context, page_size, **sizes)
    q, pages = shapes[:2]
    return Case(function, (*shapes, *beside(q, pages, features)))


CASES = {
    "page_attention-P64-128K": _case(SHORT, 64),
    "page_attention-P64-1M": _case(LONG, 64, tokens=LONG // 16),
    "page_attention-P16-1M": _case(LONG, 16, tokens=LONG // 16),
    "page_attention-P128-1M": _case(LONG, 128, tokens=LONG // 16),
    "page_attention-P64-D64-128K": _case(SHORT, 64, head_dim=64),
    "page_attention-P64-f32-128K": _case(SHORT, 64, dtype=jnp.float32),
    # What RetroAttention asks for: the window's rows, each with pages of its own.
    "page_attention-P64-T8-mask-128K": _case(SHORT, 64, rows=8, masked=True),
    "page_attention-P16-T8-mask-128K": _case(SHORT, 16, rows=8, masked=True),
    "page_attention-P128-T16-mask-128K": _case(SHORT, 128, rows=16, masked=True),
    # What a model that repeats tokens asks for: the query heads of all K copies.
    "page_attention-K2-copies-P64-128K": _case(
        SHORT, 64, heads=(2 * Q_HEADS, KV_HEADS)
    ),
    "page_attention-K3-copies-P64-128K": _case(
        SHORT, 64, heads=(3 * Q_HEADS, KV_HEADS)
    ),
    "page_attention-K16-copies-P64-128K": _case(
        SHORT, 64, heads=(16 * Q_HEADS, KV_HEADS)
    ),
    # A segment of a prompt, in tiles of rows: what it chose, and itself.
    "page_attention-segment-P128-T512-128K": _case(SHORT, 128, tokens=2560, rows=512),
    "page_attention-surrogate-P64-128K": _completed(SHORT, 64, 16),
    "page_attention-int8-P64-128K": _case(SHORT, 64, bits=(8, 8)),
    "page_attention-int4-P64-128K": _case(SHORT, 64, bits=(4, 4)),
    "page_attention-int8-P128-1M": _case(LONG, 128, tokens=LONG // 16, bits=(8, 8)),
    "page_attention-K8V4-P128-128K": _case(SHORT, 128, bits=(8, 4)),
    "page_attention-int4-P128-1M": _case(LONG, 128, tokens=LONG // 16, bits=(4, 4)),
    "page_attention-K8V4-P16-T8-mask-128K": _case(
        SHORT, 16, rows=8, masked=True, bits=(8, 4)
    ),
    "page_attention-K8V4-surrogate-P64-128K": _completed(SHORT, 64, 16, bits=(8, 4)),
    # At the edges of what kernels say they support.
    "page_attention-P8-T4-D256-f32": _case(
        99 * 8,
        8,
        tokens=56,
        batch=2,
        heads=(5, 1),
        rows=4,
        head_dim=256,
        dtype=jnp.float32,
    ),
    "page_attention-K8V4-P32-T4-D256-f32": _case(
        99 * 32,
        32,
        tokens=224,
        batch=2,
        heads=(5, 1),
        rows=4,
        head_dim=256,
        dtype=jnp.float32,
        bits=(8, 4),
    ),
    "page_attention-int8-P96-T2-mask-D64-list-a-query-head": _case(
        9 * 96,
        96,
        tokens=288,
        batch=2,
        heads=(8, 2),
        lists=8,
        rows=2,
        head_dim=64,
        masked=True,
        bits=(8, 8),
    ),
    "page_attention-P24-D64-list-a-query-head": _case(
        9 * 24, 24, tokens=72, batch=2, heads=(8, 2), lists=8, rows=4, head_dim=64
    ),
    "page_attention-surrogate-of-five-P8-T2-D64": _completed(
        1024, 8, 5, tokens=64, rows=2, head_dim=64
    ),
    "page_attention-K8V4-P128-T8-D256": _case(
        SHORT, 128, batch=2, rows=8, head_dim=256, bits=(8, 4)
    ),
    "page_attention-int8-P256-D64-f16-list-a-query-head": _case(
        SHORT,
        256,
        heads=(8, 2),
        lists=8,
        head_dim=64,
        dtype=jnp.float16,
        bits=(8, 8),
    ),
    "page_attention-P8-T16-D256": _case(SHORT, 8, batch=2, rows=16, head_dim=256),
    "page_attention-P256-D64-f16-list-a-query-head": _case(
        SHORT, 256, heads=(8, 2), lists=8, head_dim=64, dtype=jnp.float16
    ),
}
