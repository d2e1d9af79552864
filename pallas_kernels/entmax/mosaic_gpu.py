"""The threshold of entmax on Hopper GPUs: a program per row, no launch per step.

A warpgroup goes through the scores of its row as often as the reference's method needs,
many loads on their way at once. The scores stay where they are: after the first pass
they are in the processor's own cache, or in the one that all share.

Bytes: the scores once for each of the four to eight passes, from a cache but once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.entmax import equations
from pallas_kernels.shared import hopper
from pallas_kernels.shared.hopper import plgpu

FEWEST = 1024  # scores of a step
MOST = 4096  # 16 KB on their way at once,
MOST_FAST = 8192  # and twice as many where powers leave the registers for them
THREADS = 128  # of a warpgroup


def unsupported(scores, *, alpha) -> str | None:
    """Says why the kernel cannot run on such scores, or None."""
    del alpha
    if scores.dtype != jnp.float32:
        return f"dtype {scores.dtype} must be float32"
    if scores.shape[-1] < FEWEST:  # a program would do too little
        return f"{scores.shape[-1]} scores a row must be at least {FEWEST}"
    return hopper.unsupported()


def solve(scores, *, alpha, interpret=False):
    """See :func:`pallas_kernels.entmax.solve`."""
    *batch, length = scores.shape
    number = math.prod(batch)
    most = MOST_FAST if alpha in (1.5, 2.0) else MOST
    chunk = min(max(FEWEST, 1 << (length - 1).bit_length()), most)
    lines = scores.reshape(number, length)
    lines = jnp.pad(lines, ((0, 0), (0, -length % chunk)), constant_values=-jnp.inf)
    outputs = hopper.kernel(
        functools.partial(_kernel, length=length, chunk=chunk, alpha=alpha),
        out_type=(jax.ShapeDtypeStruct((number,), jnp.float32),) * 2,
        grid=(number,),
        grid_names=("row",),
        interpret=interpret,
        approx_math=False,
        kernel_name="entmax_solve",
    )(lines)
    return equations.Threshold(*(x.reshape(*batch, 1) for x in outputs))


def _kernel(
    # in
    scores,  # (rows, S) f32
    # out
    top_ref,  # (rows,) f32
    tau_ref,  # (rows,) f32
    *,
    length,
    chunk,
    alpha,
):
    row = lax.axis_index("row")
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=4)

    def full(value):
        return plgpu.layout_cast(jnp.full((chunk,), value, jnp.float32), layout)

    def spread(value):  # for the method, which is one of arrays
        lanes = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
        return plgpu.layout_cast(jnp.full((THREADS,), value, jnp.float32), lanes)

    def over_chunks(function, carry):
        def body(i, carry):
            at = pl.multiple_of(i * chunk, chunk)
            part = scores.at[row, pl.ds(at, chunk)]
            return function(plgpu.load(part, layout=layout, optimized=False), carry)

        return lax.fori_loop(0, scores.shape[1] // chunk, body, carry)

    top = over_chunks(jnp.maximum, full(-jnp.inf)).max()
    top = jnp.where(top == -jnp.inf, 0.0, top)

    def sums(tau):
        tau = tau.max()  # they are all alike

        def add(part, carry):
            z = equations.shifted(part, top, alpha)
            terms = equations.powers(jnp.maximum(z - tau, 0.0), alpha)
            return tuple(x + y for x, y in zip(carry, terms, strict=True))

        totals = over_chunks(add, (full(0.0), full(0.0)))
        return tuple(spread(x.sum()) for x in totals)

    top_ref[row] = top
    tau_ref[row] = equations.find_tau(sums, spread(-1.0), length, alpha).max()
