"""Lists of pages on TPU: as kernels go through them, a batch row a program.

What calls such a kernel, and inside it the lists in SMEM, the pages in HBM, and blocks
of them on their way into a ring of buffers in VMEM, also from one list to the next.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shared import quantized
from pallas_kernels.shared.page_lists import sort_keys
from pallas_kernels.shared.tpu_blocks import LANES

SMEM_BYTES = 1 << 20
MAX_ROWS = 256  # query rows a list: logits of a block stay within a megabyte
MASK_BITS = 32  # a page's flags of all T rows are one number
MAX_COPIES = 32  # per block; each is an unrolled instruction sequence


class Tiles(NamedTuple):
    """Sizes of a problem as a program takes it, and of what it has in VMEM."""

    lists: int  # of a batch row
    rows: int  # query rows of a list
    lanes: int  # of a query row: D, or 128 of which the last are 0
    copies: int  # pages of a block
    block: int  # tokens
    num_buffers: int


def unsupported(q, pages, page_ids, mask) -> str | None:
    """Says why no kernel of such lists can, from shapes and dtypes; None if one can."""
    if reason := quantized.unsupported(pages):
        return reason
    return unsupported_sizes(q, pages, page_ids, mask)


def unsupported_sizes(q, pages, page_ids, mask) -> str | None:
    """The same where pages may be quantised."""
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


def tiles(q, pages, page_ids, block_tokens: int, num_buffers: int) -> Tiles:
    """The sizes of a problem, under what the table of tiles says."""
    lists, listed = page_ids.shape[1:]
    page_size = pages.shape[3]
    copies = max(1, min(block_tokens // page_size, MAX_COPIES, listed))
    return Tiles(
        lists=lists,
        rows=q.shape[1] // lists * q.shape[2],
        lanes=max(q.shape[3], LANES),
        copies=copies,
        block=copies * page_size,
        num_buffers=num_buffers,
    )


def call(
    kernel: Callable[..., None],
    q,
    pages,
    page_ids,
    query_positions,
    mask,
    *beside: jax.Array,
    name: str,
    sizes: Tiles,
    results: int,
    scratch: Sequence[Any],
    sm_scale: float,
    first_position: int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Runs a kernel over pages in floats, a program for each batch row.

    Args:
        kernel: takes refs of what `schedule` made in SMEM, of the queries
            `(L, R, lanes)`, their positions and bits `(R, 1)`, of all pages in HBM, of
            what is beside, of the results and the scratch.
        q, pages, page_ids, query_positions, mask: as of the operation.
        beside: arrays `(B, ...)`, of which a program gets its row in VMEM.
        name: of the program.
        sizes: from :func:`tiles`.
        results: how many float32 arrays there are, in turn `(L, R, lanes)`, of which
            the last D lanes count, and `(L, R, 1)`.
        scratch: shapes of it.
        sm_scale: factor on the logits.
        first_position: tokens before it are not seen.
        interpret: see :func:`pallas_kernels.dispatch.dispatch`.

    Returns:
        The results, in turn `(B, Hq, T, D)` and `(B, Hq, T)`.
    """
    batch, num_q_heads, num_rows, head_dim = q.shape
    lists, rows, lanes, copies, *_ = sizes
    scheduled = schedule(page_ids, pages, query_positions, mask, copies, first_position)
    queries = q.reshape(batch, lists, rows, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim)))
    outputs = run(
        functools.partial(kernel, head_dim=head_dim),
        scheduled,
        (queries,),
        query_positions,
        (flat_pages(pages),),
        *beside,
        name=name,
        sizes=sizes,
        shapes=[(lists, rows, 1 if i % 2 else lanes) for i in range(results)],
        scratch=scratch,
        num_kv_heads=pages.shape[1],
        sm_scale=sm_scale,
        interpret=interpret,
    )
    shape = batch, num_q_heads, num_rows
    return tuple(
        x.reshape(shape)
        if i % 2
        else x[..., lanes - head_dim :].reshape(*shape, head_dim)
        for i, x in enumerate(outputs)
    )


def flat_pages(pages: jax.Array) -> jax.Array:
    """Pages of all batch rows and KV heads in one sequence."""
    return pages.reshape(-1, *pages.shape[3:])


