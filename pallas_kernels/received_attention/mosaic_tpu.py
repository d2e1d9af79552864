"""`received_attention` on TPU: rows of queries stream by a block of keys.

Grid: batch rows, KV heads, blocks of keys, blocks of rows. Keys lie along sublanes and
rows along lanes, so that what is known of a row is a line, and the sums over rows grow
place by place; a product with ones ends them as lines too. Rows that end before a
block's first key are skipped.
Bytes: the keys once, and the queries once for each block of keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import device_kind
from pallas_kernels.received_attention import tuning
from pallas_kernels.shared import quantized
from pallas_kernels.shared.tpu_blocks import LANES, dot

SUBLANES = 8
MAX_GROUP = 16  # query heads of a KV head: each has sums of its own


def unsupported(
    q, k, lse, query_positions, key_positions, row_weights, **static
) -> str | None:
    """Says why the kernel cannot, from shapes and dtypes; None if it can."""
    if reason := quantized.unsupported(k):
        return reason
    del lse, query_positions, row_weights, static
    group = q.shape[1] // k.shape[1]
    if key_positions is not None:
        return "slots with positions of their own are not lines of a row's"
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {q.dtype}, {k.dtype} must be both bfloat16 or both float32"
    if q.shape[3] % LANES:  # as in decode_attention: XLA would copy the keys
        return f"D={q.shape[3]} must be a multiple of {LANES}"
    if not 1 <= group <= MAX_GROUP:
        return f"{group} query heads a KV head must be in [1, {MAX_GROUP}]"
    return None


def received_attention(
    q,
    k,
    lse,
    query_positions,
    key_positions,
    row_weights,
    *,
    sm_scale,
    group_reduce,
    interpret=False,
    config=None,
):
    """See :func:`pallas_kernels.received_attention.received_attention`."""
    del key_positions  # None
    batch, num_q_heads, rows, head_dim = q.shape
    heads, slots = k.shape[1:3]
    group = num_q_heads // heads
    if config is None:
        config = tuning.lookup(device_kind(), str(k.dtype), head_dim)
    block = min(config.block_keys, slots)
    tile = min(config.block_rows, rows + -rows % LANES)
    spare = -rows % tile
    num_sums = group if group_reduce == "none" else 1

    if row_weights is None:
        row_weights = jnp.ones((batch, rows), jnp.float32)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, spare), (0, 0)))
    q = q.reshape(batch, heads, group, rows + spare, head_dim)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, spare)))
    lse = lse.reshape(batch, heads, group, rows + spare)
    positions = jnp.pad(query_positions, ((0, 0), (0, spare)), constant_values=-1)
    row_weights = jnp.pad(row_weights.astype(jnp.float32), ((0, 0), (0, spare)))
    last = positions.reshape(batch, -1, tile).max(2)

    def line(b, h, i, t, last):
        del h, i, last
        return b, 0, t

    (received,) = pl.pallas_call(
        functools.partial(_kernel, sm_scale=sm_scale, group_reduce=group_reduce),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, pl.cdiv(slots, block), (rows + spare) // tile),
            in_specs=[
                pl.BlockSpec(
                    (None, None, group, tile, head_dim),
                    lambda b, h, i, t, _: (b, h, 0, t, 0),
                ),
                pl.BlockSpec(
                    (None, None, group, tile), lambda b, h, i, t, _: (b, h, 0, t)
                ),
                pl.BlockSpec((None, 1, tile), line),
                pl.BlockSpec((None, 1, tile), line),
                pl.BlockSpec(
                    (None, None, block, head_dim), lambda b, h, i, t, _: (b, h, i, 0)
                ),
            ],
            out_specs=[
                pl.BlockSpec(
                    (None, None, num_sums, block), lambda b, h, i, t, _: (b, h, 0, i)
                )
            ],
            scratch_shapes=[pltpu.VMEM((num_sums, block, tile), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, num_sums, slots), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * num_q_heads * rows * slots * head_dim,
            bytes_accessed=k.size * k.dtype.itemsize,
            transcendentals=batch * num_q_heads * rows * slots,
        ),
        interpret=interpret,
        name="received_attention",
    )(last, q, lse, positions[:, None], row_weights[:, None], k)
    return received.reshape(batch, heads * num_sums, slots)


def _kernel(
    # in
    last,  # (B, tiles) i32, SMEM: the last position of a block of rows
    q_ref,  # (G, tile, D)
    lse_ref,  # (G, tile) f32
    positions_ref,  # (1, tile) i32
    weights_ref,  # (1, tile) f32
    k_ref,  # (block, D)
    # out
    found_ref,  # (sums, block) f32
    # scratch
    sums_ref,  # (sums, block, tile) f32
    *,
    sm_scale,
    group_reduce,
):
    group, tile, _ = q_ref.shape
    block = k_ref.shape[0]
    t = pl.program_id(3)
    first = pl.program_id(2) * block

    @pl.when(t == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(last[pl.program_id(0), t] >= first)
    def _():
        k = k_ref[...]
        slot = first + lax.broadcasted_iota(jnp.int32, (block, tile), 0)
        visible = slot <= positions_ref[...]

        def received(g):
            lse = lse_ref[pl.ds(g, 1)]
            weights = jnp.exp(sm_scale * dot(k, q_ref[g], 1) - lse)
            return jnp.where(visible, weights, 0.0)

        if group_reduce == "none":
            for g in range(group):
                sums_ref[g] += received(g) * weights_ref[...]
            return
        total = received(0)
        for g in range(1, group):
            more = received(g)
            total = jnp.maximum(total, more) if group_reduce == "max" else total + more
        share = 1 / group if group_reduce == "mean" else 1.0
        sums_ref[0] += total * (weights_ref[...] * share)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        ones = jnp.ones((SUBLANES, tile), jnp.float32)
        for g in range(sums_ref.shape[0]):
            found_ref[pl.ds(g, 1)] = dot(ones, sums_ref[g], 1)[:1]
