"""`decode_attention` on Hopper GPUs: the visible part of the cache, by all processors.

A program per KV head, tile of 64 query rows and part of its blocks of 64 tokens: online
softmax, keys and values copied into a ring in shared memory; XLA merges the parts.
There is one tile in decoding and one part where a prompt's tiles fill the device.
Without `key_positions`, blocks behind a tile's last visible position are not read, nor
those before its window, programs share the rest, and only blocks that a row's position
or window cuts are masked.
Codes of a quantised cache become floats in shared memory, a block at a time; turned
rows are read as they are: queries are turned before, and results back.
Bytes per block: `64 * 2 * D * itemsize`, or those of codes and scales, from memory or,
where the tiles of a head are at the same block, from the cache that they share; nothing
else grows with the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention.reference import only_seen
from pallas_kernels.shared import hopper, hopper_codes
from pallas_kernels.shared.hopper import BLOCK, ROWS, plgpu
from pallas_kernels.shared.quantized import turned, unsupported_pair
from pallas_kernels.shared.split_k import merge

STAGES = 2  # blocks in shared memory: one in use, the other on its way


def unsupported(
    q,
    k,
    v,
    query_positions,
    key_positions,
    *,
    sm_scale,
    window,
    soft_cap,
    with_logits,
) -> str | None:
    """Says why the kernel cannot, from shapes, dtypes and device; None if it can."""
    del query_positions, key_positions, sm_scale, window, soft_cap
    if k.shape[2] % 8 or k.shape[2] < BLOCK:
        return f"{k.shape[2]} slots must be a multiple of 8, and at least {BLOCK}"
    if reason := unsupported_pair(k, v) or hopper_codes.unsupported(k, v):
        return reason
    group = q.shape[1] // k.shape[1]
    # A prompt's rows come in tiles, of which each holds every query head of the group.
    rows = group * (q.shape[2] if with_logits else min(q.shape[2], 1))
    return hopper.unsupported() or hopper.unsupported_rows(q, k, rows)


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
):
    """See :func:`pallas_kernels.decode_attention.decode_attention`."""
    batch, *_, head_dim = shape = q.shape
    heads, slots = k.shape[1:3]
    blocks = pl.cdiv(slots, BLOCK)
    q, rows_at, positions = hopper.tiled(turned(k, q), query_positions, heads)
    tiles, taken = q.shape[1:3]
    parts = hopper.num_splits(batch * heads * tiles, blocks)

    first, last = positions.min(2), positions.max(2)
    begin, end = jnp.zeros_like(first), jnp.full_like(first, blocks)
    masked = begin
    if key_positions is None:
        end = jnp.clip(last // BLOCK + 1, 0, blocks)
        if window is None:
            masked = jnp.clip((first + 1) // BLOCK, 0, slots // BLOCK)
        else:
            begin = masked = jnp.clip((first - window + 1) // BLOCK, 0, end)
    bounds = jnp.stack([begin, masked, end], axis=2)

    formats = hopper_codes.formats_of(k) + hopper_codes.formats_of(v)
    if formats:
        arrays = k.codes, v.codes, k.scales, v.scales
        rings = [hopper_codes.ring(STAGES, part.codes) for part in formats]
        operands = (hopper.operand(BLOCK, head_dim, dtype=k.dtype),) * 2
    else:
        arrays, operands = (k, v), ()
        rings = [hopper.operand(STAGES, BLOCK, head_dim, dtype=k.dtype)] * 2
    scored = ()
    if with_logits:
        scored = (jax.ShapeDtypeStruct((batch * heads, taken, slots), jnp.float32),)
    out, lse, *scored = hopper.kernel(
        functools.partial(
            _kernel,
            formats=formats,
            is_held=key_positions is not None,
            sm_scale=sm_scale,
            window=window,
            soft_cap=soft_cap,
        ),
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:2], parts, taken, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*q.shape[:2], parts, taken), jnp.float32),
            *scored,
        ),
        grid=(batch * heads, tiles, parts),
        grid_names=("head", "tile", "split"),
        scratch_types=(
            hopper.scratch(head_dim, k.dtype),
            *rings,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            *operands,
        ),
        interpret=interpret,
        kernel_name="decode_attention",
    )(
        bounds,
        rows_at,
        q,
        *arrays,
        *([] if key_positions is None else [key_positions]),
    )
    out, lse = (hopper.untiled(x, shape[:3], heads) for x in merge(out, lse, axis=2))
    results = turned(v, out), lse
    for logits in scored:
        logits = hopper.untiled(logits[:, None], shape[:3], heads)
        seen = only_seen(logits, heads, query_positions, key_positions, window)
        results += (seen,)
    return results


def _kernel(
    # in
    bounds,  # (B, tiles, 3) i32: first block, first masked, end
    positions,  # (B, tiles, 64) i32
    q,  # (B * Hkv, tiles, R, D)
    k,  # (B, Hkv, S, D), or codes
    v,  # (B, Hkv, S, D), or codes
    *refs,  # with codes, scales of both (B, Hkv, S, C) u16; if slots hold positions of
    #   their own: (#B, H, S) i32
    # out: (B * Hkv, tiles, splits, R, D) f32, (B * Hkv, tiles, splits, R) f32; if they
    # are asked for, logits (B * Hkv, R, S) f32, of the only tile
    # scratch: as `hopper.scratch`, two rings (stages, 64, D), q's barrier, theirs; with
    # codes, keys and values (64, D)
    formats,
    is_held,
    sm_scale,
    window,
    soft_cap,
):
    scales, refs = refs[: len(formats)], refs[len(formats) :]
    end = len(refs) - len(formats)
    operands, refs = refs[end:], refs[:end]
    held, refs = refs[:is_held], refs[is_held:]
    out, lse, *scored, buffers, k_ring, v_ring, q_arrived, arrived = refs
    heads, slots = k.shape[1:3]
    taken, head_dim = q.shape[2:]
    stages = k_ring.shape[0]
    n, tile, split = (lax.axis_index(x) for x in ("head", "tile", "split"))
    row, head = lax.div(n, heads), lax.rem(n, heads)
    first, masked, end = (bounds[row, tile, i] for i in range(3))
    start, stop = hopper.share(split, out.shape[2], end - first)
    begin, end = first + start, first + stop
    masked = jnp.clip(masked, begin, end)

    def at(i):
        """First slot of what is copied as block i: the last ones may overlap."""
        return pl.multiple_of(jnp.minimum(i * BLOCK, slots - BLOCK), 8)

    def fetch(i, slot):
        for source, ring in ((k, k_ring), (v, v_ring)):
            part = source.at[row, head, pl.ds(at(i), BLOCK)]
            plgpu.copy_gmem_to_smem(part, ring.at[slot], arrived.at[slot])

    def visible_in(i):
        shape = ROWS, BLOCK
        token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=hopper.tile())
        slot = own = token + at(i)
        for ref in held:
            b = 0 if ref.shape[0] == 1 else row
            h = 0 if ref.shape[1] == 1 else head
            part = ref.at[b, h, pl.ds(at(i), BLOCK)]
            own = plgpu.load(part, layout=hopper.line(), optimized=False)
            own = lax.broadcast_in_dim(own, shape, [1])
        visible = (slot >= i * BLOCK) & (own >= 0) & (own <= rows_at)
        if window is not None:
            visible &= own > rows_at - window
        return visible

    def write(i, logits):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffers["out"][...] = logits
        plgpu.commit_smem()
        for ref in scored:
            plgpu.copy_smem_to_gmem(
                buffers["out"].at[pl.ds(0, taken)],
                ref.at[n, :, pl.ds(at(i), BLOCK)],
            )

    def scales_of(i):
        blocks = (x.at[row, head, pl.ds(at(i), BLOCK)] for x in scales)
        return map(hopper_codes.load_scales, formats, blocks)

    def decoded(slot, read):
        """The keys and the values of a block whose codes have arrived."""
        codes = k_ring.at[slot], v_ring.at[slot]
        for one in zip(formats, codes, read, operands, strict=True):
            hopper_codes.write(*one)
        plgpu.commit_smem()
        return operands

    def step(i, state, is_masked):
        slot = lax.rem(i - begin, stages)
        read = list(scales_of(i))
        visible = visible_in(i) if is_masked else None
        plgpu.barrier_wait(arrived.at[slot])
        keys, values = k_ring.at[slot], v_ring.at[slot]
        if formats:
            keys, values = decoded(slot, read)
        state = hopper.add_block(
            state,
            buffers["q"],
            keys,
            values,
            buffers["weights"],
            sm_scale,
            visible,
            soft_cap,
            functools.partial(write, i) if scored else None,
        )
        pl.when(i + stages < end)(lambda: fetch(i + stages, slot))
        return state

    plgpu.copy_gmem_to_smem(q.at[n, tile], buffers["q"].at[pl.ds(0, taken)], q_arrived)
    for stage in range(stages):
        i = begin + stage
        pl.when(i < end)(functools.partial(fetch, i, stage))
    own = plgpu.load(positions.at[row, tile], layout=hopper.column(), optimized=False)
    rows_at = hopper.across(own, BLOCK)
    plgpu.barrier_wait(q_arrived)
    state = hopper.empty(head_dim)
    unmasked, cut = (functools.partial(step, is_masked=x) for x in (False, True))
    state = lax.fori_loop(begin, masked, unmasked, state)
    state = lax.fori_loop(masked, end, cut, state)
    hopper.store(state, buffers, out.at[n, tile, split], lse.at[n, tile, split])
