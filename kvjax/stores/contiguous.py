"""A cache of every token in slots, in order, and attention over all of it."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.partials import Partial
from kvjax.interface import CacheSpec
from kvjax.stores import buffers, hosted, offloaded
from pallas_kernels.entmax import entmax_attention
from pallas_kernels.shared.quantized import Rows, rewound


class Contiguous(NamedTuple):
    """Every token of a row in the slot of its absolute position."""

    spec: CacheSpec
    k: Float[Rows, "B Hkv S D"]  # rotated at absolute positions
    v: Float[Rows, "B Hkv S D"]  # a `Hosted` or `Offloaded` beyond the device
    length: Int[Array, "B"]

    ROWS = buffers.KEYS_AND_VALUES
    KEEPS_NEWEST = True


def contiguous(spec: CacheSpec) -> Contiguous:
    """An empty store of `spec.capacity` slots a row."""
    shape = (spec.batch, spec.num_kv_heads, spec.capacity)
    k = buffers.allocate_rows(spec, shape, "keys")
    v = buffers.allocate_rows(spec, shape, "values")
    return Contiguous(spec, k, v, buffers.lengths(spec))


def extend(
    store: Contiguous,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None = None,
) -> Contiguous:
    """Rotates and writes the next tokens of each row; `lengths=None` means all T."""
    positions, valid = buffers.chunk_positions(store.length, lengths, k.shape[2])
    count = valid.sum(-1, dtype=jnp.int32)
    length = store.length + count
    k = store.spec.rope(k, positions, length)
    return store._replace(
        k=offloaded.write_run(store.k, k, store.length, count),
        v=offloaded.write_run(store.v, v, store.length, count),
        length=length,
    )


def revise(
    store: Contiguous,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    count: Int[Array, "B"],
) -> Contiguous:
    """Appends one token, and gives the count - 1 before it new keys and values.

    Args:
        store: without the new token.
        k, v: un-rotated, the new token last.
        count: from 1 to T, how many of the last rows are real; at most all the tokens.
    """
    before = store._replace(length=store.length - (count - 1))
    return extend(before, real_first(k, count), real_first(v, count), count)


def rewind(store: Contiguous, count: Int[Array, "B"], most: int) -> Contiguous:
    """Takes back the newest `count` tokens, at most `most`: later ones overwrite them.

    As :class:`kvjax.interface.RewindFn`.
    """
    del most
    length = store.length - count
    return store._replace(
        k=rewound(store.k, length), v=rewound(store.v, length), length=length
    )


def real_first(
    rows: Float[Array, "B H T D"], count: Int[Array, "B"]
) -> Float[Array, "B H T D"]:
    """Moves the last `count` rows first, as a chunk has them; the rest is undefined."""
    size = rows.shape[2]
    order = jnp.arange(size, dtype=jnp.int32) + (size - count)[:, None]
    order = jnp.minimum(order, size - 1)[:, None, :, None]
    return jnp.take_along_axis(rows, order, axis=2)


def rotate_queries(
    spec: CacheSpec,
    q: Float[Array, "B Hq T D"],
    length: Int[Array, "B"],
    lengths: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B Hq T D"], Int[Array, "B T"]]:
    """Rotates queries of the newest tokens, which `length` counts in.

    Returns:
        The rotated queries, and their positions.
    """
    rows = q.shape[2]
    fresh = rows if lengths is None else lengths
    positions = (length - fresh)[:, None] + jnp.arange(rows, dtype=jnp.int32)
    return spec.rope(q, positions, length), positions


def attend(
    store: Contiguous, q: Float[Array, "B Hq T D"], positions: Int[Array, "B T"]
) -> Partial:
    """Attends causally from rotated queries at `positions` to the whole store.

    By the model's own normaliser: of entmax, `lse` is as in
    :class:`kvjax.interface.Diagnostics`, and the result cannot be merged.
    """
    spec = store.spec
    normaliser = hosted.attend
    if spec.alpha != 1:
        normaliser = functools.partial(entmax_attention, alpha=spec.alpha)
    return Partial(*normaliser(q, store.k, store.v, positions, sm_scale=spec.sm_scale))
