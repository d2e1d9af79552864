"""What is compiled for TPUs that are not there: every operation, at its sizes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from aot import shapes
from aot.shapes import GROUP, HEAD_DIM, KV_HEADS, LONG, SHORT
from aot.shapes import array as _array

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.entmax import solve
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_scores import page_bounds, page_moments
from pallas_kernels.received_attention import received_attention
from pallas_kernels.shared import tpu_rows
from pallas_kernels.topk import top_k


class Case(NamedTuple):
    """One compilation."""

    function: Callable
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    kernel: str  # the name its Pallas call carries
    loop: int  # which of its loops streams from HBM, in order of address
    block_bytes: int  # moved by a whole iteration of it
    temp_limit: int = 1 << 20  # bytes: far below any cache
    bars: tuple[str, ...] = ()  # where its bundles must not exceed the HBM's cycles


def _pages(
    context,
    page_size,
    *,
    head_dim=HEAD_DIM,
    tokens=4096,
    block=512,
    rows=1,
    masked=False,
    alpha=1.0,
    **more,
):
    kernel = functools.partial(
        page_attention, sm_scale=0.1, alpha=alpha, implementation="mosaic_tpu"
    )
    arguments = shapes.pages(
        context,
        page_size,
        tokens=tokens,
        rows=rows,
        head_dim=head_dim,
        masked=masked,
    )
    # Under entmax the keys stream by first, and values of the support alone follow.
    block_bytes = block * head_dim * 2 * (2 if alpha == 1 else 1)
    loop = 3 if masked else 2
    return Case(kernel, arguments, "page_attention", loop, block_bytes, **more)


def _decode(context, *, rows=1, window=None, held=False, logits=False, **more):
    kernel = functools.partial(
        decode_attention,
        sm_scale=0.1,
        window=window,
        with_logits=logits,
        implementation="mosaic_tpu",
    )
    arguments = shapes.cache(context, rows=rows, held=held)
    block_bytes = 512 * 2 * HEAD_DIM * 2
    loop = 3 if held or window else 2  # where every block is masked
    return Case(kernel, arguments, "decode_attention", loop, block_bytes, **more)


def _scores(score, context, page_size, *, static=None, **more):
    kernel = functools.partial(score, implementation="mosaic_tpu", **static or {})
    arguments = shapes.statistics(context, page_size)
    block_bytes = 1024 * 2 * HEAD_DIM * 2
    return Case(kernel, arguments, score.__name__, 0, block_bytes, **more)


def _received(context, rows, **more):
    kernel = functools.partial(
        received_attention,
        sm_scale=0.1,
        group_reduce="max",
        implementation="mosaic_tpu",
    )
    arguments = (
        _array(1, KV_HEADS * GROUP, rows, HEAD_DIM),
        _array(1, KV_HEADS, context, HEAD_DIM),
        _array(1, KV_HEADS * GROUP, rows, dtype=jnp.float32),
        _array(1, rows, dtype=jnp.int32),
    )
    block_bytes = 512 * HEAD_DIM * 2
    return Case(kernel, arguments, "received_attention", 0, block_bytes, **more)


def _top_k(num_scores, k, **more):
    """The pass that fixes a bit; 32 of them see every tile."""
    kernel = functools.partial(top_k, k=k, order="index", implementation="mosaic_tpu")
    arguments = shapes.scores(num_scores, KV_HEADS)
    return _over_rows(kernel, arguments, "top_k", 3, num_scores, 3, **more)


def _entmax(num_scores, **more):
    """A step of Newton's method; each sees every tile."""
    kernel = functools.partial(solve, alpha=1.5, implementation="mosaic_tpu")
    arguments = shapes.scores(num_scores, shapes.Q_HEADS)
    return _over_rows(kernel, arguments, "entmax_solve", 2, num_scores, 2, **more)


def _over_rows(kernel, arguments, name, loop, num_scores, copies, **more):
    tiles = tpu_rows.tiles(num_scores, copies)
    block_bytes = tiles.rows * tiles.lines * tpu_rows.LANES * 4
    return Case(kernel, arguments, name, loop, block_bytes, **more)


