"""The problems of every operation, and what a TPU's schedule of them is held to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.decode_attention import cases as decode_attention
from pallas_kernels.entmax import cases as entmax
from pallas_kernels.page_attention import cases as page_attention
from pallas_kernels.page_entmax import cases as page_entmax
from pallas_kernels.page_scores import cases as page_scores
from pallas_kernels.received_attention import cases as received_attention
from pallas_kernels.shared import cases, tpu_rows
from pallas_kernels.shared.cases import HEAD_DIM
from pallas_kernels.topk import cases as topk

PROBLEMS: dict[str, cases.Case] = {
    **decode_attention.CASES,
    **page_attention.CASES,
    **page_entmax.CASES,
    **page_scores.CASES,
    **received_attention.CASES,
    **topk.CASES,
    **entmax.CASES,
}


class Case(NamedTuple):
    """One compilation."""

    function: Callable
    arguments: tuple[Any, ...]
    kernel: str  # the name its Pallas call carries
    loop: int  # which of its loops streams from HBM, in order of address
    block_bytes: int  # moved by a whole iteration of it
    temp_limit: int = 1 << 20  # bytes: far below any cache
    bars: tuple[str, ...] = ()  # where its bundles must not exceed the HBM's cycles


def _case(name, kernel, loop, block_bytes, **more):
    function, arguments = PROBLEMS[name]
    function = functools.partial(function, implementation="mosaic_tpu")
    return Case(function, arguments, kernel, loop, block_bytes, **more)


def _tile(name, copies):
    """Bytes of the tile that rows of scores on chip are taken by."""
    (scores,) = PROBLEMS[name].arguments
    tiles = tpu_rows.tiles(scores.shape[-1], copies)
    return tiles.rows * tiles.lines * tpu_rows.LANES * 4


BOTH = ("v5e", "v6e")
KEY = HEAD_DIM * 2  # bytes
BLOCK = 512 * 2 * KEY  # of keys and values
_CASES = (
    # (name, kernel, loop, bytes of a block, what else is not the default)
    ("page_attention-P64-128K", "page_attention", 2, BLOCK, {"bars": BOTH}),
    ("page_attention-P128-1M", "page_attention", 2, BLOCK, {"bars": BOTH}),
    ("page_attention-P64-D64-128K", "page_attention", 2, BLOCK, {"bars": ("v5e",)}),
    # The keys stream by first, and values of the support alone follow. On v6e it takes
    # one bundle more than the bar.
    ("page_entmax-P64-128K", "page_entmax", 2, BLOCK // 2, {"bars": ("v5e",)}),
    (
        "page_attention-surrogate-P64-128K",
        "page_attention",
        2,
        BLOCK,
        {"bars": ("v5e",)},
    ),
    # No bar: where every page is cut by a mask, its copies are waited for one by one.
    ("page_attention-P64-T8-mask-128K", "page_attention", 3, BLOCK, {}),
    # No bar: arithmetic, of 256 rows of a KV head with each block.
    ("page_attention-segment-P128-T512-128K", "page_attention", 2, BLOCK, {}),
    ("decode_attention-1M", "decode_attention", 2, BLOCK, {"bars": BOTH}),
    # Every block is masked.
    ("decode_attention-T4-window-128K", "decode_attention", 3, BLOCK, {"bars": BOTH}),
    ("decode_attention-ring-4K", "decode_attention", 3, BLOCK, {"bars": BOTH}),
    ("decode_attention-logits-128K", "decode_attention", 2, BLOCK, {"bars": BOTH}),
    (
        "decode_attention-prompt-T1024-128K",
        "decode_attention",
        2,
        BLOCK,
        {"temp_limit": 64 << 20},
    ),
    # Codes, twice as many tokens a block: within the time that floats of as many take,
    # but for 4 bits in pages of 64 on v6e, which take longer.
    ("page_attention-int8-P64-128K", "page_attention", 2, 2 * BLOCK, {"bars": BOTH}),
    (
        "page_attention-int4-P64-128K",
        "page_attention",
        2,
        2 * BLOCK,
        {"bars": ("v5e",)},
    ),
    ("page_attention-K8V4-P128-128K", "page_attention", 2, 2 * BLOCK, {"bars": BOTH}),
    ("page_attention-int8-P128-1M", "page_attention", 2, 2 * BLOCK, {"bars": BOTH}),
    ("page_attention-int4-P128-1M", "page_attention", 2, 2 * BLOCK, {"bars": BOTH}),
    ("decode_attention-int8-1M", "decode_attention", 2, 2 * BLOCK, {"bars": BOTH}),
    ("decode_attention-K8V4-1M", "decode_attention", 2, 2 * BLOCK, {"bars": BOTH}),
    ("decode_attention-int4-1M", "decode_attention", 2, 2 * BLOCK, {"bars": BOTH}),
    ("page_bounds-P16-1M", "page_bounds", 0, 2 * BLOCK, {"bars": BOTH}),
    ("page_bounds-mean-P64-128K", "page_bounds", 0, 2 * BLOCK, {"bars": BOTH}),
    ("page_moments-P16-1M", "page_moments", 0, 2 * BLOCK, {"bars": BOTH}),
    # No bar: arithmetic, of 256 rows of 4 heads with 512 keys.
    (
        "received_attention-T1024-128K",
        "received_attention",
        0,
        BLOCK // 2,
        {"temp_limit": 2 << 20},
    ),
    # No bars: what counts is how many passes there are, over scores that stay on chip.
    # The pass that fixes a bit; 32 of them see every tile.
    ("top_k-2048-of-64K", "top_k", 3, _tile("top_k-2048-of-64K", 3), {}),
    ("top_k-8192-of-1M", "top_k", 3, _tile("top_k-8192-of-1M", 3), {}),
    # A step of Newton's method; each sees every tile.
    ("entmax-1.5-128K", "entmax_solve", 2, _tile("entmax-1.5-128K", 2), {}),
)
CASES = {
    name: _case(name, kernel, loop, block_bytes, **more)
    for name, kernel, loop, block_bytes, more in _CASES
}
# Compiled only, elsewhere.
SMOKE = ("page_attention-P64-128K",)

# At the edges of what the kernels say they support: compiled only.
EDGES = {
    name: _case(name, "", 0, 0)
    for name in (
        "page_attention-P8-T4-D256-f32",
        "page_attention-P24-D64-list-a-query-head",
        "page_attention-K3-copies-P64-128K",
        "decode_attention-K16-copies-128K",
        "page_entmax-tau-P24-T4-D64",
        "page_attention-surrogate-of-five-P8-T2-D64",
        "page_attention-K8V4-P32-T4-D256-f32",
        "page_attention-int8-P96-T2-mask-D64-list-a-query-head",
        "decode_attention-T4-ring-below-a-block",
        "decode_attention-T4-rows-and-a-rest-D256-f32",
        "decode_attention-K8V4-T4-ring-logits-D64",
        "decode_attention-int4-T4-and-a-rest-D256-f32",
        "page_bounds-of-five",
    )
}
