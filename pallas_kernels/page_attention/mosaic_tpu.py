"""`page_attention` on TPU: pages copied by id into a ring of buffers in VMEM.

One program per batch row goes through its lists of pages, a block of pages at a time:
online softmax, keys and values in one copy a page, several blocks on their way while
one is used, also across lists. XLA first sorts each list: pages that every query row
sees in full, then pages cut by a row's position or mask, which alone are masked, then
none.
Bytes per block: `block_tokens * 2 * D * itemsize`; nothing else grows with the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.mosaic_tpu import (
    LANES,
    add_block,
    clear,
    empty,
    finish,
    scaled_logits,
)
from pallas_kernels.dispatch import device_kind
from pallas_kernels.page_attention import tuning

SMEM_BYTES = 1 << 20
MAX_ROWS = 256  # query rows a list: logits of a block stay within a megabyte
MASK_BITS = 32  # a page's flags of all T rows are one number
MAX_COPIES = 32  # per block; each is an unrolled instruction sequence


def unsupported(
    q, pages, page_ids, query_positions, mask, *, sm_scale, alpha
) -> str | None:
    """Why the kernel cannot, from shapes and dtypes; None if it can."""
    del query_positions, sm_scale
    if alpha != 1:
        return f"{alpha=}: its softmax merges blocks, which entmax cannot"
    head_dim, page_size = q.shape[3], pages.shape[3]
    lists, listed = page_ids.shape[1:]
    rows = q.shape[1] * q.shape[2] // lists
    if q.dtype != pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {q.dtype}, {pages.dtype} must be both bfloat16 or both float32"
    if head_dim != 64 and head_dim % LANES:
        return f"D={head_dim} must be 64 or a multiple of {LANES}"
    if page_size % 8:
        return f"P={page_size} must be a multiple of 8"
    if not 1 <= rows <= MAX_ROWS:
        return f"{rows} query rows a list must be in [1, {MAX_ROWS}]"
    # Two rows of the batch at once: one in use, one on its way.
    id_bytes = 2 * 4 * (lists + 1) * (listed + MAX_COPIES)
    if mask is not None:
        id_bytes *= 2
        if q.shape[2] > MASK_BITS:
            return f"a mask of T={q.shape[2]} rows must be of at most {MASK_BITS}"
    if listed < 1 or id_bytes > SMEM_BYTES - (64 << 10):
        return (
            f"{lists} lists of {listed} ids must be in [1, {SMEM_BYTES}] bytes, twice"
        )
    return None


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    *,
    sm_scale,
    alpha,
    interpret=False,
    config=None,
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    del alpha  # 1
    batch, num_q_heads, num_rows, head_dim = q.shape
    num_kv_heads, num_pages, page_size, width = pages.shape[1:]
    lists = page_ids.shape[1]
    if config is None:
        config = tuning.lookup(device_kind(), str(pages.dtype), head_dim, page_size)
    copies = max(1, min(config.block_tokens // page_size, MAX_COPIES))
    copies = min(copies, page_ids.shape[2])
    block = copies * page_size
    rows = num_q_heads // lists * num_rows

    ids, counts = _schedule(page_ids, pages, query_positions, mask, copies)
    q = q.reshape(batch, lists, rows, head_dim)
    lanes = max(head_dim, LANES)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim)))
    positions = jnp.tile(query_positions, (1, rows // num_rows))[..., None]
    bit = jnp.tile(1 << jnp.arange(num_rows, dtype=jnp.int32), rows // num_rows)

    def row_of_batch(*shape, **space):
        return pl.BlockSpec((None, *shape), lambda b: (b,) + (0,) * len(shape), **space)

    read = batch * lists * page_ids.shape[2] * page_size
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            copies=copies,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            sm_scale=sm_scale,
        ),
        grid=(batch,),
        in_specs=[
            row_of_batch(*ids.shape[1:], memory_space=pltpu.SMEM),
            row_of_batch(1, counts.shape[2], memory_space=pltpu.SMEM),
            row_of_batch(lists, rows, lanes),
            row_of_batch(rows, 1),
            pl.BlockSpec((rows, 1), lambda b: (0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[row_of_batch(lists, rows, lanes), row_of_batch(lists, rows, 1)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, lists, rows, lanes), jnp.float32),
            jax.ShapeDtypeStruct((batch, lists, rows, 1), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((config.num_buffers, block, width), pages.dtype),
            pltpu.SemaphoreType.DMA((config.num_buffers,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            disable_bounds_checks=True,  # ids are in range: see _schedule
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * read * rows * width,
            bytes_accessed=read * width * pages.dtype.itemsize,
            transcendentals=read * rows,
        ),
        interpret=interpret,
        name="page_attention",
    )(
        ids,
        counts,
        q,
        positions,
        bit[:, None],
        pages.reshape(batch * num_kv_heads * num_pages, page_size, width),
    )
    out = out[..., lanes - head_dim :]  # D = 64: the lanes that met the values
    return out.reshape(batch, num_q_heads, num_rows, head_dim), lse.reshape(
        batch, num_q_heads, num_rows
    )


def _schedule(page_ids, pages, query_positions, mask, copies):
    """Sorted ids `(B, 1, H * K' + copies)` and counts `(B, 1, 2 * H + 3)`.

    Counts of pages that every row sees in full, by list, then of pages that any sees,
    then the last position seen. A list without pages follows the last, to run into.
    With a mask, a second row of the ids says which rows see the page, a bit for each.
    """
    batch, _, listed = page_ids.shape
    num_pages, page_size = pages.shape[2:4]
    first, last = query_positions.min(1), query_positions.max(1)
    start = page_ids * page_size
    is_full = start + page_size - 1 <= first[:, None, None]
    is_seen = (start <= last[:, None, None]) & (page_ids >= 0) & (page_ids < num_pages)
    rows = []
    if mask is not None:
        is_full &= mask.all(-1)
        is_seen &= mask.any(-1)
        bit = 1 << jnp.arange(mask.shape[3], dtype=jnp.int32)
        rows = [jnp.where(mask, bit, 0).sum(-1, dtype=jnp.int32)]
    kind = jnp.where(is_seen, jnp.where(is_full, 0, 1), 2)
    # One key instead of a pair; three times the pages of a row are far below 2**31.
    key = kind * num_pages + jnp.where(is_seen, page_ids, 0)
    key, *rows = lax.sort((key, *rows), num_keys=1)
    padding = ((0, 0), (0, 0), (0, -listed % copies))
    lines = [
        jnp.pad(x, padding).reshape(batch, 1, -1) for x in (key % num_pages, *rows)
    ]
    ids = jnp.pad(jnp.concatenate(lines, axis=1), ((0, 0), (0, 0), (0, copies)))
    full = (kind == 0).sum(-1, dtype=jnp.int32)
    seen = (kind < 2).sum(-1, dtype=jnp.int32)
    zero = jnp.zeros((batch, 1), jnp.int32)
    counts = jnp.concatenate([full, zero, seen, zero, last[:, None]], axis=1)
    return ids, counts.reshape(batch, 1, -1)


def _kernel(
    # in
    ids,  # (1, L * K' + copies) i32, SMEM; with a mask (2, ...)
    counts,  # (1, 2 * L + 3) i32, SMEM
    q_ref,  # (L, R, lanes)
    positions_ref,  # (R, 1) i32
    bit_ref,  # (R, 1) i32
    pages,  # (B * Hkv * NP, P, 2 D), HBM
    # out
    out_ref,  # (L, R, lanes) f32
    lse_ref,  # (L, R, 1) f32
    # scratch
    buffers,  # (N, block, 2 D)
    arrived,  # (N,) DMA semaphores
    *,
    copies,
    head_dim,
    num_kv_heads,
    sm_scale,
):
    lists, rows, lanes = q_ref.shape
    num_buffers, block, _ = buffers.shape
    page_size = block // copies
    listed = (ids.shape[1] - copies) // lists
    num_pages = pages.shape[0] // (pl.num_programs(0) * num_kv_heads)
    first_head = pl.program_id(0) * num_kv_heads
    last = counts[0, 2 * lists + 2]
    has_mask = ids.shape[0] == 2

    def full(n):
        return counts[0, n]

    def seen(n):
        return counts[0, lists + 1 + n]

    def num_blocks(n):  # an empty list has one too, of no page
        return jnp.maximum(pl.cdiv(seen(n), copies), 1)

    def copy(n, index, j, slot):
        head = first_head + lax.div(n, lists // num_kv_heads)
        page = pages.at[head * num_pages + ids[0, n * listed + index]]
        into = buffers.at[slot, pl.ds(j * page_size, page_size)]
        return pltpu.make_async_copy(page, into, arrived.at[slot])

    def after(slot):
        return lax.select(slot == num_buffers - 1, 0, slot + 1)

    def fetch(cursor):
        """Starts the copies of a block; returns the one after it."""
        n, i, slot = cursor
        for j in range(copies):
            index = i * copies + j
            pl.when(index < seen(n))(copy(n, index, j, slot).start)
        is_last = i + 1 >= num_blocks(n)
        # Past the last list comes one without pages, for ever.
        n = lax.select(is_last, jnp.minimum(n + 1, lists), n)
        return n, lax.select(is_last, 0, i + 1), after(slot)

    def take(q, slot, visible, state):
        fused = buffers[slot]
        k, v = fused, fused  # D = 64: q is 0 where the values are
        if head_dim >= LANES:
            k, v = fused[:, :head_dim], fused[:, head_dim:]
        return add_block(state, scaled_logits(q, k, sm_scale), v, visible)

    def one_list(n, carry):
        q = q_ref[n]
        whole = lax.div(full(n), copies)

        def whole_block(_, carry):
            cursor, slot, state = carry
            cursor = fetch(cursor)
            # One wait for the bytes of all its copies.
            pltpu.make_async_copy(
                buffers.at[slot], buffers.at[slot], arrived.at[slot]
            ).wait()
            return cursor, after(slot), take(q, slot, None, state)

        def cut_block(i, carry):
            cursor, slot, state = carry
            cursor = fetch(cursor)
            token = lax.broadcasted_iota(jnp.int32, (1, block), 1)
            key_positions = jnp.full((1, block), last + 1, jnp.int32)
            rows_seeing = jnp.zeros((1, block), jnp.int32)
            for j in range(copies):
                index = i * copies + j
                is_here = index < seen(n)
                pl.when(is_here)(copy(n, index, j, slot).wait)
                first = ids[0, n * listed + index] * page_size
                valid = jnp.where(is_here, jnp.clip(last + 1 - first, 0, page_size), 0)
                clear(buffers.at[slot, pl.ds(j * page_size, page_size)], valid)
                offset = token - j * page_size
                is_in_page = (offset >= 0) & (offset < valid)
                key_positions = jnp.where(is_in_page, first + offset, key_positions)
                if has_mask:
                    seeing = ids[1, n * listed + index]
                    rows_seeing = jnp.where(is_in_page, seeing, rows_seeing)
            visible = key_positions <= positions_ref[...]
            if has_mask:
                visible &= (rows_seeing & bit_ref[...]) != 0
            return cursor, after(slot), take(q, slot, visible, state)

        carry = (*carry, empty(rows, lanes))
        carry = lax.fori_loop(0, whole, whole_block, carry)
        cursor, slot, state = lax.fori_loop(whole, num_blocks(n), cut_block, carry)
        out_ref[n], lse_ref[n] = finish(state)
        return cursor, slot

    cursor = (jnp.int32(0),) * 3
    cursor = lax.fori_loop(0, num_buffers - 1, lambda _, c: fetch(c), cursor)
    lax.fori_loop(0, lists, one_list, (cursor, jnp.int32(0)))
