"""The parts that kernels of Hopper GPUs share: tiles, and attention to a block of keys.

A program is one warpgroup. The rows of a matrix product are 64 there, so that the query
rows of a KV head, of which there are few, are a part of a tile whose rest is ignored.
Two programs fit on a multiprocessor: one computes while the copies of the other come.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dispatch import device_kind

# An older one may not even be imported, and `unsupported` has to be.
plgpu: Any = None
if jax.__version_info__ >= (0, 11):
    from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # query rows of a program
BLOCK = 64  # keys of a step
PROGRAMS = 2 * 132  # at once on a H100 or H200
WIDTH = 64  # values of a product, which registers hold beside what it is added to
MASKED = -1e30  # finite: its difference to itself is 0, not NaN


def unsupported() -> str | None:
    """Says why no such kernel runs here, or None; a CPU simulates or compiles."""
    if plgpu is None:
        return f"jax {jax.__version__} must be 0.11 or newer"
    kind = device_kind()
    if kind != "cpu" and not re.search(r"\bG?H\d", kind):
        return f"{kind} must be a Hopper GPU"
    return None


def unsupported_rows(q, keys, rows) -> str | None:
    """Says why not, from the query's sizes; `rows` share keys."""
    if q.dtype != keys.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtypes {q.dtype}, {keys.dtype} must be both bfloat16 or both float16"
    if q.shape[3] not in (64, 128, 256):
        return f"D={q.shape[3]} must be 64, 128 or 256"
    if not 1 <= rows <= ROWS:
        return f"{rows} query rows must be in [1, {ROWS}]"
    return None


def kernel(body, *, interpret, approx_math=True, **sizes):
    """A Mosaic GPU kernel; `interpret` True is its simulation as it is.

    An approximate exp2 or log2 errs by a few units of the last place of a float32.
    """
    return plgpu.kernel(
        body,
        compiler_params=plgpu.CompilerParams(approx_math=approx_math),
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret,
        **sizes,
    )


def tile():
    """Layout of a matrix product's result."""
    return plgpu.Layout.WGMMA


def column():
    """Layout of a number for each row of it."""
    return plgpu.Layout.WGMMA.reduce(1)


def line():
    """Layout of a number for each column of it."""
    return plgpu.Layout.WGMMA.reduce(0)


def num_splits(programs: int, blocks: int) -> int:
    """Parts of a sequence of blocks that fill the device when computed at once."""
    return max(1, min(PROGRAMS // programs, blocks))


def share(split, splits, blocks):
    """First block of a part, and the first of the next."""
    return lax.div(split * blocks, splits), lax.div((split + 1) * blocks, splits)


def tiled(q, query_positions, heads):
    """Query rows as programs take them: `(q, rows_at, positions)`.

    A tile is the rows of all query heads of one of H heads at a few of the T positions,
    all of them where they fit. q is `(B * H, tiles, R, D)`, R rows being a shape that
    copies can have; positions are `(B, tiles, steps)`, the last one repeated behind the
    end, and `rows_at` the same for each of 64 rows `(B, tiles, 64)`, -1 where none is.
    """
    batch, num_q_heads, num_rows, head_dim = q.shape
    group = num_q_heads // heads
    steps = num_rows if group * num_rows <= ROWS else ROWS // group
    tiles = pl.cdiv(num_rows, steps)
    rows, spare = group * steps, tiles * steps - num_rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, spare), (0, 0)))
    q = q.reshape(batch * heads, group, tiles, steps, head_dim)
    q = jnp.moveaxis(q, 2, 1).reshape(batch * heads, tiles, rows, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -rows % 8), (0, 0)))
    positions = jnp.pad(query_positions, ((0, 0), (0, spare)), mode="edge")
    positions = positions.reshape(batch, tiles, steps)
    rows_at = jnp.tile(positions, (1, 1, group))
    padding = ((0, 0), (0, 0), (0, ROWS - rows))
    return q, jnp.pad(rows_at, padding, constant_values=-1), positions


