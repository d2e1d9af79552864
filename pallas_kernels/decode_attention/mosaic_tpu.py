"""`decode_attention` on TPU: the visible part of the cache, streamed through VMEM.

One program per batch row, and per tile of query rows where they are a prompt's, goes
through its KV heads, a block of tokens at a time: online softmax, a ring of buffers,
several blocks on their way while one is used, also across heads. Without
`key_positions`, blocks behind the last visible position are not read, nor those before
the window, and only blocks that a row's position cuts are masked.
Bytes per block: `block_tokens * 2 * D * itemsize`, or those of codes and their scales;
nothing else grows with the cache, except the logits where they are asked for: four
bytes a query row and token.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tuning
from pallas_kernels.decode_attention.reference import only_seen
from pallas_kernels.dispatch import device_kind
from pallas_kernels.shared.quantized import Quantized, turned, unsupported_pair
from pallas_kernels.shared.tpu_blocks import (
    LANES,
    add_weighted,
    empty,
    finish,
    scaled,
)
from pallas_kernels.shared.tpu_operands import (
    operand,
    stored_dtype,
    unsupported_rows,
)

MAX_ROWS = 128  # query rows a KV head at once; more are a prompt's, in tiles
TILE_ROWS = 256  # a tile reads its keys once: twice what keeps the MXU busy on a v5e


def unsupported(
    q, k, v, query_positions, key_positions, *, with_logits=False, **static
) -> str | None:
    """Says why the kernel cannot, from shapes and dtypes; None if it can."""
    del query_positions, key_positions, static
    group = q.shape[1] // k.shape[1]
    rows = group * q.shape[2]
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {q.dtype}, {k.dtype} must be both bfloat16 or both float32"
    if reason := unsupported_pair(k, v):
        return reason
    if isinstance(k, Quantized):
        reason = _unsupported_codes(k, v, rows)
        if reason is not None:
            return reason
    elif q.shape[3] % LANES:
        # Narrower rows are packed in memory and padded in a kernel's operands: XLA
        # would copy the whole cache in between.
        return f"D={q.shape[3]} must be a multiple of {LANES}"
    if k.shape[2] % 8:
        return f"{k.shape[2]} slots must be a multiple of 8"
    if not 1 <= group <= TILE_ROWS or not rows:
        return f"{group} query heads a KV head must be in [1, {TILE_ROWS}]"
    if with_logits and rows > MAX_ROWS:
        return f"{rows} query rows a KV head with logits must be at most {MAX_ROWS}"
    return None


def _unsupported_codes(k, v, rows):
    for stored in (k, v):
        width = stored.codes.shape[3]
        if width % 32:  # bytes in a tile
            return f"{width} bytes of codes a row must be a multiple of 32"
    if k.shape[2] % LANES:
        # Scales lie in columns.
        return f"{k.shape[2]} slots of quantised rows must be a multiple of {LANES}"
    if rows > MAX_ROWS:
        # What few rows spare many do not: each number is worth being decoded once.
        return f"{rows} query rows a quantised KV head must be at most {MAX_ROWS}"
    return unsupported_rows(rows, *k.layout.parts, *v.layout.parts)


def decode_attention(
    q,
    k,
    v,
    query_positions,
    key_positions,
    *,
    sm_scale,
    window=None,
    soft_cap=None,
    with_logits=False,
    interpret=False,
    config=None,
):
    """See :func:`pallas_kernels.decode_attention.decode_attention`."""
    batch, num_q_heads, num_rows, head_dim = q.shape
    heads, slots = k.shape[1:3]
    group = num_q_heads // heads
    tile = num_rows if group * num_rows <= MAX_ROWS else TILE_ROWS // group
    tiles = pl.cdiv(num_rows, tile)
    rows = group * tile
    keys, values = operand(k), operand(v)
    padded_rows = keys.rows(rows)
    if config is None:
        config = tuning.lookup(device_kind(), stored_dtype(k), head_dim)
    block = min(config.block_tokens, slots)
    num_blocks = pl.cdiv(slots, block)

    spare = tiles * tile - num_rows
    positions = jnp.pad(query_positions, ((0, 0), (0, spare)), mode="edge")
    positions = positions.reshape(batch, tiles, tile)
    queries = keys.queries(_by_tile(turned(k, q), heads, tiles, tile))
    row_positions = jnp.pad(
        jnp.tile(positions, (1, 1, group)),
        ((0, 0), (0, 0), (0, padded_rows - rows)),
        constant_values=-1,
    )
    streams = (*keys.arrays(k), *values.arrays(v))
    tokens_last = (*keys.tokens_last, *values.tokens_last)
    buffers = [
        pltpu.VMEM((config.num_buffers, *_in_block(x, block, is_last)), x.dtype)
        for x, is_last in zip(streams, tokens_last, strict=True)
    ]
    held, held_specs, held_scratch = (), (), ()
    if key_positions is None:
        bounds = _bounds(positions, slots, block, window)
    else:
        bounds = _all_blocks(positions, slots, block)
        held = (_in_blocks(key_positions, block),)
        held_specs = (pl.BlockSpec(memory_space=pl.ANY),)
        lanes = held[0].shape[-1]
        held_scratch = (pltpu.VMEM((config.num_buffers, 1, lanes), jnp.int32),)

    def of_tile(*shape, **space):
        index = (0,) * len(shape)
        return pl.BlockSpec((None, None, *shape), lambda b, t: (b, t, *index), **space)

    logits_shape, logits_spec, logits_scratch = (), (), ()
    if with_logits:
        logits_spec = (pl.BlockSpec(memory_space=pl.ANY),)
        padded = (batch, heads, padded_rows, num_blocks * block)
        logits_shape = (jax.ShapeDtypeStruct(padded, jnp.float32),)
        logits_scratch = (
            pltpu.VMEM((config.num_buffers, padded_rows, block), jnp.float32),
            pltpu.SemaphoreType.DMA((config.num_buffers,)),
        )
    shapes = (heads, padded_rows, values.width), (heads, padded_rows, 1)
    out, lse, *logits = pl.pallas_call(
        functools.partial(
            _kernel,
            keys=keys,
            values=values,
            slots=slots,
            block=block,
            has_positions=bool(held),
            sm_scale=sm_scale,
            window=window,
            soft_cap=soft_cap,
            with_logits=with_logits,
        ),
        grid=(batch, tiles),
        in_specs=[
            of_tile(1, 4, memory_space=pltpu.SMEM),
            of_tile(padded_rows, 1),
            *(of_tile(*x.shape[2:]) for x in queries),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in streams),
            *held_specs,
        ],
        out_specs=[*(of_tile(*shape) for shape in shapes), *logits_spec],
        out_shape=[
            *(
                jax.ShapeDtypeStruct((batch, tiles, *shape), jnp.float32)
                for shape in shapes
            ),
            *logits_shape,
        ],
        scratch_shapes=[
            pltpu.SemaphoreType.DMA((config.num_buffers,)),
            *buffers,
            *held_scratch,
            *logits_scratch,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            disable_bounds_checks=True,  # blocks are cut at the last slot: see _kernel
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * tiles * heads * slots * rows * head_dim,
            bytes_accessed=tiles * sum(x.size * x.dtype.itemsize for x in streams),
            transcendentals=batch * tiles * heads * slots * rows,
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        bounds,
        row_positions[..., None],
        *queries,
        *streams,
        *held,
    )
    out = turned(v, values.outputs(out)[..., :rows, :])
    out, lse = (_by_head(x, q.shape, tile) for x in (out, lse[..., :rows, :]))
    if not with_logits:
        return out, lse[..., 0]
    scored = logits[0][:, :, :rows, :slots]
    scored = only_seen(scored, heads, query_positions, key_positions, window)
    return out, lse[..., 0], scored


def _in_block(stream, block, tokens_last):
    """The shape of a block of tokens."""
    if tokens_last:
        return stream.shape[2], block
    return block, stream.shape[3]


def _bounds(positions, slots, block, window):
    """First block, first masked, end and last position `(B, tiles, 1, 4)` of tiles.

    Slots hold the positions that they are at.
    """
    num_blocks = pl.cdiv(slots, block)
    first, last = positions.min(2), positions.max(2)
    begin = jnp.zeros_like(first)
    whole = jnp.clip((first + 1) // block, 0, slots // block)
    if window is not None:
        begin = jnp.clip((first - window + 1) // block, 0, num_blocks - 1)
        whole = begin
    # At least one block, if only to see nothing in it.
    end = jnp.clip(last // block + 1, begin + 1, num_blocks)
    return jnp.stack([begin, whole, end, last], axis=2)[:, :, None]


def _all_blocks(positions, slots, block):
    """The same where slots hold positions of their own: every block, masked."""
    begin = jnp.zeros_like(positions[:, :, 0])
    end = jnp.full_like(begin, pl.cdiv(slots, block))
    last = jnp.full_like(begin, slots - 1)
    return jnp.stack([begin, begin, end, last], axis=2)[:, :, None]


def _in_blocks(key_positions, block):
    """Positions of the slots, `(#B, H, blocks, 1, lanes)`, -1 behind the last one."""
    slots = key_positions.shape[2]
    num_blocks = pl.cdiv(slots, block)
    # A row of whole lanes for each block: a hundredth of the cache's bytes.
    lanes = pl.cdiv(block, LANES) * LANES
    rest = ((0, 0), (0, 0), (0, num_blocks * block - slots))
    padded = jnp.pad(key_positions, rest, constant_values=-1)
    padded = padded.reshape(*key_positions.shape[:2], num_blocks, 1, block)
    return jnp.pad(padded, ((0, 0),) * 4 + ((0, lanes - block),))


def _by_tile(q, heads, tiles, tile):
    """Queries `(B, tiles, Hkv, R, D)`, the last tile filled with zeros."""
    batch, _, num_rows, head_dim = q.shape
    padding = ((0, 0), (0, 0), (0, tiles * tile - num_rows), (0, 0))
    q = jnp.pad(q, padding).reshape(batch, heads, -1, tiles, tile, head_dim)
    return jnp.moveaxis(q, 3, 1).reshape(batch, tiles, heads, -1, head_dim)


def _by_head(x, shape, tile):
    """The results of tiles, `(B, Hq, T, ...)` of a query's shape."""
    batch, num_q_heads, num_rows, _ = shape
    tiles, heads = x.shape[1:3]
    x = x.reshape(batch, tiles, heads, -1, tile, x.shape[-1])
    x = jnp.moveaxis(x, 1, 3).reshape(batch, num_q_heads, tiles * tile, -1)
    return x[:, :, :num_rows]