def run(
    kernel: Callable[..., None],
    scheduled: tuple[jax.Array, jax.Array],
    queries: Sequence[jax.Array],
    query_positions: jax.Array,
    streams: Sequence[jax.Array],
    *beside: jax.Array,
    name: str,
    sizes: Tiles,
    shapes: Sequence[tuple[int, ...]],
    scratch: Sequence[Any],
    num_kv_heads: int,
    sm_scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Runs a kernel over any pages, a program for each batch row.

    Args:
        kernel: takes refs of `scheduled` in SMEM, of its row of the queries, of their
            positions and bits `(R, 1)`, of the streams, of what is beside, of the
            results and the scratch.
        scheduled: from :func:`schedule`.
        queries: arrays `(B, L, ...)`, as `Operand.queries` makes them.
        query_positions: `(B, T)`, of which the rows of a list are several, and then
            padding, which sees nothing.
        streams: arrays in HBM, the first one pages: see :func:`flat_pages`.
        beside: arrays `(B, ...)`, of which a program gets its row in VMEM.
        shapes: of the float32 results of a batch row; the first two axes of the second
            are lists and rows.
        name, sizes, scratch, sm_scale, interpret: see :func:`call`.
        num_kv_heads: of the pages.

    Returns:
        The results, `(B, ...)` each.
    """
    ids, counts = scheduled
    batch, num_rows = query_positions.shape
    group, padding = sizes.rows // num_rows, shapes[1][1] - sizes.rows
    positions = jnp.pad(
        jnp.tile(query_positions, (1, group)),
        ((0, 0), (0, padding)),
        constant_values=-1,
    )[..., None]
    bit = jnp.tile(1 << jnp.arange(num_rows, dtype=jnp.int32), group)
    bit = jnp.pad(bit, (0, padding))[:, None]

    def row_of_batch(*shape, **space):
        return pl.BlockSpec((None, *shape), lambda b: (b,) + (0,) * len(shape), **space)

    pages = math.prod(ids.shape[::2])
    page_bytes = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in streams)
    tokens = pages * sizes.block // sizes.copies
    return pl.pallas_call(
        functools.partial(
            kernel, copies=sizes.copies, num_kv_heads=num_kv_heads, sm_scale=sm_scale
        ),
        grid=(batch,),
        in_specs=[
            row_of_batch(*ids.shape[1:], memory_space=pltpu.SMEM),
            row_of_batch(1, counts.shape[2], memory_space=pltpu.SMEM),
            *(row_of_batch(*x.shape[1:]) for x in queries),
            row_of_batch(*positions.shape[1:]),
            pl.BlockSpec(bit.shape, lambda b: (0, 0)),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in streams),
            *(row_of_batch(*x.shape[1:]) for x in beside),
        ],
        out_specs=[row_of_batch(*shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in shapes
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            disable_bounds_checks=True,  # ids are in range: see `schedule`
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens * sizes.rows * sizes.lanes,
            bytes_accessed=pages * page_bytes,
            transcendentals=tokens * sizes.rows,
        ),
        interpret=interpret,
        name=name,
    )(ids, counts, *queries, positions, bit, *streams, *beside)


def schedule(page_ids, pages, query_positions, mask, copies, first_position=0):
    """Sorted ids `(B, 1, H * K' + copies)` and counts `(B, 1, 2 * H + 3)`.

    Counts of pages that every row sees in full, by list, then of pages that any sees,
    then the last position seen. A list without pages follows the last, to run into.
    With a mask, a second row of the ids says which rows see the page, a bit for each.
    """
    batch, _, listed = page_ids.shape
    num_pages, page_size = pages.shape[2:4]
    kind, key = sort_keys(
        page_ids, num_pages, page_size, query_positions, mask, first_position
    )
    seeing = []
    if mask is not None:
        bit = 1 << jnp.arange(mask.shape[3], dtype=jnp.int32)
        seeing = [jnp.where(mask, bit, 0).sum(-1, dtype=jnp.int32)]
    key, *seeing = lax.sort((key, *seeing), num_keys=1)
    padding = ((0, 0), (0, 0), (0, -listed % copies))
    lines = [
        jnp.pad(x, padding).reshape(batch, 1, -1) for x in (key % num_pages, *seeing)
    ]
    ids = jnp.pad(jnp.concatenate(lines, axis=1), ((0, 0), (0, 0), (0, copies)))
    full = (kind == 0).sum(-1, dtype=jnp.int32)
    seen = (kind < 2).sum(-1, dtype=jnp.int32)
    zero = jnp.zeros((batch, 1), jnp.int32)
    last = query_positions.max(1, keepdims=True)
    counts = jnp.concatenate([full, zero, seen, zero, last], axis=1)
    return ids, counts.reshape(batch, 1, -1)


class Together(tuple[Any, ...]):
    """Copies that are started, and waited for, as one."""

    def start(self) -> None:
        """Starts them."""
        for copy in self:
            copy.start()

    def wait(self) -> None:
        """Waits for all."""
        for copy in self:
            copy.wait()


@dataclasses.dataclass(frozen=True)
class Lists:
    """The lists of one batch row, inside a kernel; what `schedule` made, in SMEM."""

    ids: Any
    counts: Any
    pages: Any  # (B * Hkv * NP, P, 2 D), HBM, or of codes, or those tokens last
    page_size: int
    number: int  # of lists
    copies: int  # pages of a block
    num_buffers: int  # blocks in the ring
    num_kv_heads: int
    first: Any  # of this batch row's pages
    num_pages: int  # of a KV head

    @classmethod
    def of(
        cls,
        ids,
        counts,
        pages,
        q_ref,
        buffers,
        copies,
        num_kv_heads,
        tokens_last=False,
    ) -> "Lists":
        """The lists of the batch row of this program, each a line of `q_ref`."""
        row_pages = pages.shape[0] // pl.num_programs(0)
        return cls(
            ids,
            counts,
            pages,
            page_size=pages.shape[2 if tokens_last else 1],
            number=q_ref.shape[0],
            copies=copies,
            num_buffers=buffers.shape[0],
            num_kv_heads=num_kv_heads,
            first=pl.program_id(0) * row_pages,
            num_pages=row_pages // num_kv_heads,
        )

    @property
    def listed(self) -> int:
        """Places of a list, whole blocks."""
        return (self.ids.shape[1] - self.copies) // self.number

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.copies * self.page_size

    @property
    def last(self):
        """The last position that any query row sees."""
        return self.counts[0, 2 * self.number + 2]

    def page(self, n, index):
        """The page at place `index` of list n."""
        return self.ids[0, n * self.listed + index]

    def place(self, n, index):
        """The place among all pages of the page at place `index` of list n."""
        head = lax.div(n, self.number // self.num_kv_heads)
        return self.first + head * self.num_pages + self.page(n, index)

    def source(self, n, index):
        """The memory in HBM of the page at place `index` of list n."""
        return self.pages.at[self.place(n, index)]

    def target(self, buffers, slot, j, tokens_last=False):
        """The memory of page j of a block in a buffer of the ring.

        Pages with tokens last that do not fill lanes lie one behind the other.
        """
        if len(buffers.shape) == 4:
            return buffers.at[slot, j]
        tokens = pl.ds(j * self.page_size, self.page_size)
        return buffers.at[slot, :, tokens] if tokens_last else buffers.at[slot, tokens]

    def seen(self, n):
        """The number of pages of list n that are read."""
        return self.counts[0, self.number + 1 + n]

    def whole(self, n):
        """Blocks of list n that need no mask; they come first."""
        return lax.div(self.counts[0, n], self.copies)

    def num_blocks(self, n):
        """Blocks of list n; an empty one has one too, of no page."""
        return jnp.maximum(pl.cdiv(self.seen(n), self.copies), 1)

    def after(self, slot):
        """The next slot of the ring."""
        return lax.select(slot == self.num_buffers - 1, 0, slot + 1)

    def fetch(self, cursor, copy: Callable[..., Any]):
        """Starts the copies `copy(n, index, j, slot)` of a block, once.

        Returns:
            The cursor `(n, i, slot)` of the block after it, also across lists.
        """
        n, i, slot = cursor
        for j in range(self.copies):
            index = i * self.copies + j
            pl.when(index < self.seen(n))(copy(n, index, j, slot).start)
        is_last = i + 1 >= self.num_blocks(n)
        # Past the last list comes one without pages, for ever.
        n = lax.select(is_last, jnp.minimum(n + 1, self.number), n)
        return n, lax.select(is_last, 0, i + 1), self.after(slot)

    def valid(self, n, index):
        """Tokens of the page at this place up to the last position; 0 past the end."""
        first = self.page(n, index) * self.page_size
        valid = jnp.clip(self.last + 1 - first, 0, self.page_size)
        return jnp.where(index < self.seen(n), valid, 0)

    def held(self, n, i):
        """A mask `(1, block)` of the tokens of block i up to the last position."""
        token = lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        held = jnp.zeros((1, self.block), jnp.bool_)
        for j in range(self.copies):
            offset = token - j * self.page_size
            valid = self.valid(n, i * self.copies + j)
            held |= (offset >= 0) & (offset < valid)
        return held

    def visible(self, n, i, positions, bit, first_position=0):
        """A mask `(R, block)`: rows `(R, 1)` that see a token of block i."""
        token = lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        key_positions = jnp.full((1, self.block), self.last + 1, jnp.int32)
        seeing = jnp.zeros((1, self.block), jnp.int32)
        has_mask = self.ids.shape[0] == 2
        for j in range(self.copies):
            index = i * self.copies + j
            offset = token - j * self.page_size
            is_in_page = (offset >= 0) & (offset < self.valid(n, index))
            first = self.page(n, index) * self.page_size
            key_positions = jnp.where(is_in_page, first + offset, key_positions)
            if has_mask:
                bits = self.ids[1, n * self.listed + index]
                seeing = jnp.where(is_in_page, bits, seeing)
        visible = key_positions <= positions
        if first_position:
            visible &= key_positions >= first_position
        return visible & ((seeing & bit) != 0) if has_mask else visible
