"""`top_k` on TPU: the k-th highest by bisection over the bits, then compaction.

Grid: blocks of rows, whose scores stay in VMEM as integers of the same order. 32 passes
over them fix the bits of the k-th highest from the top down, all rows of a block in
step. One more pass packs what is above it, and as many of its equals as are wanted,
into the output by rising index. TPUs neither scatter nor gather nor sum up along lanes
quickly: ranks are products with triangular matrices, and an output finds its source by
comparing ranks. Every number in a product is at most 128, exact in bfloat16.

Bytes: the scores once, the indices once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shared import tpu_rows
from pallas_kernels.shared.tpu_rows import LANES, VMEM_BYTES

NOTHING = -(2**31)  # the key of what is never chosen
COPIES = 3  # of a score in VMEM: two for the pipeline, and its key


def unsupported(scores, count, *, k, order) -> str | None:
    """Says why the kernel cannot run on such arrays, or None."""
    del count, order
    return tpu_rows.unsupported(scores, COPIES, 2 * 4 * (k + LANES))


def top_k(scores, count, *, k, order, interpret=False):
    """See :func:`pallas_kernels.topk.top_k`."""
    batch = scores.shape[:-1]
    tiles = tpu_rows.tiles(scores.shape[-1], COPIES)
    num_rows = math.prod(batch)
    lines = tpu_rows.pad(scores, tiles)
    if count is None:
        count = jnp.full(batch, k, jnp.int32)
    wanted = jnp.clip(count.astype(jnp.int32), 0, k).reshape(-1)
    wanted = jnp.pad(wanted, (0, len(lines) - num_rows))
    blocks = math.ceil(k / LANES)
    indices = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct((len(lines), blocks, LANES), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(lines) // tiles.rows,),
            in_specs=[pl.BlockSpec(tiles.block, lambda i, _: (i, 0, 0))],
            out_specs=pl.BlockSpec((tiles.rows, blocks, LANES), lambda i, _: (i, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM(tiles.block, jnp.int32),
                pltpu.VMEM(tpu_rows.spread(tiles), jnp.int32),
                pltpu.VMEM(tpu_rows.spread(tiles), jnp.float32),
                pltpu.SMEM((2,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=34 * lines.size,
            bytes_accessed=4 * (lines.size + len(lines) * blocks * LANES),
            transcendentals=0,
        ),
        interpret=interpret,
        name="top_k",
    )(wanted, lines)
    indices = indices[:num_rows].reshape(num_rows, -1)[:, :k].reshape(*batch, k)
    values = jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=-1)
    values = jnp.where(indices < 0, -jnp.inf, values)
    if order == "score":
        # As the indices rise, a stable sort keeps the lower one first among equals.
        worst_first = jnp.where(indices < 0, jnp.iinfo(jnp.int32).max, ~_keys(values))
        _, values, indices = lax.sort((worst_first, values, indices), num_keys=1)
    return values, indices


def _keys(scores):
    """Integers in the order of the scores; what is never chosen is the least."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    keys = bits ^ (lax.shift_right_arithmetic(bits, jnp.int32(31)) & 0x7FFFFFFF)
    minus_infinity = jnp.int32(0x7F800000 ^ -1)
    return jnp.where(keys <= minus_infinity, NOTHING, keys)