def untiled(x, shape, heads):
    """`(B * H, tiles, R, ...)` of `tiled` rows as `(B, Hq, T, ...)`, `shape` first."""
    batch, num_q_heads, num_rows = shape
    group, (tiles, _, *rest) = num_q_heads // heads, x.shape[1:]
    steps = num_rows if tiles == 1 else ROWS // group
    x = x[:, :, : group * steps].reshape(batch * heads, tiles, group, steps, *rest)
    x = jnp.moveaxis(x, 1, 2).reshape(batch, num_q_heads, tiles * steps, *rest)
    return x[:, :, :num_rows]


def operand(*shape, dtype):
    """Shared memory of a matrix product's operand, its lines in tiles of 128 bytes."""
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )


def scratch(head_dim, dtype) -> dict:
    """Shared memory of `empty`, `add_block` and `store`."""
    return {
        "q": operand(ROWS, head_dim, dtype=dtype),
        "weights": operand(ROWS, BLOCK, dtype=dtype),
        "out": plgpu.SMEM((ROWS, WIDTH), jnp.float32),
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
    }


def empty(head_dim):
    """The running maximum, sum and weighted values of no key."""

    def full(value, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    return (
        full(MASKED, (ROWS,), column()),
        full(0.0, (ROWS,), column()),
        (full(0.0, (ROWS, WIDTH), tile()),) * (head_dim // WIDTH),
    )


def add_block(state, q, k, v, weights_ref, sm_scale, visible, soft_cap=None, see=None):
    """The state with the keys `(BLOCK, D)` too; `visible` as the logits, or None: all.

    `see`, if given, is called with the logits of all. Those of the state are in units
    of log 2. The operands, in shared memory, are free again afterwards.
    """
    m, l, acc = state
    logits = product(q, k.T, BLOCK)
    per_log2 = math.log2(math.e)
    if soft_cap is None:
        logits = logits * (sm_scale * per_log2)
    else:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)): that of the hardware has 11 bits.
        grown = jnp.exp2(logits * (2 * per_log2 * sm_scale / soft_cap))
        logits = (soft_cap * per_log2) * (1.0 - 2.0 / (1.0 + grown))
    if see is not None:
        see(logits * math.log(2))
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    m_new = jnp.maximum(m, logits.max(1))
    weights = jnp.exp2(logits - across(m_new, BLOCK))
    if visible is not None:  # a row that has seen no key yet has m_new = MASKED
        weights = jnp.where(visible, weights, 0.0)
    decay = jnp.exp2(m - m_new)
    l = l * decay + weights.sum(1)
    weights_ref[...] = weights.astype(weights_ref.dtype)
    plgpu.commit_smem()
    parts = [v.at[:, pl.ds(i * WIDTH, WIDTH)] for i in range(len(acc))]
    acc = tuple(
        x * across(decay, WIDTH) + product(weights_ref, part, WIDTH)
        for x, part in zip(acc, parts, strict=True)
    )
    return m_new, l, acc


def product(a, b, width):
    """A matrix product of two operands in shared memory, in float32."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, width), jnp.float32))


def across(column, width):
    """A number for each row, along the row."""
    return lax.broadcast_in_dim(column, (ROWS, width), [0])


def store(state, buffers, out, lse):
    """Writes `(out, lse)` of a state; 0 and -inf for a row that saw no key."""
    m, l, acc = state
    taken = pl.ds(0, lse.shape[0])
    positive = jnp.where(l == 0.0, 1.0, l)
    buffers["lse"][...] = jnp.where(
        l == 0.0, -jnp.inf, m * math.log(2) + jnp.log(positive)
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers["lse"].at[taken], lse)
    for i, values in enumerate(acc):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffers["out"][...] = values / across(positive, WIDTH)
        plgpu.commit_smem()
        part = out.at[:, pl.ds(i * WIDTH, WIDTH)]
        plgpu.copy_smem_to_gmem(buffers["out"].at[taken], part)
    plgpu.wait_smem_to_gmem(0)
