"""`decode_attention` on TPU: the visible part of the cache, streamed through VMEM.

One program per batch row, and per tile of query rows where they are a prompt's, goes
through its KV heads, a block of tokens at a time: online softmax, a ring of buffers,
several blocks on their way while one is used, also across heads. Without
`key_positions`, blocks behind the last visible position are not read, nor those before
the window, and only blocks that a row's position cuts are masked.
Bytes per block: `block_tokens * 2 * D * itemsize`; nothing else grows with the cache,
except the logits where they are asked for: four bytes a query row and token.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tuning
from pallas_kernels.decode_attention.reference import visible_keys
from pallas_kernels.dispatch import device_kind
from pallas_kernels.shared import quantized
from pallas_kernels.shared.tpu_blocks import (
    LANES,
    add_block,
    clear,
    empty,
    finish,
    scaled_logits,
)

MAX_ROWS = 128  # query rows a KV head at once; more are a prompt's, in tiles
TILE_ROWS = 256  # a tile reads its keys once: twice what keeps the MXU busy on a v5e


def unsupported(
    q, k, v, query_positions, key_positions, *, with_logits=False, **static
) -> str | None:
    """Says why the kernel cannot, from shapes and dtypes; None if it can."""
    if reason := quantized.unsupported(k, v):
        return reason
    del v, query_positions, key_positions, static
    group = q.shape[1] // k.shape[1]
    rows = group * q.shape[2]
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {q.dtype}, {k.dtype} must be both bfloat16 or both float32"
    if q.shape[3] % LANES:
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
    if config is None:
        config = tuning.lookup(device_kind(), str(k.dtype), head_dim)
    block = min(config.block_tokens, slots)
    num_blocks = pl.cdiv(slots, block)

    spare = tiles * tile - num_rows
    positions = jnp.pad(query_positions, ((0, 0), (0, spare)), mode="edge")
    positions = positions.reshape(batch, tiles, tile)
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

    buffers = pltpu.VMEM((config.num_buffers, block, head_dim), k.dtype)
    logits_shape, logits_spec, logits_scratch = (), (), ()
    if with_logits:
        logits_spec = (pl.BlockSpec(memory_space=pl.ANY),)
        padded = (batch, heads, rows, num_blocks * block)
        logits_shape = (jax.ShapeDtypeStruct(padded, jnp.float32),)
        logits_scratch = (
            pltpu.VMEM((config.num_buffers, rows, block), jnp.float32),
            pltpu.SemaphoreType.DMA((config.num_buffers,)),
        )
    out, lse, *logits = pl.pallas_call(
        functools.partial(
            _kernel,
            has_positions=bool(held),
            sm_scale=sm_scale,
            window=window,
            soft_cap=soft_cap,
        ),
        grid=(batch, tiles),
        in_specs=[
            of_tile(1, 4, memory_space=pltpu.SMEM),
            of_tile(heads, rows, head_dim),
            of_tile(rows, 1),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
            *held_specs,
        ],
        out_specs=[
            of_tile(heads, rows, head_dim),
            of_tile(heads, rows, 1),
            *logits_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, tiles, heads, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, tiles, heads, rows, 1), jnp.float32),
            *logits_shape,
        ],
        scratch_shapes=[
            pltpu.SemaphoreType.DMA((config.num_buffers,)),
            buffers,
            buffers,
            *held_scratch,
            *logits_scratch,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            disable_bounds_checks=True,  # blocks are cut at the last slot: see _kernel
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * tiles * heads * slots * rows * head_dim,
            bytes_accessed=2 * tiles * k.size * k.dtype.itemsize,
            transcendentals=batch * tiles * heads * slots * rows,
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        bounds,
        _by_tile(q, heads, tiles, tile),
        jnp.tile(positions, (1, 1, group))[..., None],
        k,
        v,
        *held,
    )
    out, lse = (_by_head(x, q.shape, tile) for x in (out, lse))
    if not with_logits:
        return out, lse[..., 0]
    # What no row sees was not computed, and its place not written.
    visible = visible_keys(slots, query_positions, key_positions, window)
    scored = logits[0][..., :slots].reshape(batch, heads, -1, num_rows, slots)
    scored = jnp.where(visible[:, :, None], scored, -jnp.inf)
    return out, lse[..., 0], scored.reshape(batch, num_q_heads, num_rows, slots)


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
    q_ref,  # (Hkv, R, D)
    positions_ref,  # (R, 1) i32
    k,  # (B, Hkv, S, D), HBM
    v,  # (B, Hkv, S, D), HBM
    *refs,  # if slots hold positions of their own: (#B, H, blocks, 1, lanes) i32, HBM
    # out: (Hkv, R, D) f32, (Hkv, R, 1) f32, with logits (B, Hkv, R, S) f32, HBM
    # scratch: (N,) DMA semaphores, two (N, block, D), with positions (N, 1, lanes) i32,
    # with logits (N, R, block) f32 and (N,) DMA semaphores
    has_positions,
    sm_scale,
    window,
    soft_cap,
):
    held, refs = refs[:has_positions], refs[has_positions:]
    out_ref, lse_ref, *refs = refs
    with_logits = len(refs) - has_positions == 6
    logits_refs, refs = refs[:with_logits], refs[with_logits:]
    arrived, k_buffers, v_buffers, *refs = refs
    held_buffers, refs = refs[:has_positions], refs[has_positions:]
    heads = q_ref.shape[0]
    num_buffers, block, _ = k_buffers.shape
    slots = k.shape[2]
    row = pl.program_id(0)
    begin, masked, end, last = (bounds[0, i] for i in range(4))

    def copies(h, i, size, slot):
        part = pl.ds(pl.multiple_of(i * block, 8), size)
        into = pl.ds(0, size)
        pairs = [
            (k.at[row, h, part], k_buffers.at[slot, into]),
            (v.at[row, h, part], v_buffers.at[slot, into]),
        ]
        for positions, buffer in zip(held, held_buffers, strict=True):
            b = 0 if positions.shape[0] == 1 else row
            own = 0 if positions.shape[1] == 1 else h
            pairs.append((positions.at[b, own, i], buffer.at[slot]))
        return [pltpu.make_async_copy(*pair, arrived.at[slot]) for pair in pairs]

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
        logits_buffers, written = refs
        pl.when(count >= num_buffers)(lambda: stored(slot))
        logits_buffers[slot] = logits
        into = logits_refs[0].at[row, h, :, pl.ds(pl.multiple_of(i * block, 8), block)]
        pltpu.make_async_copy(logits_buffers.at[slot], into, written.at[slot]).start()

    def stored(slot):
        logits_buffers, written = refs
        buffer = logits_buffers.at[slot]
        pltpu.make_async_copy(buffer, buffer, written.at[slot]).wait()

    def one_head(h, carry):
        q = q_ref[h]

        def take(i, slot, count, visible, state):
            logits = scaled_logits(q, k_buffers[slot], sm_scale, soft_cap)
            if with_logits:
                store(h, i, slot, count, logits)
            return add_block(state, logits, v_buffers[slot], visible)

        def whole_block(i, carry):
            cursor, slot, count, state = carry
            cursor = fetch(cursor)
            for copy in copies(h, i, block, slot):
                copy.wait()
            return cursor, after(slot), count + 1, take(i, slot, count, None, state)

        def cut_block(i, carry):
            cursor, slot, count, state = carry
            cursor = fetch(cursor)
            each_copy(h, i, slot, lambda copy: copy.wait())
            clear(v_buffers.at[slot], last + 1 - i * block)
            own = i * block + lax.broadcasted_iota(jnp.int32, (1, block), 1)
            inside = own <= last
            for buffer in held_buffers:
                own = buffer[slot][:, :block]
            visible = inside & (own >= 0) & (own <= positions_ref[...])
            if window is not None:
                visible &= own > positions_ref[...] - window
            return cursor, after(slot), count + 1, take(i, slot, count, visible, state)

        carry = (*carry, empty(*q.shape))
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
