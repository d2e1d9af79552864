"""The definition of `decode_attention`, and its path on every device (XLA).

A few rows: one pass over the whole cache, whose only temporary is the logits. Many rows
(a chunk of a prompt): tiles of rows, each over blocks of keys with an online softmax,
as many as the tile's last row needs, so that no temporary grows with the cache and half
of a causal chunk is not computed. Both accumulate in float32, and what is float64 in
float64. Quantised rows are read by blocks however few the query rows: their numbers are
there for one block at a time, and few rows meet its codes, which are scaled after.
Blocks may also come from elsewhere, one by one.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.shared.quantized import (
    Quantized,
    numbers,
    times_keys,
    turned,
    weighted_sum,
)

DENSE_ROWS = 64  # up to this many rows a KV head, the logits stay smaller than a block
TILE = 256  # rows of a query head that are attended for together
BLOCK = 512  # keys per block: a head's logits of a tile, 512 KB, stay in an L2 cache


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
):
    """See :func:`pallas_kernels.decode_attention.decode_attention`.

    Here `key_positions (B, H, T, S)` may also differ from row to row.
    """
    scores = {"sm_scale": sm_scale, "window": window, "soft_cap": soft_cap}
    q = turned(k, q)
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    by_blocks = rows > DENSE_ROWS or isinstance(k, Quantized)
    if not with_logits and by_blocks and k.shape[2] > BLOCK:
        out, lse = _tiled(q, k, v, query_positions, key_positions, scores)
        return turned(v, out), lse
    grouped, row_positions = _group(q, k, query_positions)
    held = _held(k, key_positions, grouped.shape[2])
    logits = _logits(grouped, k, row_positions, held, **scores)
    out, lse = _dense(logits, v)
    result = turned(v, out.reshape(q.shape)), lse.reshape(q.shape[:3])
    return (*result, logits.reshape(*q.shape[:3], -1)) if with_logits else result


def decode_logits(q, k, query_positions, key_positions, *, sm_scale):
    """See :func:`pallas_kernels.decode_attention.decode_logits`.

    Here `key_positions (B, H, T, S)` may also differ from row to row.
    """
    grouped, row_positions = _group(turned(k, q), k, query_positions)
    held = _held(k, key_positions, grouped.shape[2])
    logits = _logits(
        grouped, k, row_positions, held, sm_scale=sm_scale, window=None, soft_cap=None
    )
    return logits.reshape(*q.shape[:3], k.shape[2])


def visible_keys(slots, query_positions, key_positions, window):
    """A mask `(B or 1, H or 1, T, S)` of the slots that each query row sees."""
    held = key_positions
    if held is None:
        held = jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    return _visible(held[:, :, None, :], query_positions[:, None, :, None], window)


def only_seen(logits, num_kv_heads, query_positions, key_positions, window):
    """Returns a kernel's logits `(B, Hq, T, S)`, -inf where a row does not see the key.

    Those of blocks that no row sees were not computed, nor their place written. The
    axes of rows may come in any shape.
    """
    (batch, num_rows), slots = query_positions.shape, logits.shape[-1]
    visible = visible_keys(slots, query_positions, key_positions, window)
    by_group = logits.reshape(batch, num_kv_heads, -1, num_rows, slots)
    by_group = jnp.where(visible[:, :, None], by_group, -jnp.inf)
    return by_group.reshape(batch, -1, num_rows, slots)


def _group(q, k, query_positions):
    # The G query heads of a KV head and their T rows share its keys: one matmul.
    batch, num_q_heads, rows, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_q_heads // num_kv_heads
    grouped = q.reshape(batch, num_kv_heads, group * rows, head_dim)
    return grouped, jnp.tile(query_positions, (1, group))[:, None, :, None]


def _held(k, key_positions, rows):
    """Positions of the slots, `(B or 1, H or 1, rows or 1, S)`."""
    if key_positions is None:
        return jnp.arange(k.shape[2], dtype=jnp.int32)[None, None, None, :]
    if key_positions.ndim == 3:
        return key_positions[:, :, None, :]
    return jnp.tile(key_positions, (1, 1, rows // key_positions.shape[2], 1))


def _visible(held, row_positions, window):
    visible = (held >= 0) & (held <= row_positions)
    if window is not None:
        visible &= held > row_positions - window
    return visible


def _wide(x):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def over_blocks(slots, block, carry, blocks=None):
    """Calls `carry = block(start, size, carry)` for the blocks of `slots`, in turn.

    Of the whole ones, only the first `blocks` if given, which may be a traced number.
    """
    whole = slots // BLOCK
    number = whole if blocks is None else blocks
    carry = lax.fori_loop(0, number, lambda i, c: block(i * BLOCK, BLOCK, c), carry)
    if slots % BLOCK:
        carry = block(whole * BLOCK, slots % BLOCK, carry)
    return carry


def take_block(rows, start, size):
    """Copies `size` slots."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, 2), rows)


