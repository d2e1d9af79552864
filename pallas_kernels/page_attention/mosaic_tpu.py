"""`page_attention` on TPU: pages copied by id into a ring of buffers in VMEM.

One program per batch row goes through its lists of pages, a block of pages at a time:
online softmax, keys and values in one copy a page, several blocks on their way while
one is used, also across lists.
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
from pallas_kernels.page_attention import entmax_tpu, tuning
from pallas_kernels.page_attention.lists import Lists, schedule

SMEM_BYTES = 1 << 20
MAX_ROWS = 256  # query rows a list: logits of a block stay within a megabyte
MASK_BITS = 32  # a page's flags of all T rows are one number
SCORE_BYTES = 4 << 20  # entmax: of a list, in VMEM
MAX_COPIES = 32  # per block; each is an unrolled instruction sequence


def unsupported(
    q, pages, page_ids, query_positions, mask, tau=None, *, sm_scale, alpha
) -> str | None:
    """Why the kernel cannot, from shapes and dtypes; None if it can."""
    del query_positions, tau, sm_scale
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
    score_bytes = 4 * listed * page_size * -(-rows // 8) * 8
    if alpha != 1 and score_bytes > SCORE_BYTES:
        return (
            f"scores of {rows} rows and {listed * page_size:,} tokens take "
            f"{score_bytes:,} bytes of VMEM, more than {SCORE_BYTES:,}"
        )
    return None


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    tau=None,
    *,
    sm_scale,
    alpha,
    interpret=False,
    config=None,
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    batch, num_q_heads, num_rows, head_dim = q.shape
    num_kv_heads, num_pages, page_size, width = pages.shape[1:]
    lists = page_ids.shape[1]
    if config is None:
        config = tuning.lookup(device_kind(), str(pages.dtype), head_dim, page_size)
    copies = max(1, min(config.block_tokens // page_size, MAX_COPIES))
    copies = min(copies, page_ids.shape[2])
    block = copies * page_size
    rows = num_q_heads // lists * num_rows

    ids, counts = schedule(page_ids, pages, query_positions, mask, copies)
    q = q.reshape(batch, lists, rows, head_dim)
    lanes = max(head_dim, LANES)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim)))
    positions = jnp.tile(query_positions, (1, rows // num_rows))[..., None]
    bit = jnp.tile(1 << jnp.arange(num_rows, dtype=jnp.int32), rows // num_rows)

    def row_of_batch(*shape, **space):
        return pl.BlockSpec((None, *shape), lambda b: (b,) + (0,) * len(shape), **space)

    if alpha == 1:
        kernel = _kernel
        scratch = [
            pltpu.VMEM((config.num_buffers, block, width), pages.dtype),
            pltpu.SemaphoreType.DMA((config.num_buffers,)),
        ]
    else:
        kernel = functools.partial(entmax_tpu.kernel, alpha=alpha)
        scratch = entmax_tpu.scratch(
            page_ids.shape[2], rows, head_dim, pages.dtype, config, copies, page_size
        )
    given = () if tau is None else (tau.reshape(batch, lists, rows, 1),)
    read = batch * lists * page_ids.shape[2] * page_size
    out, lse = pl.pallas_call(
        functools.partial(
            kernel,
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
            *(row_of_batch(lists, rows, 1) for _ in given),
        ],
        out_specs=[row_of_batch(lists, rows, lanes), row_of_batch(lists, rows, 1)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, lists, rows, lanes), jnp.float32),
            jax.ShapeDtypeStruct((batch, lists, rows, 1), jnp.float32),
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            disable_bounds_checks=True,  # ids are in range: see `lists.schedule`
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
        *given,
    )
    out = out[..., lanes - head_dim :]  # D = 64: the lanes that met the values
    return out.reshape(batch, num_q_heads, num_rows, head_dim), lse.reshape(
        batch, num_q_heads, num_rows
    )


def _kernel(
    # in
    ids,  # as `lists.schedule`, SMEM
    counts,
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
    number, rows, lanes = q_ref.shape
    lists = Lists.of(ids, counts, pages, q_ref, buffers, copies, num_kv_heads)
    num_buffers = lists.num_buffers

    def copy(n, index, j, slot):
        into = lists.target(buffers, slot, j)
        return pltpu.make_async_copy(lists.source(n, index), into, arrived.at[slot])

    def take(q, slot, visible, state):
        fused = buffers[slot]
        k, v = fused, fused  # D = 64: q is 0 where the values are
        if head_dim >= LANES:
            k, v = fused[:, :head_dim], fused[:, head_dim:]
        return add_block(state, scaled_logits(q, k, sm_scale), v, visible)

    def one_list(n, carry):
        q = q_ref[n]

        def whole_block(_, carry):
            cursor, slot, state = carry
            cursor = lists.fetch(cursor, copy)
            # One wait for the bytes of all its copies.
            pltpu.make_async_copy(
                buffers.at[slot], buffers.at[slot], arrived.at[slot]
            ).wait()
            return cursor, lists.after(slot), take(q, slot, None, state)

        def cut_block(i, carry):
            cursor, slot, state = carry
            cursor = lists.fetch(cursor, copy)
            for j in range(copies):
                index = i * copies + j
                pl.when(index < lists.seen(n))(copy(n, index, j, slot).wait)
                clear(lists.target(buffers, slot, j), lists.valid(n, index))
            visible = lists.visible(n, i, positions_ref[...], bit_ref[...])
            return cursor, lists.after(slot), take(q, slot, visible, state)

        carry = (*carry, empty(rows, lanes))
        whole = lists.whole(n)
        carry = lax.fori_loop(0, whole, whole_block, carry)
        carry = lax.fori_loop(whole, lists.num_blocks(n), cut_block, carry)
        cursor, slot, state = carry
        out_ref[n], lse_ref[n] = finish(state)
        return cursor, slot

    cursor = (jnp.int32(0),) * 3
    cursor = lax.fori_loop(
        0, num_buffers - 1, lambda _, c: lists.fetch(c, copy), cursor
    )
    lax.fori_loop(0, number, one_list, (cursor, jnp.int32(0)))
