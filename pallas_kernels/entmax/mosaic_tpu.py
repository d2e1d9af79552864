"""The threshold of entmax on TPU: rows of scores stay in VMEM while it is sought.

Grid: blocks of rows, all rows of a block in step, each left alone once it has arrived.
The method is the reference's, its passes over the scores cost no traffic.

Bytes: the scores once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.entmax import equations
from pallas_kernels.shared import tpu_rows
from pallas_kernels.shared.tpu_rows import LANES, SUBLANES, VMEM_BYTES

COPIES = 2  # of a score in VMEM, for the pipeline


def unsupported(scores, *, alpha) -> str | None:
    """Says why the kernel cannot run on such scores, or None."""
    del alpha
    return tpu_rows.unsupported(scores, COPIES)


def solve(scores, *, alpha, interpret=False):
    """See :func:`pallas_kernels.entmax.solve`."""
    batch = scores.shape[:-1]
    tiles = tpu_rows.tiles(scores.shape[-1], COPIES)
    lines = tpu_rows.pad(scores, tiles)
    spread = jax.ShapeDtypeStruct((len(lines), SUBLANES, LANES), jnp.float32)
    index = pl.BlockSpec(tpu_rows.spread(tiles), lambda i: (i, 0, 0))
    outputs = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, alpha=alpha),
        out_shape=(spread, spread),
        grid=(len(lines) // tiles.rows,),
        in_specs=[pl.BlockSpec(tiles.block, lambda i: (i, 0, 0))],
        out_specs=(index, index),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=60 * lines.size, bytes_accessed=4 * lines.size, transcendentals=0
        ),
        interpret=interpret,
        name="entmax_solve",
    )(lines)
    shape, number = (*batch, 1), math.prod(batch)
    return equations.Threshold(*(x[:number, 0, 0].reshape(shape) for x in outputs))


def _kernel(
    # in
    scores_ref,  # (rows, lines, 128) float32
    # out
    top_ref,  # (rows, 8, 128) float32
    tau_ref,  # (rows, 8, 128) float32
    *,
    tiles: tpu_rows.Tiles,
    alpha: float,
):
    top = tpu_rows.most(scores_ref, tiles)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    top_ref[...] = top
    line = top[:, :1]  # one of 8 equal lines stands for the row

    def sums(tau):
        def terms(scores):
            z = equations.shifted(scores, line, alpha)
            return equations.powers(jnp.maximum(z - tau[:, :1], 0.0), alpha)

        return tpu_rows.sums(scores_ref, tiles, terms)

    start = jnp.full_like(top, -1.0)
    tau_ref[...] = equations.find_tau(sums, start, tiles.length, alpha)