# Of every head, in float32.
_times_keys, _weighted_sum = (jax.vmap(jax.vmap(f)) for f in (times_keys, weighted_sum))


def _masked(products, row_positions, held, *, sm_scale, window, soft_cap):
    logits = sm_scale * products
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return jnp.where(_visible(held, row_positions, window), logits, -jnp.inf)


def _products(grouped, keys):
    wide = _wide(keys)
    if isinstance(keys, Quantized):
        return _times_keys(grouped.astype(jnp.float32), keys).astype(wide)
    return jnp.einsum("bkrd,bksd->bkrs", grouped, keys, preferred_element_type=wide)


def _logits(grouped, keys, row_positions, held, **scores):
    slots, wide = keys.shape[2], _wide(keys)
    if not isinstance(keys, Quantized) or slots <= BLOCK:
        return _masked(_products(grouped, keys), row_positions, held, **scores)

    def fill(start, size, logits):
        part = lax.dynamic_slice_in_dim(held, start, size, 3)
        products = _products(grouped, take_block(keys, start, size))
        found = _masked(products, row_positions, part, **scores)
        return lax.dynamic_update_slice_in_dim(logits, found, start, 3)

    empty = jnp.zeros((*grouped.shape[:3], slots), wide)
    return over_blocks(slots, fill, empty)


def weighted_values(weights, values):
    """Sums values `(B, H, S, D)` by weights `(B, H, R, S)`, turned where they are.

    Values of unseen slots must be finite: their weight is exactly 0.
    """

    slots, wide = values.shape[2], _wide(values)
    if not isinstance(values, Quantized):
        narrow = weights.astype(values.dtype)
        return jnp.einsum(
            "bkrs,bksd->bkrd", narrow, values, preferred_element_type=wide
        )
    weights = weights.astype(jnp.float32)
    if slots <= BLOCK:
        return _weighted_sum(weights, values).astype(wide)

    def add(start, size, total):
        part = lax.dynamic_slice_in_dim(weights, start, size, 3)
        block = take_block(values, start, size)
        return total + _weighted_sum(part, block).astype(wide)

    nothing = jnp.zeros((*weights.shape[:3], values.shape[3]), wide)
    return over_blocks(slots, add, nothing)


def _softmax_parts(logits, m):
    # A row that sees no key has m = -inf; -inf - -inf would be NaN.
    return jnp.exp(logits - jnp.where(m == -jnp.inf, 0.0, m)[..., None])


def _finish(m, l, acc):
    positive = jnp.where(l == 0, 1.0, l)
    lse = jnp.where(l == 0, -jnp.inf, m + jnp.log(positive))
    return acc / positive[..., None], lse


def _nothing(shape, dtype):
    """Makes the carry of `_accumulate` before any block, for outputs of that shape."""
    rows = shape[:-1]
    return (
        jnp.full(rows, -jnp.inf, dtype),
        jnp.zeros(rows, dtype),
        jnp.zeros(shape, dtype),
    )


def _accumulate(carry, logits, weighted):
    """Goes on with an online softmax; `weighted` sums the block's values by weights."""
    m, l, acc = carry
    m_new = jnp.maximum(m, logits.max(-1))
    weights = _softmax_parts(logits, m_new)
    decay = jnp.exp(m - jnp.where(m_new == -jnp.inf, 0.0, m_new))
    acc = acc * decay[..., None] + weighted(weights)
    return m_new, l * decay + weights.sum(-1), acc


def _dense(logits, v):
    m = logits.max(-1)
    weights = _softmax_parts(logits, m)
    return _finish(m, weights.sum(-1), weighted_values(weights, v))