def _kernel(
    # prefetch
    wanted_ref,  # (all rows,) int32
    # in
    scores_ref,  # (rows, num_tiles * lines, 128) float32
    # out
    indices_ref,  # (rows, blocks, 128) int32
    # scratch
    keys_ref,  # as scores_ref, int32
    threshold_ref,  # (rows, 8, 128) int32
    equals_ref,  # (rows, 8, 128) float32
    carried_ref,  # SMEM (2,): equals seen, indices written
    *,
    tiles: tpu_rows.Tiles,
):
    first = pl.program_id(0) * tiles.rows
    shape = tpu_rows.spread(tiles)

    def to_keys(i, _):
        keys_ref[:, tiles.at(i)] = _keys(scores_ref[:, tiles.at(i)])

    lax.fori_loop(0, tiles.num_tiles, to_keys, None)

    def number_of(is_counted):
        (counts,) = tpu_rows.sums(
            keys_ref, tiles, lambda keys: (_ones(is_counted(keys)),)
        )
        return counts

    def spread(keys):
        # One of the 8 equal lines stands for the row's threshold in every comparison.
        return keys[:, :1, :]

    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    wanted = jnp.zeros(shape, jnp.float32)
    for r in range(tiles.rows):
        wanted = jnp.where(row == r, wanted_ref[first + r].astype(jnp.float32), wanted)
    wanted = jnp.minimum(wanted, number_of(lambda keys: keys > NOTHING))

    def fix_bit(i, threshold):
        # Built as an unsigned number; the sign bit makes it a key.
        higher = threshold | lax.shift_left(jnp.int32(1), jnp.int32(31) - i)
        key = spread(higher ^ jnp.int32(NOTHING))
        is_enough = number_of(lambda keys: keys >= key) >= wanted
        return jnp.where(is_enough, higher, threshold)

    threshold = jnp.zeros(shape, jnp.int32)
    threshold = lax.fori_loop(0, 32, fix_bit, threshold) ^ jnp.int32(NOTHING)
    key = spread(threshold)
    threshold_ref[...] = threshold
    equals_ref[...] = wanted - number_of(lambda keys: keys > key)
    indices_ref[...] = jnp.full(indices_ref.shape, -1, jnp.int32)

    def pack_row(r, _):
        carried_ref[0] = 0
        carried_ref[1] = 0
        threshold, equals = threshold_ref[r][:1], equals_ref[r][:1]
        pack = functools.partial(
            _pack, r, threshold, equals, keys_ref, indices_ref, carried_ref, tiles
        )
        lax.fori_loop(0, tiles.num_tiles, lambda i, _: pack(i), None)

    lax.fori_loop(0, tiles.rows, pack_row, None)


def _pack(r, threshold, equals, keys_ref, indices_ref, carried_ref, tiles, i):
    """Appends the indices that tile i of row r has chosen."""
    lines = tiles.lines
    keys = keys_ref[r, tiles.at(i)]
    is_above, is_equal = keys > threshold, keys == threshold
    num_equal = jnp.sum(_ones(is_equal)).astype(jnp.int32)
    some = jnp.sum(_ones(is_above)).astype(jnp.int32) + num_equal

    @pl.when(some > 0)
    def _():
        rank, before, _ = _ranks(_ones(is_equal))
        rank = rank + before + carried_ref[0].astype(jnp.float32)
        chosen = _ones(is_above | (is_equal & (rank <= equals)))
        carried_ref[0] += num_equal
        rank, before, total = _ranks(chosen)
        begin = jnp.transpose(before)[:1, :]  # (1, lines): chosen in earlier lines
        end = begin + jnp.transpose(total)[:1, :]
        written = carried_ref[1]
        after = written + jnp.sum(chosen).astype(jnp.int32)
        carried_ref[1] = after
        line = lax.broadcasted_iota(jnp.int32, (LANES, lines), 1).astype(jnp.float32)
        place = lax.broadcasted_iota(jnp.int32, (LANES, 1), 0)

        def write(block, _):
            wanted = (block * LANES + place - written).astype(jnp.float32)
            owner = (wanted >= begin) & (wanted < end)  # (128 places, lines)
            ranks = _product(_ones(owner), rank)  # of the owner's lanes
            local = wanted - _line_sum(jnp.where(owner, begin, 0.0))
            lane = _line_sum(_ones(ranks <= local))
            index = _line_sum(jnp.where(owner, line, 0.0)) * LANES + lane
            index = jnp.where(_line_sum(_ones(owner)) > 0, index, -1.0)
            places = jnp.transpose(jnp.broadcast_to(index, (LANES, LANES)))[:1, :]
            places = places.astype(jnp.int32)
            old = indices_ref[r, pl.ds(block, 1), :]
            offset = i * lines * LANES
            indices_ref[r, pl.ds(block, 1), :] = jnp.where(
                places < 0, old, places + offset
            )

        # lax.div, as both are positive: // would ask the device for the sign's rule.
        first, end_block = lax.div(written, LANES), lax.div(after + LANES - 1, LANES)
        lax.fori_loop(first, end_block, write, None)


def _ranks(ones):
    """Ranks of a tile's ones in reading order, three arrays as large as the tile.

    The rank of each in its line, from 1; the ones in lines before; those of its line.
    """
    lines = ones.shape[0]
    in_line = _product(ones, _ones(_iota(LANES, 0) <= _iota(LANES, 1)))
    total = jnp.broadcast_to(in_line[:, LANES - 1 :], in_line.shape)
    return in_line, _product(_ones(_iota(lines, 1) < _iota(lines, 0)), total), total


def _iota(size, axis):
    return lax.broadcasted_iota(jnp.int32, (size, size), axis)


def _ones(mask):
    return jnp.where(mask, 1.0, 0.0)


def _line_sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
