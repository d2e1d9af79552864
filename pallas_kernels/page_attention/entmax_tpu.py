"""`page_attention` with entmax weights on TPU: keys, then the threshold, then values.

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

from pallas_kernels.decode_attention.mosaic_tpu import (
    LANES,
    MASKED,
    clear,
    dot,
    scaled_logits,
)
from pallas_kernels.entmax import equations
from pallas_kernels.page_attention.lists import Lists


def scratch(listed, rows, head_dim, dtype, config, copies, page_size):
    """What the kernel keeps in VMEM, for lists of `listed` pages."""
    blocks = pl.cdiv(listed, copies)
    block = copies * page_size
    width = head_dim if head_dim >= LANES else 2 * head_dim
    buffers = pltpu.VMEM((config.num_buffers, block, width), dtype)
    arrived = pltpu.SemaphoreType.DMA((config.num_buffers,))
    return [
        buffers,
        arrived,
        buffers,
        arrived,
        pltpu.VMEM((blocks, rows, block), jnp.float32),
        pltpu.SMEM((blocks * copies,), jnp.int32),
    ]


def kernel(
    # in
    ids,  # as `lists.schedule`, SMEM
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
    """Of one batch row; in the place of `mosaic_tpu`'s softmax kernel."""
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
        """Of a block's pages, those of the support."""
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

        def shift(i, _):
            z_ref[i] = equations.shifted(z_ref[i], top, alpha)
            return _

        lax.fori_loop(0, num_blocks, shift, 0)
        tau = given[0][n] if given else _threshold(z_ref, num_blocks, alpha)

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
