"""`page_scores` on TPU: matmuls over the statistics of the keys as they stream by.

Grid: batch rows, KV heads, blocks of pages; Pallas' own pipeline copies the blocks. All
query heads of a group share one read. Bytes a step: `block_pages * 2 * D * itemsize`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import device_kind
from pallas_kernels.page_scores import tuning
from pallas_kernels.page_scores.reference import REDUCE, squares
from pallas_kernels.shared.tpu_blocks import LANES, dot

MAX_ROWS = 128  # query heads a KV head


def unsupported(q, first, second, **static) -> str | None:
    """Says why the kernels cannot, from shapes and dtypes; None if they can."""
    del static
    dtypes = {q.dtype, first.dtype, second.dtype}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"dtypes {names} must be all bfloat16 or all float32"
    if q.shape[2] % LANES:  # as in decode_attention: XLA would copy the statistics
        return f"D={q.shape[2]} must be a multiple of {LANES}"
    if q.shape[1] > MAX_ROWS * first.shape[1]:
        return f"{q.shape[1]} query heads must be at most {MAX_ROWS} a KV head"
    return None


def page_bounds(q, page_min, page_max, *, group_reduce, interpret=False, config=None):
    """See :func:`pallas_kernels.page_scores.page_bounds`."""
    kernel = functools.partial(_bounds, group_reduce=group_reduce)
    heads = q.shape[1] if group_reduce == "none" else page_min.shape[1]
    (bounds,) = _over_pages(
        kernel, "page_bounds", q, page_min, page_max, (heads,), interpret, config
    )
    return bounds


def page_moments(q, page_mean, page_variance, *, interpret=False, config=None):
    """See :func:`pallas_kernels.page_scores.page_moments`."""
    heads = (q.shape[1],) * 2
    return _over_pages(
        _moments, "page_moments", q, page_mean, page_variance, heads, interpret, config
    )


def _over_pages(kernel, name, q, first, second, out_heads, interpret, config):
    """Scores `(B, H, NP)`, an array of them for each number H of heads."""
    batch, num_q_heads, head_dim = q.shape
    heads, num_pages = first.shape[1:3]
    group = num_q_heads // heads
    if config is None:
        config = tuning.lookup(device_kind(), str(first.dtype), head_dim)
    block = min(config.block_pages, num_pages)
    statistics = pl.BlockSpec(
        (None, None, block, head_dim), lambda b, h, i: (b, h, i, 0)
    )
    outputs = pl.pallas_call(
        kernel,
        grid=(batch, heads, pl.cdiv(num_pages, block)),
        in_specs=[
            pl.BlockSpec((None, None, group, head_dim), lambda b, h, i: (b, h, 0, 0)),
            statistics,
            statistics,
        ],
        out_specs=[
            pl.BlockSpec((None, None, n // heads, block), lambda b, h, i: (b, h, 0, i))
            for n in out_heads
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, n // heads, num_pages), jnp.float32)
            for n in out_heads
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * num_q_heads * num_pages * head_dim,
            bytes_accessed=2 * first.size * first.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(q.reshape(batch, heads, group, head_dim), first, second)
    return tuple(
        x.reshape(batch, n, num_pages) for x, n in zip(outputs, out_heads, strict=True)
    )


def _bounds(
    # in
    q_ref,  # (G, D)
    page_min,  # (block, D)
    page_max,  # (block, D)
    # out
    bounds,  # (G, block) f32; reduced: (1, block)
    *,
    group_reduce,
):
    q = q_ref[...]
    # sum_d max(q_d min_d, q_d max_d): a positive q_d takes the max, a negative the min.
    above = dot(jnp.maximum(q, 0), page_max[...], 1)
    each = above - dot(jnp.maximum(-q, 0), page_min[...], 1)
    bounds[...] = REDUCE[group_reduce](each, axis=0, keepdims=True)


def _moments(
    # in
    q_ref,  # (G, D)
    page_mean,  # (block, D)
    page_variance,  # (block, D)
    # out
    mean,  # (G, block) f32
    variance,  # (G, block) f32
):
    q = q_ref[...]
    mean[...] = dot(q, page_mean[...], 1)
    parts = squares(q)
    products = dot(jnp.concatenate(parts), page_variance[...], 1)
    variance[...] = products.reshape(len(parts), *variance.shape).sum(0)
