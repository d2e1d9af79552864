"""`page_attention` on TPU: pages copied by id into a ring of buffers in VMEM.

One program per batch row goes through its lists of pages, a block of pages at a time:
online softmax, keys and values in one copy a page, several blocks on their way while
one is used, also across lists.
Bytes per block: `block_tokens * 2 * D * itemsize`; nothing else grows with the cache.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import device_kind
from pallas_kernels.page_attention import tuning
from pallas_kernels.shared import tpu_lists
from pallas_kernels.shared.tpu_blocks import (
    LANES,
    add_block,
    clear,
    dot,
    empty,
    finish,
    scaled_logits,
)
from pallas_kernels.shared.tpu_lists import Lists

MAX_FEATURES = 128  # of a surrogate


def unsupported(
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    first_position=0,
) -> str | None:
    """Says why the kernel cannot, from shapes and dtypes; None if it can."""
    del query_positions, initial, sm_scale, first_position
    reason = tpu_lists.unsupported(q, pages, page_ids, mask)
    if reason is None and surrogate is not None:
        features = surrogate.shift.shape[2]
        if features > MAX_FEATURES:
            return f"{features} features must be at most {MAX_FEATURES}"
    return reason


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    first_position=0,
    interpret=False,
    config=None,
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    if config is None:
        kind, dtype = device_kind(), str(pages.dtype)
        config = tuning.lookup(kind, dtype, q.shape[3], pages.shape[3])
    sizes = tpu_lists.tiles(q, pages, page_ids, *config)
    beside = ()
    if initial is not None:
        beside += _start(initial, sizes)
    if surrogate is not None:
        beside += _padded(surrogate, sizes)
    return tpu_lists.call(
        functools.partial(
            _kernel, has_initial=initial is not None, first_position=first_position
        ),
        q,
        pages,
        page_ids,
        query_positions,
        mask,
        *beside,
        name="page_attention",
        sizes=sizes,
        results=2 if surrogate is None else 4,
        scratch=[
            pltpu.VMEM((sizes.num_buffers, sizes.block, pages.shape[4]), pages.dtype),
            pltpu.SemaphoreType.DMA((sizes.num_buffers,)),
        ],
        sm_scale=sm_scale,
        first_position=first_position,
        interpret=interpret,
    )


def _start(initial, sizes):
    """Results of other tokens by list: `(B, L, R, lanes)` and `(B, L, R, 1)`."""
    lists, rows = sizes.lists, sizes.rows
    out, lse = (x.reshape(x.shape[0], lists, rows, -1) for x in initial)
    # At D = 64 what is summed lies in the lanes that meet the values.
    before = sizes.lanes - out.shape[3]
    return jnp.pad(out, ((0, 0), (0, 0), (0, 0), (before, 0))), lse


def _padded(surrogate, sizes):
    """Whole tiles of features; what is added has no share."""
    directions, shift, shares = surrogate
    batch, _, features = shift.shape
    more = -features % 8
    padding = (0, 0), (0, 0), (0, more), (0, sizes.lanes - directions.shape[3])
    shares = shares.reshape(batch, sizes.lists, sizes.rows, features)
    return (
        jnp.pad(directions, padding),
        jnp.pad(shift, padding[:3])[..., None],
        jnp.pad(shares, ((0, 0), (0, 0), (0, 0), (0, more))),
    )


def _kernel(
    # in
    ids,  # as `tpu_lists.schedule`, SMEM
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
    weighing, (out_ref, lse_ref, *taken_refs) = [], refs
    if len(refs) > 2:
        *weighing, out_ref, lse_ref, taken_ref, mass_ref = refs
        taken_refs = [taken_ref, mass_ref]
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
    products = dot(stacked, b, contracted)
    return products[:rows] + products[rows : 2 * rows] + products[2 * rows :]
