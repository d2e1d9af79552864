"""`page_attention` on TPU: pages copied by id into a ring of buffers in VMEM.

One program per batch row goes through its lists of pages, a block of pages at a time:
online softmax, keys and values in one copy a page, several blocks on their way while
one is used, also across lists.
Bytes per block: `block_tokens * 2 * D * itemsize`; nothing else grows with the cache.
Of quantised pages codes and scales are copied, a copy each.

More query rows a list than a program takes, as of a segment of a prompt, come in tiles,
each of which reads the list again: so many rows are bound by arithmetic.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import device_kind
from pallas_kernels.page_attention import tuning
from pallas_kernels.shared import quantized, tpu_lists, tpu_operands
from pallas_kernels.shared.quantized import Quantized, turned
from pallas_kernels.shared.split_k import joined
from pallas_kernels.shared.tpu_blocks import (
    LANES,
    add_weighted,
    dot,
    empty,
    finish,
    scaled,
    wide_dot,
)
from pallas_kernels.shared.tpu_lists import Lists, Together

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
    del query_positions, sm_scale, first_position
    if mask is None and initial is None and surrogate is None:
        q = jax.ShapeDtypeStruct(
            (*q.shape[:2], _queries_of_tile(q, page_ids), q.shape[3]), q.dtype
        )
    del initial
    reason = tpu_lists.unsupported_sizes(q, pages, page_ids, mask)
    if reason is None and isinstance(pages, Quantized):
        if surrogate is not None:
            return "a surrogate needs the numbers of keys, and pages are quantised"
        rows = q.shape[1] * q.shape[2] // page_ids.shape[1]
        reason = _unsupported_codes(pages, rows)
    if reason is None and surrogate is not None:
        features = surrogate.shift.shape[2]
        if features > MAX_FEATURES:
            return f"{features} features must be at most {MAX_FEATURES}"
    return reason


def _unsupported_codes(pages, rows):
    page_size, width = pages.codes.shape[3:]
    if page_size % 32:  # bytes in a tile
        return f"P={page_size} of quantised pages must be a multiple of 32"
    if width % LANES and (page_size % LANES or width % 32):
        # XLA lays them out with pages last, and would copy all of them.
        return (
            f"{width} bytes of codes a row must be a multiple of {LANES}, or of 32 in "
            f"pages of a multiple of {LANES}, not P={page_size}"
        )
    is_cut = any(x.bits == 4 and x.codes % LANES for x in pages.layout.parts)
    if is_cut and width > LANES and not width % LANES:
        # Two parts of a tile of lanes are told apart in rows of one tile alone.
        return (
            f"D={pages.shape[4] // 2} in rows of {width} bytes must be a multiple of "
            f"{2 * LANES} for 4 bits"
        )
    return tpu_operands.unsupported_rows(rows, *pages.layout.parts)


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
    static = {"sm_scale": sm_scale, "first_position": first_position}
    static |= {"interpret": interpret, "config": config}
    if q.shape[2] > _queries_of_tile(q, page_ids):
        return _by_tiles(q, pages, page_ids, query_positions, static)
    if config is None:
        kind, dtype = device_kind(), tpu_operands.stored_dtype(pages)
        config = tuning.lookup(kind, dtype, q.shape[3], pages.shape[3])
    sizes = tpu_lists.tiles(q, pages, page_ids, *config)
    keys, values = tpu_operands.fused(pages)
    key_rows, value_rows = quantized.split(pages)
    scheduled = tpu_lists.schedule(
        page_ids, pages, query_positions, mask, sizes.copies, first_position
    )
    is_quantized = isinstance(pages, Quantized)
    streams = [tpu_lists.flat_pages(x) for x in keys.arrays(pages)]
    blocks = [
        _block_shape(x, is_last, sizes)
        for x, is_last in zip(streams, keys.tokens_last, strict=True)
    ]
    beside = ()
    if initial is not None and not is_quantized:
        beside += _start(initial, sizes)
    if surrogate is not None:
        beside += _padded(surrogate, sizes)
    rows = keys.rows(sizes.rows)
    shapes = [(sizes.lists, rows, x) for x in (values.width, 1)]
    by_list = (*q.shape[:1], sizes.lists, sizes.rows, q.shape[3])
    outputs = tpu_lists.run(
        functools.partial(
            _kernel,
            keys=keys,
            values=values,
            has_initial=initial is not None and not is_quantized,
            has_surrogate=surrogate is not None,
            first_position=first_position,
        ),
        scheduled,
        keys.queries(turned(key_rows, q).reshape(by_list)),
        query_positions,
        streams,
        *beside,
        name="page_attention",
        sizes=sizes,
        shapes=shapes if surrogate is None else shapes * 2,
        scratch=[
            *(
                pltpu.VMEM((sizes.num_buffers, *block), x.dtype)
                for block, x in zip(blocks, streams, strict=True)
            ),
            pltpu.SemaphoreType.DMA((len(streams), sizes.num_buffers)),
        ],
        num_kv_heads=pages.shape[1],
        sm_scale=sm_scale,
        interpret=interpret,
    )
    out, lse, *sums = (
        x[..., : sizes.rows, :].reshape(q.shape[:3])
        if i % 2
        else values.outputs(x)[..., : sizes.rows, :].reshape(q.shape)
        for i, x in enumerate(outputs)
    )
    out = turned(value_rows, out)
    # What is turned does not start from what is not.
    return *joined(out, lse, initial if is_quantized else None), *sums


def _queries_of_tile(q, page_ids):
    """The queries of a head that a program takes: of all heads of a list, its rows."""
    group = q.shape[1] // page_ids.shape[1]
    return min(q.shape[2], max(tpu_lists.MAX_ROWS // group, 1))


def _by_tiles(q, pages, page_ids, query_positions, static):
    """Calls the kernel for some queries at a time."""
    batch, heads, num_rows, head_dim = q.shape
    size = _queries_of_tile(q, page_ids)
    tiles = -(-num_rows // size)
    padding = tiles * size - num_rows
    # A padded row sees nothing.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    positions = jnp.pad(query_positions, ((0, 0), (0, padding)), constant_values=-1)

    def tile(part):
        some, where = part
        return page_attention(some, pages, page_ids, where, None, **static)

    parts = (
        jnp.moveaxis(q.reshape(batch, heads, tiles, size, head_dim), 2, 0),
        jnp.moveaxis(positions.reshape(batch, tiles, size), 1, 0),
    )
    out, lse = lax.map(tile, parts)
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, tiles * size, head_dim)
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, tiles * size)
    return out[:, :, :num_rows], lse[:, :, :num_rows]


def _block_shape(stream, tokens_last, sizes):
    _, *page = stream.shape
    if not tokens_last:
        return sizes.block, page[1]
    if page[1] % LANES:
        return sizes.copies, *page
    return page[0], sizes.block


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
    q_ref,  # (L, R, lanes), of codes (L, N, lanes)
    *refs,  # of codes, sums of queries: (L, groups, R, 1) f32
    #   positions_ref, bit_ref (R, 1) i32
    #   pages (B * Hkv * NP, P, 2 D), HBM; or codes, and scales (B * Hkv * NP, C, P)
    #   if given, where to start: (L, R, lanes) f32, (L, R, 1) f32
    #   if given, a surrogate: (Hkv, F, lanes), (Hkv, F, 1) and (L, R, F), f32
    # out
    #   out_ref (L, R, lanes) f32, lse_ref (L, R, 1) f32; of a surrogate, as many more
    # scratch
    #   buffers (N, block, 2 D), of scales (N, C, block) or (N, copies, C, P); arrived,
    #   DMA semaphores (streams, N)
    keys,
    values,
    copies,
    num_kv_heads,
    sm_scale,
    has_initial,
    has_surrogate,
    first_position,
):
    given, parts = iter(refs), len(keys.tokens_last)

    def next_refs(number):
        return list(itertools.islice(given, number))

    query_refs = [q_ref, *next_refs(parts - 1)]
    positions_ref, bit_ref = next_refs(2)
    streams = next_refs(parts)
    start_refs, weighing = next_refs(2 * has_initial), next_refs(3 * has_surrogate)
    out_ref, lse_ref = next_refs(2)
    taken_refs = next_refs(2 * has_surrogate)
    *buffers, arrived = given
    number, num_buffers = q_ref.shape[0], arrived.shape[1]
    lists = Lists.of(
        ids,
        counts,
        streams[0],
        q_ref,
        buffers[0],
        copies,
        num_kv_heads,
        tokens_last=keys.tokens_last[0],
    )

    def copy(n, index, j, slot):
        """The copies of what a page is, as one."""
        return Together(
            pltpu.make_async_copy(
                stream.at[lists.place(n, index)],
                lists.target(buffer, slot, j, is_last),
                arrived.at[i, slot],
            )
            for i, (stream, buffer, is_last) in enumerate(
                zip(streams, buffers, keys.tokens_last, strict=True)
            )
        )

    def start(n):
        """The state of a list before its first block, and its surrogate's sums."""
        state = empty(*out_ref.shape[1:])
        sums = state[2], state[1]  # zeros
        if start_refs:
            out, lse = start_refs[0][n], start_refs[1][n]
            saw = lse > -jnp.inf
            m = jnp.where(saw, lse, state[0])
            state = m, jnp.where(saw, 1.0, 0.0), jnp.where(saw, out, 0.0)
        return state, sums if weighing else ()

    def take(n, queries, slot, states, visible=None, held=None):
        block = [x[slot] for x in buffers]
        state, sums = states
        state = add_weighted(
            state,
            scaled(keys.logits(queries, block), sm_scale),
            visible,
            functools.partial(values.weighted, block=block, held=held),
        )
        if weighing:
            k, v = keys.numbers(block), values.numbers(block)
            sums = weigh(n, k, v, visible, sums)
        return state, sums

    def weigh(n, k, v, visible, sums):
        """The sums with a block's values and weights, of the surrogate."""
        directions, shift, shares = weighing
        head = lax.div(n, number // num_kv_heads)
        features = jnp.exp(wide_dot(directions[head], k, 1) - shift[head])
        weights = dot(shares[n], features, 0)
        if visible is not None:
            weights = jnp.where(visible, weights, 0.0)
        taken, mass = sums
        return taken + wide_dot(weights, v, 0), mass + weights.sum(1, keepdims=True)

    def one_list(n, carry):
        queries = [x[n] for x in query_refs]

        def whole_block(_, carry):
            cursor, slot, state = carry
            cursor = lists.fetch(cursor, copy)
            # One wait for the bytes of all its copies.
            for i, x in enumerate(buffers):
                block = x.at[slot]
                pltpu.make_async_copy(block, block, arrived.at[i, slot]).wait()
            return cursor, lists.after(slot), take(n, queries, slot, state)

        def cut_block(i, carry):
            cursor, slot, state = carry
            cursor = lists.fetch(cursor, copy)
            for j in range(copies):
                index = i * copies + j
                pl.when(index < lists.seen(n))(copy(n, index, j, slot).wait)
                page = [
                    lists.target(x, slot, j, is_last)
                    for x, is_last in zip(buffers, keys.tokens_last, strict=True)
                ]
                values.clear(page, lists.valid(n, index))
            visible = lists.visible(
                n, i, positions_ref[...], bit_ref[...], first_position
            )
            state = take(n, queries, slot, state, visible, lists.held(n, i))
            return cursor, lists.after(slot), state

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