def _tiled(q, k, v, query_positions, key_positions, scores):
    """Attends for `TILE` rows at a time; `(B, Hq, T, D)` and `(B, Hq, T)`."""
    batch, heads, rows, head_dim = q.shape
    size = min(TILE, rows)
    tiles = -(-rows // size)
    padding = tiles * size - rows
    # A padded row sees no key.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    positions = jnp.pad(query_positions, ((0, 0), (0, padding)), constant_values=-1)
    by_row = None
    if key_positions is not None and key_positions.ndim == 4:
        widths = ((0, 0), (0, 0), (0, padding), (0, 0))
        by_row = jnp.pad(key_positions, widths, constant_values=-1)

    def tile(index):
        start = index * size
        some, where = (
            lax.dynamic_slice_in_dim(x, start, size, axis)
            for x, axis in ((q, 2), (positions, 1))
        )
        keys_at = key_positions
        if by_row is not None:
            keys_at = lax.dynamic_slice_in_dim(by_row, start, size, 2)
        grouped, row_positions = _group(some, k, where)
        held = _held(k, keys_at, grouped.shape[2])
        reach = where.max() if keys_at is None else None
        out, lse = _blocked(grouped, k, v, row_positions, held, reach, scores)
        return out.reshape(some.shape), lse.reshape(some.shape[:3])

    out, lse = lax.map(tile, jnp.arange(tiles, dtype=jnp.int32))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, tiles * size, head_dim)
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, tiles * size)
    return out[:, :, :rows], lse[:, :, :rows]


def _blocked(grouped, k, v, row_positions, held, reach, scores):
    slots = k.shape[2]

    def block(start, size, carry):
        keys, values = (take_block(x, start, size) for x in (k, v))
        if grouped.shape[2] > DENSE_ROWS:
            keys, values = numbers(keys), numbers(values)
        part = lax.dynamic_slice_in_dim(held, start, size, 3)
        logits = _logits(grouped, keys, row_positions, part, **scores)
        return _accumulate(carry, logits, lambda w: weighted_values(w, values))

    carry = _nothing(grouped.shape, _wide(v))
    needed = None
    if reach is not None:
        needed = jnp.clip(reach // BLOCK + 1, 0, slots // BLOCK)
    return _finish(*over_blocks(slots, block, carry, needed))


def streamed_attention(q, take, slots, query_positions, *, sm_scale):
    """See :func:`pallas_kernels.decode_attention.streamed_attention`.

    Each block comes once, and all tiles of rows meet it. The sums of a tile are those
    of `_blocked`, to the last bit.
    """
    if slots <= BLOCK:
        k, v = take(0, slots)
        out, lse, *_ = decode_attention(
            q, k, v, query_positions, None, sm_scale=sm_scale
        )
        return out, lse
    scores = {"sm_scale": sm_scale, "window": None, "soft_cap": None}
    k, v = jax.eval_shape(lambda: take(0, BLOCK))
    batch, heads, rows, head_dim = q.shape
    size = min(TILE, rows)
    tiles = -(-rows // size)
    padding = tiles * size - rows
    # A padded row sees no key.
    some = jnp.pad(turned(k, q), ((0, 0), (0, 0), (0, padding), (0, 0)))
    where = jnp.pad(query_positions, ((0, 0), (0, padding)), constant_values=-1)
    some = jnp.moveaxis(some.reshape(batch, heads, tiles, size, head_dim), 2, 0)
    where = jnp.moveaxis(where.reshape(batch, tiles, size), 1, 0)
    in_group = heads // k.shape[1] * size

    def block(start, length, carries):
        keys, values = take(start, length)
        if in_group > DENSE_ROWS:
            keys, values = numbers(keys), numbers(values)
        held = start + jnp.arange(length, dtype=jnp.int32)

        def tile(inputs):
            q, positions, carry = inputs
            grouped, row_positions = _group(q, keys, positions)
            logits = _logits(
                grouped, keys, row_positions, held[None, None, None], **scores
            )
            return _accumulate(carry, logits, lambda w: weighted_values(w, values))

        return lax.map(tile, (some, where, carries))

    carries = _nothing((tiles, batch, k.shape[1], in_group, head_dim), _wide(v))
    needed = jnp.clip(query_positions.max() // BLOCK + 1, 0, slots // BLOCK)
    out, lse = _finish(*over_blocks(slots, block, carries, needed))
    out = jnp.moveaxis(out.reshape(tiles, batch, heads, size, head_dim), 0, 2)
    lse = jnp.moveaxis(lse.reshape(tiles, batch, heads, size), 0, 2)
    out = out.reshape(batch, heads, tiles * size, head_dim)
    lse = lse.reshape(batch, heads, tiles * size)
    return turned(v, out[:, :, :rows]), lse[:, :, :rows]