def _kernel(
    # in
    bounds,  # (1, 4) i32, SMEM: first block, first masked, end; last position seen
    positions_ref,  # (R, 1) i32
    *refs,  # queries (Hkv, ...), of codes their sums too
    #   streams, HBM: keys, of codes their scales, and values; each (B, Hkv, S, D), or
    #   tokens last
    #   if slots hold positions of their own: (#B, H, blocks, 1, lanes) i32, HBM
    # out: (Hkv, R, D) f32, (Hkv, R, 1) f32, with logits (B, Hkv, R, S) f32, HBM
    # scratch: (N,) DMA semaphores, (N, block, D) of each stream, with positions
    # (N, 1, lanes) i32, with logits (N, R, block) f32 and (N,) DMA semaphores
    keys,
    values,
    slots,
    block,
    has_positions,
    sm_scale,
    window,
    soft_cap,
    with_logits,
):
    tokens_last = (*keys.tokens_last, *values.tokens_last)
    num_keys, num_streams = len(keys.tokens_last), len(tokens_last)
    given = iter(refs)

    def next_refs(number):
        return list(itertools.islice(given, number))

    query_refs, streams = next_refs(num_keys), next_refs(num_streams)
    held = next_refs(has_positions)
    out_ref, lse_ref = next_refs(2)
    logits_refs = next_refs(with_logits)
    (arrived,) = next_refs(1)
    buffers = next_refs(num_streams)
    held_buffers = next_refs(has_positions)
    written_refs = next_refs(2 * with_logits)
    heads, num_buffers = lse_ref.shape[0], arrived.shape[0]
    row = pl.program_id(0)
    begin, masked, end, last = (bounds[0, i] for i in range(4))

    def copies(h, i, size, slot):
        part = pl.ds(pl.multiple_of(i * block, block), size)
        into, pairs = pl.ds(0, size), []
        for stream, buffer, is_last in zip(streams, buffers, tokens_last, strict=True):
            if is_last:
                pair = stream.at[row, h, :, part], buffer.at[slot, :, into]
            else:
                pair = stream.at[row, h, part], buffer.at[slot, into]
            pairs.append(pair)
        for positions, buffer in zip(held, held_buffers, strict=True):
            b = 0 if positions.shape[0] == 1 else row
            own = 0 if positions.shape[1] == 1 else h
            pairs.append((positions.at[b, own, i], buffer.at[slot]))
        return [
            pltpu.make_async_copy(source, target, arrived.at[slot])
            for source, target in pairs
        ]

    def each_copy(h, i, slot, act):
        """Calls `act` with the copies of a block, the last one cut at the last slot."""

        def each(i, size):
            for copy in copies(h, i, size, slot):
                act(copy)

        whole, rest = divmod(slots, block)
        pl.when((h < heads) & (i < whole))(lambda: each(i, block))
        if rest:
            pl.when((h < heads) & (i == whole))(lambda: each(whole, rest))

    def after(slot):
        return lax.select(slot == num_buffers - 1, 0, slot + 1)

    def fetch(cursor):
        """Starts the copies of a block; returns the one after it."""
        h, i, slot = cursor
        each_copy(h, i, slot, lambda copy: copy.start())
        is_last = i + 1 >= end
        h = lax.select(is_last, jnp.minimum(h + 1, heads), h)
        return h, lax.select(is_last, begin, i + 1), after(slot)

    def store(h, i, slot, count, logits):
        """Starts the copy of a block's logits, the `count`th, to where they belong."""
        logits_buffers, written = written_refs
        pl.when(count >= num_buffers)(lambda: stored(slot))
        logits_buffers[slot] = logits
        into = logits_refs[0].at[row, h, :, pl.ds(pl.multiple_of(i * block, 8), block)]
        pltpu.make_async_copy(logits_buffers.at[slot], into, written.at[slot]).start()

    def stored(slot):
        logits_buffers, written = written_refs
        buffer = logits_buffers.at[slot]
        pltpu.make_async_copy(buffer, buffer, written.at[slot]).wait()

    def one_head(h, carry):
        queries = [x[h] for x in query_refs]

        def take(i, slot, count, state, visible=None, inside=None):
            block_keys, block_values = (
                [x[slot] for x in part]
                for part in (buffers[:num_keys], buffers[num_keys:])
            )
            logits = scaled(keys.logits(queries, block_keys), sm_scale, soft_cap)
            if with_logits:
                store(h, i, slot, count, logits)
            weigh = functools.partial(values.weighted, block=block_values, held=inside)
            return add_weighted(state, logits, visible, weigh)

        def whole_block(i, carry):
            cursor, slot, count, state = carry
            cursor = fetch(cursor)
            for copy in copies(h, i, block, slot):
                copy.wait()
            return cursor, after(slot), count + 1, take(i, slot, count, state)

        def cut_block(i, carry):
            cursor, slot, count, state = carry
            cursor = fetch(cursor)
            each_copy(h, i, slot, lambda copy: copy.wait())
            valid = last + 1 - i * block
            values.clear([x.at[slot] for x in buffers[num_keys:]], valid)
            own = i * block + lax.broadcasted_iota(jnp.int32, (1, block), 1)
            inside = own <= last
            for buffer in held_buffers:
                own = buffer[slot][:, :block]
            visible = inside & (own >= 0) & (own <= positions_ref[...])
            if window is not None:
                visible &= own > positions_ref[...] - window
            state = take(i, slot, count, state, visible, inside)
            return cursor, after(slot), count + 1, state

        carry = (*carry, empty(*out_ref.shape[1:]))
        carry = lax.fori_loop(begin, masked, whole_block, carry)
        *carry, state = lax.fori_loop(masked, end, cut_block, carry)
        out_ref[h], lse_ref[h] = finish(state)
        return tuple(carry)

    cursor = (jnp.int32(0), begin, jnp.int32(0))
    cursor = lax.fori_loop(0, num_buffers - 1, lambda _, c: fetch(c), cursor)
    carry = cursor, jnp.int32(0), jnp.int32(0)
    _, _, count = lax.fori_loop(0, heads, one_head, carry)
    if with_logits:
        for slot in range(num_buffers):
            pl.when(slot < count)(functools.partial(stored, slot))
