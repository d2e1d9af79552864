"""`page_attention` on Hopper GPUs: pages copied by id into a ring in shared memory.

A program per list and part of it: online softmax over blocks of 64 tokens, keys and
values in one copy a page, two blocks on their way or in use; XLA merges the parts. XLA
also sorts each list first, as for TPUs: only pages cut by a row's position or mask are
masked. Programs share what is there, not what the list has room for.
Codes of quantised pages become floats in shared memory, a block at a time; turned rows
are read as they are: queries are turned before, and results back.
Bytes per block: `64 * 2 * D * itemsize`, or those of codes and scales; nothing else
grows with the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.shared import hopper, hopper_codes
from pallas_kernels.shared.hopper import BLOCK, ROWS, plgpu
from pallas_kernels.shared.page_lists import sort_keys
from pallas_kernels.shared.quantized import Quantized, split, turned
from pallas_kernels.shared.split_k import joined, merge

STAGES = 2  # blocks in shared memory: one in use, the other on its way
NOWHERE = 1 << 30  # a position behind every query


def unsupported(
    q,
    pages,
    page_ids,
    query_positions,
    mask=None,
    initial=None,
    surrogate=None,
    *,
    sm_scale,
    first_position=0,
) -> str | None:
    """Says why the kernel cannot, from shapes, dtypes and device; None if it can."""
    del query_positions, mask, initial, sm_scale, first_position
    lists = page_ids.shape[1]
    page_size = pages.shape[3]
    if surrogate is not None:
        return "its products are of 16 bits, and a surrogate's weights of 32"
    if (page_size % 8 or BLOCK % page_size) and page_size % BLOCK:
        return f"P={page_size} must be 8, 16, 32 or a multiple of {BLOCK}"
    if isinstance(pages, Quantized) and page_size % BLOCK:
        # A row's scales are too few bytes to be copied beside its codes.
        return f"P={page_size} of quantised pages must be a multiple of {BLOCK}"
    if reason := hopper_codes.unsupported(pages):
        return reason
    return hopper.unsupported() or hopper.unsupported_rows(
        q, pages, q.shape[1] * q.shape[2] // lists
    )


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
):
    """See :func:`pallas_kernels.page_attention.page_attention`."""
    del surrogate  # None
    formats = hopper_codes.formats_of(pages)
    keys, values = split(pages) if formats else (pages, pages)
    q = turned(keys, q)
    batch, num_q_heads, num_rows, head_dim = q.shape
    num_kv_heads, num_pages, page_size, width = pages.shape[1:]
    lists = page_ids.shape[1]
    rows = num_q_heads // lists * num_rows

    # Pages longer than a block are read as several.
    pieces = max(page_size // BLOCK, 1)
    piece = page_size // pieces
    if pieces > 1:
        page_ids = page_ids[..., None] * pieces + jnp.arange(pieces, dtype=jnp.int32)
        page_ids = page_ids.reshape(batch, lists, -1)
        mask = None if mask is None else jnp.repeat(mask, pieces, axis=2)
    num_pieces = num_pages * pieces
    copies = BLOCK // piece
    blocks = pl.cdiv(page_ids.shape[2], copies)
    parts = hopper.num_splits(batch * lists, blocks)

    ids, counts, order = _schedule(
        page_ids, num_pieces, piece, query_positions, mask, first_position
    )
    flags = ()
    if mask is not None and order is not None:
        mask = jnp.take_along_axis(mask, order[..., None], axis=2)
        mask = jnp.tile(mask, (1, 1, 1, rows // num_rows)).astype(jnp.int32)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, ROWS - rows)))
        flags = (mask.reshape(batch * lists, -1, ROWS),)
    shape = q.shape[:3]
    q, rows_at, _ = hopper.tiled(q, query_positions, lists)
    q, rows_at = q[:, 0], rows_at[:, 0]  # the only tile
    taken = q.shape[1]

    rows_of_pages = jax.tree.map(
        lambda x: x.reshape(batch * num_kv_heads * num_pieces, piece, -1), pages
    )
    ring = hopper.operand(STAGES, BLOCK, width, dtype=pages.dtype)
    operands = ()
    if formats:
        ring = hopper_codes.ring(STAGES, pages.codes.shape[-1])
        operands = (hopper.operand(BLOCK, head_dim, dtype=pages.dtype),) * 2

    out, lse = hopper.kernel(
        functools.partial(
            _kernel,
            formats=formats,
            lists=lists,
            num_kv_heads=num_kv_heads,
            num_pieces=num_pieces,
            sm_scale=sm_scale,
            first_position=first_position,
        ),
        out_type=(
            jax.ShapeDtypeStruct((batch * lists, parts, taken, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch * lists, parts, taken), jnp.float32),
        ),
        grid=(batch * lists, parts),
        grid_names=("list", "split"),
        scratch_types=(
            hopper.scratch(head_dim, pages.dtype),
            ring,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            *operands,
        ),
        interpret=interpret,
        kernel_name="page_attention",
    )(
        ids,
        counts,
        rows_at,
        q,
        *jax.tree.leaves(rows_of_pages),
        *flags,
    )
    out, lse = (
        hopper.untiled(x[:, None], shape, lists) for x in merge(out, lse, axis=1)
    )
    return joined(turned(values, out), lse, initial)


def _schedule(page_ids, num_pages, page_size, query_positions, mask, first_position):
    """Sorted ids `(B * L, K)`, counts `(B * L, 2)`, and with a mask the order of ids.

    Counts of the pages that every row sees in full, and of those that any row sees.
    """
    batch, lists, listed = page_ids.shape
    kind, key = sort_keys(
        page_ids, num_pages, page_size, query_positions, mask, first_position
    )
    order = None
    if mask is None:
        key = jnp.sort(key, axis=-1)
    else:
        order = jnp.argsort(key, axis=-1)
        key = jnp.take_along_axis(key, order, axis=-1)
    counts = [(kind < x).sum(-1, dtype=jnp.int32) for x in (1, 2)]
    counts = jnp.stack(counts, axis=-1).reshape(batch * lists, 2)
    return (key % num_pages).reshape(batch * lists, listed), counts, order


def _kernel(
    # in
    ids,  # (B * L, K) i32
    counts,  # (B * L, 2) i32
    positions,  # (B, 64) i32
    q,  # (B * L, R, D)
    pages,  # (B * Hkv * NP, P, 2 D), or codes
    *refs,  # with codes, scales (B * Hkv * NP, P, C) u16; under a mask, which rows see
    #   which listed page: (B * L, K, 64) i32
    # out: (B * L, splits, R, D) f32, (B * L, splits, R) f32
    # scratch: as `hopper.scratch`, a ring (stages, 64, 2 D), q's barrier, its own; with
    # codes, keys and values (64, D)
    formats,
    lists,
    num_kv_heads,
    num_pieces,
    sm_scale,
    first_position,
):
    scales, refs = refs[: bool(formats)], refs[bool(formats) :]
    end = len(refs) - len(formats)
    operands, refs = refs[end:], refs[:end]
    *flags, out, lse, buffers, ring, q_arrived, arrived = refs
    taken, head_dim = q.shape[1:]
    page_size = pages.shape[1]
    copies = BLOCK // page_size
    stages = ring.shape[0]
    n, split = lax.axis_index("list"), lax.axis_index("split")
    first_page = lax.div(n, lists // num_kv_heads) * num_pieces
    full, seen = counts[n, 0], counts[n, 1]
    begin, end = hopper.share(split, out.shape[1], pl.cdiv(seen, copies))
    masked = jnp.clip(lax.div(full, copies), begin, end)

    def places(i):
        """Places in the list of a block's pages: the last one where there are none."""
        last = jnp.maximum(seen - 1, 0)
        return [jnp.minimum(i * copies + j, last) for j in range(copies)]

    def listed(i):
        return [ids[n, place] for place in places(i)]

    def fetch(block, slot):
        for j, page in enumerate(block):
            plgpu.copy_gmem_to_smem(
                pages.at[first_page + page],
                ring.at[slot, pl.ds(j * page_size, page_size)],
                arrived.at[slot],
            )

    def visible_in(i):
        shape = ROWS, BLOCK
        token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=hopper.tile())
        offset, allowed = jnp.int32(0), None
        for j, page in enumerate(listed(i)):
            is_later = token >= j * page_size
            is_here = i * copies + j < seen
            first = jnp.where(is_here, page * page_size, NOWHERE) - j * page_size
            offset = jnp.where(is_later, first, offset)
            for ref in flags:
                flag = ref.at[n, places(i)[j]]
                flag = plgpu.load(flag, layout=hopper.column(), optimized=False)
                flag = hopper.across(flag, BLOCK)
                allowed = (
                    flag if allowed is None else jnp.where(is_later, flag, allowed)
                )
        visible = token + offset <= rows_at
        if first_position:
            visible &= token + offset >= first_position
        return visible if allowed is None else visible & (allowed > 0)

    def scales_of(i):
        """The scales of keys and of values of a block, which is one page or a piece."""
        (page,), (ref,) = listed(i), scales
        read, first = [], 0
        for part in formats:
            of_part = ref.at[first_page + page, :, pl.ds(first, part.scales)]
            read.append(hopper_codes.load_scales(part, of_part))
            first += part.scales
        return read

    def decoded(slot, read):
        """The keys and the values of a block whose codes have arrived."""
        first = 0
        for part, own, into in zip(formats, read, operands, strict=True):
            codes = ring.at[slot, :, pl.ds(first, part.codes)]
            hopper_codes.write(part, codes, own, into)
            first += part.codes
        plgpu.commit_smem()
        return operands

    def step(i, state, is_masked):
        slot = lax.rem(i - begin, stages)
        # Long before they are needed: the next one to copy, and this one.
        upcoming = listed(i + stages)
        read = scales_of(i) if formats else None
        visible = visible_in(i) if is_masked else None
        plgpu.barrier_wait(arrived.at[slot])
        if formats:
            k, v = decoded(slot, read)
        else:
            k, v = (ring.at[slot, :, pl.ds(x, head_dim)] for x in (0, head_dim))
        state = hopper.add_block(
            state, buffers["q"], k, v, buffers["weights"], sm_scale, visible
        )
        pl.when(i + stages < end)(lambda: fetch(upcoming, slot))
        return state

    plgpu.copy_gmem_to_smem(q.at[n], buffers["q"].at[pl.ds(0, taken)], q_arrived)
    for stage in range(stages):
        i = begin + stage
        pl.when(i < end)(functools.partial(fetch, listed(i), stage))
    row = plgpu.load(
        positions.at[lax.div(n, lists)], layout=hopper.column(), optimized=False
    )
    rows_at = hopper.across(row, BLOCK)
    plgpu.barrier_wait(q_arrived)
    state = hopper.empty(head_dim)
    unmasked, cut = (functools.partial(step, is_masked=x) for x in (False, True))
    state = lax.fori_loop(begin, masked, unmasked, state)
    state = lax.fori_loop(masked, end, cut, state)
    hopper.store(state, buffers, out.at[n, split], lse.at[n, split])
