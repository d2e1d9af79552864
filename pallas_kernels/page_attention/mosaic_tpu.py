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
    dot,
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
MAX_FEATURES = 128  # of a surrogate
MAX_COPIES = 32  # per block; each is an unrolled instruction sequence


def unsupported(
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    tau=None,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    alpha,
    first_position=0,
) -> str | None:
    """Why the kernel cannot, from shapes and dtypes; None if it can."""
    del query_positions, tau, initial, sm_scale, first_position
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
    if surrogate is not None and surrogate.shift.shape[2] > MAX_FEATURES:
        return f"{surrogate.shift.shape[2]} features must be at most {MAX_FEATURES}"
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
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    alpha,
    first_position=0,
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

    ids, counts = schedule(
        page_ids, pages, query_positions, mask, copies, first_position
    )
    q = q.reshape(batch, lists, rows, head_dim)
    lanes = max(head_dim, LANES)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim)))
    positions = jnp.tile(query_positions, (1, rows // num_rows))[..., None]
    bit = jnp.tile(1 << jnp.arange(num_rows, dtype=jnp.int32), rows // num_rows)

    def row_of_batch(*shape, **space):
        return pl.BlockSpec((None, *shape), lambda b: (b,) + (0,) * len(shape), **space)

    of_rows = (lists, rows, lanes), (lists, rows, 1)
    # At D = 64 what is summed lies in the lanes that meet the values.
    before = ((0, 0), (0, 0), (0, 0), (lanes - head_dim, 0))
    given, sums = [], 2
    if initial is not None:
        out, lse = (x.reshape(batch, lists, rows, -1) for x in initial)
        given += [jnp.pad(out, before), lse]
    if surrogate is not None:
        directions, shift, shares = surrogate
        count = shift.shape[2]
        more = -count % 8  # whole tiles; what is added has no share
        padding = ((0, 0), (0, 0), (0, more), (0, lanes - head_dim))
        shares = shares.reshape(batch, lists, rows, count)
        given += [
            jnp.pad(directions, padding),
            jnp.pad(shift, padding[:3])[..., None],
            jnp.pad(shares, ((0, 0), (0, 0), (0, 0), (0, more))),
        ]
        sums = 4
    if alpha == 1:
        kernel = functools.partial(
            _kernel, has_initial=initial is not None, first_position=first_position
        )
        scratch = [
            pltpu.VMEM((config.num_buffers, block, width), pages.dtype),
            pltpu.SemaphoreType.DMA((config.num_buffers,)),
        ]
    else:
        kernel = functools.partial(entmax_tpu.kernel, alpha=alpha)
        scratch = entmax_tpu.scratch(
            page_ids.shape[2], rows, head_dim, pages.dtype, config, copies, page_size
        )
        given = [] if tau is None else [tau.reshape(batch, lists, rows, 1)]
    read = batch * lists * page_ids.shape[2] * page_size
    found = pl.pallas_call(
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
            *(row_of_batch(*x.shape[1:]) for x in given),
        ],
        out_specs=[row_of_batch(*shape) for shape in (*of_rows, *of_rows)[:sums]],
        out_shape=[
            jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
            for shape in (*of_rows, *of_rows)[:sums]
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
    shape = batch, num_q_heads, num_rows

    def of_values(x):
        return x[..., lanes - head_dim :].reshape(*shape, head_dim)

    return tuple(
        x.reshape(shape) if i % 2 else of_values(x) for i, x in enumerate(found)
    )


def _kernel(
    # in
    ids,  # as `lists.schedule`, SMEM
    counts,
    q_ref,  # (L, R, lanes)
    positions_ref,  # (R, 1) i32
    bit_ref,  # (R, 1) i32
    pages,  # (B * Hkv * NP, P, 2 D), HBM
    *refs,  # if given, where to start: (L, R, lanes) f32, (L, R, 1) f32
    #   if given, a surrogate: (Hkv, F, lanes), (Hkv, F, 1) and (L, R, F), f32
    # out
    #   out_ref (L, R, lanes) f32, lse_ref (L, R, 1) f32; of a surrogate, as many more
    # scratch
    #   buffers (N, block, 2 D); arrived (N,) DMA semaphores
    copies,
    head_dim,
    num_kv_heads,
    sm_scale,
    has_initial,
    first_position,
):
    *refs, buffers, arrived = refs
    start_refs, refs = (refs[:2], refs[2:]) if has_initial else ((), refs)
    weighing, taken_refs = (), ()
    if len(refs) > 2:
        *weighing, out_ref, lse_ref, taken_ref, mass_ref = refs
        taken_refs = taken_ref, mass_ref
    else:
        out_ref, lse_ref = refs
    number, rows, lanes = q_ref.shape
    lists = Lists.of(ids, counts, pages, q_ref, buffers, copies, num_kv_heads)
    num_buffers = lists.num_buffers

    def copy(n, index, j, slot):
        into = lists.target(buffers, slot, j)
        return pltpu.make_async_copy(lists.source(n, index), into, arrived.at[slot])

    def start(n):
        """The state of a list before its first block, and its surrogate's sums."""
        state = empty(rows, lanes)
        sums = state[2], state[1]  # zeros
        if start_refs:
            out, lse = start_refs[0][n], start_refs[1][n]
            saw = lse > -jnp.inf
            m = jnp.where(saw, lse, state[0])
            state = m, jnp.where(saw, 1.0, 0.0), jnp.where(saw, out, 0.0)
        return state, sums if weighing else ()

    def take(n, q, slot, visible, states):
        fused = buffers[slot]
        k, v = fused, fused  # D = 64: q is 0 where the values are
        if head_dim >= LANES:
            k, v = fused[:, :head_dim], fused[:, head_dim:]
        state, sums = states
        state = add_block(state, scaled_logits(q, k, sm_scale), v, visible)
        if weighing:
            sums = weigh(n, k, v, visible, sums)
        return state, sums

    def weigh(n, k, v, visible, sums):
        """The sums with a block's values and weights, of the surrogate."""
        directions, shift, shares = weighing
        head = lax.div(n, number // num_kv_heads)
        features = jnp.exp(_wide_dot(directions[head], k, 1) - shift[head])
        weights = dot(shares[n], features, 0)
        if visible is not None:
            weights = jnp.where(visible, weights, 0.0)
        taken, mass = sums
        return taken + _wide_dot(weights, v, 0), mass + weights.sum(1, keepdims=True)

    def one_list(n, carry):
        q = q_ref[n]

        def whole_block(_, carry):
            cursor, slot, state = carry
            cursor = lists.fetch(cursor, copy)
            # One wait for the bytes of all its copies.
            pltpu.make_async_copy(
                buffers.at[slot], buffers.at[slot], arrived.at[slot]
            ).wait()
            return cursor, lists.after(slot), take(n, q, slot, None, state)

        def cut_block(i, carry):
            cursor, slot, state = carry
            cursor = lists.fetch(cursor, copy)
            for j in range(copies):
                index = i * copies + j
                pl.when(index < lists.seen(n))(copy(n, index, j, slot).wait)
                clear(lists.target(buffers, slot, j), lists.valid(n, index))
            visible = lists.visible(
                n, i, positions_ref[...], bit_ref[...], first_position
            )
            return cursor, lists.after(slot), take(n, q, slot, visible, state)

        carry = (*carry, start(n))
        whole = lists.whole(n)
        carry = lax.fori_loop(0, whole, whole_block, carry)
        carry = lax.fori_loop(whole, lists.num_blocks(n), cut_block, carry)
        cursor, slot, (state, sums) = carry
        out_ref[n], lse_ref[n] = finish(state)
        for ref, total in zip(taken_refs, sums, strict=True):
            ref[n] = total
        return cursor, slot

    cursor = (jnp.int32(0),) * 3
    cursor = lax.fori_loop(
        0, num_buffers - 1, lambda _, c: lists.fetch(c, copy), cursor
    )
    lax.fori_loop(0, number, one_list, (cursor, jnp.int32(0)))


def _wide_dot(a, b, contracted):
    """`dot` of float32 with any dtype, exact in its products.

    With bfloat16 in one matmul: 8 bits of `a` at a time are three rows for one, where
    two float32 would be multiplied in six, and every one would load `b` again.
    """
    if b.dtype == jnp.float32:
        return dot(a, b, contracted)
    parts, rest = [], a
    for _ in range(2):
        # Cut, not rounded: a conversion there and back may be left out.
        bits = lax.bitcast_convert_type(rest, jnp.int32) & -(1 << 16)
        parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        rest = rest - parts[-1]
    rows = a.shape[0]
    stacked = jnp.concatenate([*parts, rest], axis=0).astype(b.dtype)
    found = dot(stacked, b, contracted)
    return found[:rows] + found[rows : 2 * rows] + found[2 * rows :]
