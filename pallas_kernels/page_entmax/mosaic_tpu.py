"""`page_entmax` on TPU: keys, then the threshold, then the values of the support.

The threshold needs the scores of a whole list, so a list is gone through twice: its
keys fill the scores, which stay in VMEM while the threshold is sought, and then only
the pages that hold a token of the support are read for their values; weights of the
rest are exactly 0. Meanwhile the next list's keys are on their way.

Bytes: the keys of all listed pages and the values of those of the support, once each;
at D = 64, where a page's keys and values lie side by side, both are read both times.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import device_kind
from pallas_kernels.entmax import equations
from pallas_kernels.page_attention import tuning
from pallas_kernels.shared import tpu_lists
from pallas_kernels.shared.tpu_blocks import LANES, MASKED, clear, dot, scaled_logits
from pallas_kernels.shared.tpu_lists import Lists

SCORE_BYTES = 4 << 20  # of a list, in VMEM


def unsupported(
    q, pages, page_ids, query_positions, mask, tau=None, *, sm_scale, alpha
) -> str | None:
    """Says why the kernel cannot, from shapes and dtypes; None if it can."""
    del query_positions, tau, sm_scale, alpha
    reason = tpu_lists.unsupported(q, pages, page_ids, mask)
    if reason is not None:
        return reason
    tokens = page_ids.shape[2] * pages.shape[3]
    rows = q.shape[1] * q.shape[2] // page_ids.shape[1]
    score_bytes = 4 * tokens * -(-rows // 8) * 8
    if score_bytes > SCORE_BYTES:
        return (
            f"scores of {rows} rows and {tokens:,} tokens take "
            f"{score_bytes:,} bytes of VMEM, more than {SCORE_BYTES:,}"
        )
    return None


def page_entmax(
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
    """See :func:`pallas_kernels.page_entmax.page_entmax`."""
    if config is None:
        kind, dtype = device_kind(), str(pages.dtype)
        config = tuning.lookup(kind, dtype, q.shape[3], pages.shape[3])
    sizes = tpu_lists.tiles(q, pages, page_ids, *config)
    blocks = pl.cdiv(page_ids.shape[2], sizes.copies)
    width = q.shape[3] if q.shape[3] >= LANES else 2 * q.shape[3]
    ring = [
        pltpu.VMEM((sizes.num_buffers, sizes.block, width), pages.dtype),
        pltpu.SemaphoreType.DMA((sizes.num_buffers,)),
    ]
    beside = ()
    if tau is not None:
        beside = (tau.reshape(tau.shape[0], sizes.lists, sizes.rows, 1),)
    return tpu_lists.call(
        functools.partial(_kernel, alpha=alpha),
        q,
        pages,
        page_ids,
        query_positions,
        mask,
        *beside,
        name="page_entmax",
        sizes=sizes,
        results=2,
        scratch=[
            *ring,
            *ring,
            pltpu.VMEM((blocks, sizes.rows, sizes.block), jnp.float32),
            pltpu.SMEM((blocks * sizes.copies,), jnp.int32),
        ],
        sm_scale=sm_scale,
        interpret=interpret,
    )


def _kernel(
    # in
    ids,  # as `tpu_lists.schedule`, SMEM
    counts,
    q_ref,  # (L, R, lanes)
    positions_ref,  # (R, 1) i32
    bit_ref,  # (R, 1) i32
    pages,  # (B * Hkv * NP, P, 2 D), HBM
    *refs,  # if the threshold is given: it, (L, R, 1) f32
    # out
    #   out_ref (L, R, lanes) f32, value_ref (L, R, 1) f32
    # scratch
    #   k_buffers (N, block, D), with the values at D = 64: 2 D; their semaphores (N,);
    #   v_buffers and theirs; z_ref (blocks, R, block) f32: logits, then z;
    #   needed (blocks * copies,) i32, SMEM: pages with a token of the support
    copies,
    head_dim,
    num_kv_heads,
    sm_scale,
    alpha,
):
    *given, out_ref, value_ref, k_buffers, k_arrived = refs[:-4]
    v_buffers, v_arrived, z_ref, needed = refs[-4:]
    number, rows, lanes = q_ref.shape
    lists = Lists.of(ids, counts, pages, q_ref, k_buffers, copies, num_kv_heads)
    num_buffers, page_size = lists.num_buffers, lists.page_size

    def copy(buffers, arrived, lane, n, index, j, slot):
        page = lists.source(n, index)
        if head_dim >= LANES:
            page = page.at[:, pl.ds(lane, head_dim)]
        into = lists.target(buffers, slot, j)
        return pltpu.make_async_copy(page, into, arrived.at[slot])

    copy_k = functools.partial(copy, k_buffers, k_arrived, 0)
    copy_v = functools.partial(copy, v_buffers, v_arrived, head_dim)

    def each_needed(n, i, slot, act):
        """Calls `act` with each page of a block that holds a token of the support."""
        for j in range(copies):
            index = i * copies + j
            is_needed = (i < lists.num_blocks(n)) & (needed[index] > 0)
            pl.when(is_needed)(functools.partial(act, n, index, j, slot))

    def fetch_values(n, i, slot):
        each_needed(n, i, slot, lambda *page: copy_v(*page).start())

    def one_list(n, carry):
        q = q_ref[n]
        num_blocks = lists.num_blocks(n)

        def score(i, carry, is_cut):
            cursor, slot, top = carry
            cursor = lists.fetch(cursor, copy_k)
            for j in range(copies):
                index = i * copies + j
                pl.when(index < lists.seen(n))(copy_k(n, index, j, slot).wait)
            logits = scaled_logits(q, k_buffers[slot], sm_scale)
            if is_cut:
                visible = lists.visible(n, i, positions_ref[...], bit_ref[...])
                logits = jnp.where(visible, logits, MASKED)
            z_ref[i] = logits
            top = jnp.maximum(top, logits.max(1, keepdims=True))
            return cursor, lists.after(slot), top

        carry = (*carry, jnp.full((rows, 1), MASKED, jnp.float32))
        whole = lists.whole(n)
        step = functools.partial(score, is_cut=False)
        carry = lax.fori_loop(0, whole, step, carry)
        step = functools.partial(score, is_cut=True)
        cursor, slot, top = lax.fori_loop(whole, num_blocks, step, carry)
        top = jnp.where(top == MASKED, 0.0, top)  # a row that sees no key
        if given:  # its units are those of the logits, whatever the largest is
            top = jnp.zeros_like(top)

        _shift(z_ref, num_blocks, top, alpha)
        tau = given[0][n] if given else _threshold(z_ref, num_blocks, alpha)
        _mark(needed, z_ref, num_blocks, tau, copies, page_size)
        for ahead in range(num_buffers - 1):
            pl.when(ahead < num_blocks)(
                functools.partial(fetch_values, n, jnp.int32(ahead), ahead)
            )

        def weigh(i, carry):
            slot, total, moment, acc = carry
            before = lax.select(slot == 0, num_buffers - 1, slot - 1)
            ahead = i + num_buffers - 1
            pl.when(ahead < num_blocks)(lambda: fetch_values(n, ahead, before))

            def arrive(n, index, j, slot):
                copy_v(n, index, j, slot).wait()
                clear(lists.target(v_buffers, slot, j), lists.valid(n, index))

            each_needed(n, i, slot, arrive)
            excess = jnp.maximum(z_ref[i] - tau, 0.0)
            p, _ = equations.powers(excess, alpha)
            total += p.sum(1, keepdims=True)
            moment += (p * excess).sum(1, keepdims=True)
            values = v_buffers[slot]
            acc += dot(p.astype(values.dtype), values, 0)
            return lists.after(slot), total, moment, acc

        zero = jnp.zeros((rows, 1), jnp.float32)
        carry = jnp.int32(0), zero, zero, jnp.zeros((rows, lanes), jnp.float32)
        _, total, moment, acc = lax.fori_loop(0, num_blocks, weigh, carry)
        if given:
            out_ref[n], value_ref[n] = acc, total
        else:
            out_ref[n] = acc / equations.positive(total)
            value_ref[n] = equations.value(top, tau, total, moment, alpha)
        return cursor, slot

    # Places of pages that are not needed keep what was there: it must be a number.
    v_buffers[...] = jnp.zeros_like(v_buffers)
    cursor = (jnp.int32(0),) * 3
    cursor = lax.fori_loop(
        0, num_buffers - 1, lambda _, c: lists.fetch(c, copy_k), cursor
    )
    lax.fori_loop(0, number, one_list, (cursor, jnp.int32(0)))


def _shift(z_ref, num_blocks, top, alpha):
    """Turns the logits of a list into z."""

    def shift(i, _):
        z_ref[i] = equations.shifted(z_ref[i], top, alpha)
        return _

    lax.fori_loop(0, num_blocks, shift, 0)


def _mark(needed, z_ref, num_blocks, tau, copies, page_size):
    """Notes which pages of a list hold a token of the support."""

    def mark(i, _):
        excess = (z_ref[i] - tau).max(0, keepdims=True)
        token = lax.broadcasted_iota(jnp.int32, excess.shape, 1)
        for j in range(copies):
            offset = token - j * page_size
            is_in_page = (offset >= 0) & (offset < page_size)
            most = jnp.where(is_in_page, excess, -1.0).max()
            needed[i * copies + j] = jnp.where(most > 0, 1, 0)
        return _

    lax.fori_loop(0, num_blocks, mark, 0)


def _threshold(z_ref, num_blocks, alpha):
    blocks, rows, block = z_ref.shape

    def sums(tau):
        def add(i, carry):
            parts = equations.powers(jnp.maximum(z_ref[i] - tau, 0.0), alpha)
            return tuple(x + part for x, part in zip(carry, parts, strict=True))

        carry = (jnp.zeros((rows, block), jnp.float32),) * 2
        carry = lax.fori_loop(0, num_blocks, add, carry)
        return tuple(x.sum(1, keepdims=True) for x in carry)

    start = jnp.full((rows, 1), -1.0, jnp.float32)
    return equations.find_tau(sums, start, blocks * block, alpha)