BOTH = ("v5e", "v6e")
CASES = {
    "page_attention-P64-128K": _pages(SHORT, 64, bars=BOTH),
    "page_attention-P128-1M": _pages(LONG, 128, tokens=LONG // 16, bars=BOTH),
    "page_attention-P64-D64-128K": _pages(
        SHORT, 64, head_dim=64, block=1024, bars=("v5e",)
    ),
    "page_attention-entmax-P64-128K": _pages(SHORT, 64, alpha=1.5, bars=BOTH),
    # What RetroAttention asks for: the window's rows, each with pages of its own.
    # No bar: where every page is cut by a mask, its copies are waited for one by one.
    "page_attention-P64-T8-mask-128K": _pages(SHORT, 64, rows=8, masked=True),
    "decode_attention-1M": _decode(LONG, bars=BOTH),
    "decode_attention-T4-window-128K": _decode(
        SHORT + 8, rows=4, window=4096, bars=BOTH
    ),
    "decode_attention-ring-4K": _decode(4096 + 64, held=True, bars=BOTH),
    "decode_attention-logits-128K": _decode(SHORT, logits=True, bars=BOTH),
    "decode_attention-prompt-T1024-128K": _decode(
        SHORT, rows=1024, temp_limit=64 << 20
    ),
    "page_bounds-P16-1M": _scores(page_bounds, LONG, 16, bars=BOTH),
    "page_bounds-mean-P64-128K": _scores(
        page_bounds, SHORT, 64, static={"group_reduce": "mean"}, bars=BOTH
    ),
    "page_moments-P16-1M": _scores(page_moments, LONG, 16, bars=BOTH),
    # No bar: arithmetic, of 256 rows of 4 heads with 512 keys.
    "received_attention-T1024-128K": _received(SHORT, 1024, temp_limit=2 << 20),
    # No bars: what counts is how many passes there are, over scores that stay on chip.
    "top_k-2048-of-64K": _top_k(LONG // 16, 2048),
    "top_k-8192-of-1M": _top_k(LONG, 8192),
    "entmax-128K": _entmax(SHORT),
}
# Compiled only, elsewhere.
SMOKE = ("page_attention-P64-128K",)


def _edges():
    """At the edges of what the kernels say they support; `(function, arguments)`."""
    single, index = jnp.float32, jnp.int32
    position = _array(2, 4, dtype=index)
    pages = functools.partial(page_attention, sm_scale=0.1, implementation="mosaic_tpu")
    decode = functools.partial(
        decode_attention, sm_scale=0.1, window=9, implementation="mosaic_tpu"
    )
    bounds = functools.partial(page_bounds, implementation="mosaic_tpu")
    cache = _array(2, 8, 24, 128)
    odd = _array(2, 1, 1032, 256, dtype=single)
    few = _array(2, 8, 5, 128)
    return {
        "pages-of-8": (
            pages,
            _array(2, 5, 4, 256, dtype=single),
            _array(2, 1, 99, 8, 512, dtype=single),
            _array(2, 1, 7, dtype=index),
            position,
        ),
        "a-list-for-each-query-head": (
            pages,
            _array(2, 8, 4, 64),
            _array(2, 2, 9, 24, 128),
            _array(2, 8, 3, dtype=index),
            position,
        ),
        "entmax-with-a-threshold": (
            functools.partial(pages, alpha=1.7),
            _array(2, 8, 4, 64),
            _array(2, 2, 9, 24, 128),
            _array(2, 2, 3, dtype=index),
            position,
            None,
            _array(2, 8, 4, dtype=single),
        ),
        # What completion asks for. No record: of its rotated loop, `loops` sees half.
        "a-surrogate": (
            functools.partial(pages, first_position=4),
            *shapes.pages(SHORT, 64, features=16),
        ),
        "a-surrogate-of-five-features": (
            functools.partial(pages, first_position=4),
            *shapes.pages(1024, 8, tokens=64, head_dim=64, rows=2, features=5),
        ),
        "a-ring-below-a-block": (
            decode,
            _array(2, 8, 4, 128),
            cache,
            cache,
            position,
            _array(1, 8, 24, dtype=index),
        ),
        "many-rows-and-a-rest": (
            decode,
            _array(2, 32, 4, 256, dtype=single),
            odd,
            odd,
            position,
        ),
        "few-pages": (bounds, _array(2, 8, 128), few, few),
    }


EDGES = {
    name: Case(function, arguments, "", 0, 0)
    for name, (function, *arguments) in _edges().items()
}
