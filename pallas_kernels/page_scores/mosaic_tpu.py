"""`page_bounds` on TPU: two matmuls over the extremes of the keys as they stream by.

Grid: batch rows, KV heads, blocks of pages; Pallas' own pipeline copies the blocks. All
query heads of a group share one read. Bytes a step: `block_pages * 2 * D * itemsize`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.mosaic_tpu import LANES, MAX_ROWS, dot
from pallas_kernels.dispatch import device_kind
from pallas_kernels.page_scores import tuning


def unsupported(q, page_min, page_max) -> str | None:
    """Why the kernel cannot, from shapes and dtypes; None if it can."""
    dtypes = {q.dtype, page_min.dtype, page_max.dtype}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"dtypes {names} must be all bfloat16 or all float32"
    if q.shape[2] % LANES:  # as in decode_attention: XLA would copy the extremes
        return f"D={q.shape[2]} must be a multiple of {LANES}"
    if q.shape[1] > MAX_ROWS * page_min.shape[1]:
        return f"{q.shape[1]} query heads must be at most {MAX_ROWS} a KV head"
    return None


def page_bounds(q, page_min, page_max, *, interpret=False, config=None):
    """See :func:`pallas_kernels.page_scores.page_bounds`."""
    batch, num_q_heads, head_dim = q.shape
    heads, num_pages = page_min.shape[1:3]
    group = num_q_heads // heads
    if config is None:
        config = tuning.lookup(device_kind(), str(page_min.dtype), head_dim)
    block = min(config.block_pages, num_pages)
    extremes = pl.BlockSpec((None, None, block, head_dim), lambda b, h, i: (b, h, i, 0))
    bounds = pl.pallas_call(
        _kernel,
        grid=(batch, heads, pl.cdiv(num_pages, block)),
        in_specs=[
            pl.BlockSpec((None, None, group, head_dim), lambda b, h, i: (b, h, 0, 0)),
            extremes,
            extremes,
        ],
        out_specs=pl.BlockSpec(
            (None, None, group, block), lambda b, h, i: (b, h, 0, i)
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, group, num_pages), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * num_q_heads * num_pages * head_dim,
            bytes_accessed=2 * page_min.size * page_min.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="page_bounds",
    )(q.reshape(batch, heads, group, head_dim), page_min, page_max)
    return bounds.reshape(batch, num_q_heads, num_pages)


def _kernel(
    # in
    q_ref,  # (G, D)
    page_min,  # (block, D)
    page_max,  # (block, D)
    # out
    bounds,  # (G, block) f32
):
    q = q_ref[...]
    # sum_d max(q_d min_d, q_d max_d): a positive q_d takes the max, a negative the min.
    above = dot(jnp.maximum(q, 0), page_max[...], 1)
    bounds[...] = above - dot(jnp.maximum(-q, 0), page_min[...], 1)
