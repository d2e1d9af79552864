"""Attention of models that repeat tokens, for training: all copies of all tokens.

Rows are copy-major: the originals of a sequence, then the second copy of every token,
and so on. Originals attend to themselves; hidden tokens go in blocks of positions, with
one softmax over the originals and the few hidden tokens near them. The backward pass
computes a block again, so that memory is linear in the length.

    K  copies     J  hidden tokens of a token, K - 1     P  positions of a block
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.copies import Copies
from kvjax.training.attention import (
    CPU_MIN_BLOCK,
    CPU_SCORES,
    MAX_GROUPS,
    Attention,
    causal_attention,
)


def phd_attention(
    rope: Callable[..., Array],
    *,
    copies: Copies,
    segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    sm_scale: float | None = None,
    block: int = 256,
) -> Attention:
    """The `attention(layer, q, k, v)` of a model that repeats tokens, for training.

    The same function as decoding by :func:`kvjax.phd` around :func:`kvjax.full`.

    Args:
        rope: `rope(x, positions)` rotates queries and keys; the copies of a token have
            its position.
        copies: of every token, and which of them a copy sees.
        segments, positions: of tokens, as
            :func:`kvjax.training.attention.causal_attention` takes them; chunks of C
            are counted by the position.
        sm_scale: factor on the logits; None means ``head_dim ** -0.5``.
        block: most positions whose hidden tokens are computed at once. Temporary memory
            is that of B * Hq * (K - 1) * block * T float32 scores, a few times over; on
            CPU fewer are taken where that is faster.

    Returns:
        `attention(layer, q, k, v) -> out` of K * T rows: q and k not yet rotated, out
        in q's dtype.

    Raises:
        ValueError: if block < 1, and, when called, if the rows are not K times those of
            segments and positions, or no multiple of K.

    Source:
        Wu, Yan, Zhang, Lu, Zeng, Wang, Zhou, "Efficient Pretraining Length Scaling",
        arXiv:2504.14992, Sec. 2.3.
    """
    options: Any = {"segments": segments, "positions": positions}
    dense = causal_attention(rope, sm_scale=sm_scale, block=block, **options)

    def attention(layer: int, q: Array, k: Array, v: Array) -> Any:
        rows, count = q.shape[2], copies.count
        length = rows // count
        if rows % count:
            raise ValueError(f"q {q.shape} must have a multiple of {count} rows.")
        for name, array in options.items():
            if array is not None and array.shape != (q.shape[0], length):
                raise ValueError(
                    f"{name} {array.shape} must be (B, T) = {(q.shape[0], length)}: q "
                    f"has {rows} rows, {count} copies of each token."
                )
        originals = dense(layer, *(x[:, :, :length] for x in (q, k, v)))
        where = positions
        if where is None:
            where = jnp.arange(length, dtype=jnp.int32)
            where = jnp.broadcast_to(where, (q.shape[0], length))
        everywhere = jnp.tile(where, (1, count))
        scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        hidden = _hidden(
            copies,
            scale,
            _block_of(copies, q.shape, block),
            rope(q, everywhere),
            rope(k, everywhere),
            v,
            where,
            jnp.ones_like(where) if segments is None else segments,
        )
        return jnp.concatenate([originals, hidden.astype(q.dtype)], axis=2)

    return attention


def _block_of(copies: Copies, shape: tuple[int, ...], block: int) -> int:
    """Returns how many positions are taken at once, of rows of that shape."""
    batch, heads, rows, _ = shape
    length = rows // copies.count
    if jax.default_backend() == "cpu":
        scores = batch * heads * copies.hidden * length  # of a position
        block = min(block, max(CPU_SCORES // scores, CPU_MIN_BLOCK))
    return min(block, length)


def _hidden(
    copies: Copies,
    scale: float,
    block: int,
    q: Float[Array, "B Hq N D"],
    k: Float[Array, "B Hkv N D"],
    v: Float[Array, "B Hkv N D"],
    where: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B Hq JT D"]:
    """Attends from all copies but the originals.

    Args:
        q, k: rotated, of all rows.
    """
    batch, heads, _, size = q.shape
    length, before = where.shape[1], copies.reach - 1
    steps = -(-length // block)
    padding = steps * block - length
    groups = batch, k.shape[1], heads // k.shape[1], copies.hidden
    rows = q[:, :, length:].reshape(*groups, length, size)
    rows = jnp.pad(rows, ((0, 0),) * 4 + ((0, padding), (0, 0)))
    rows = jnp.moveaxis(rows.reshape(*groups, steps, block, size), 4, 0)

    def near(x: Float[Array, "B Hkv N D"]) -> Float[Array, "B Hkv J S D"]:
        # Those before the first block are none, as those behind the last.
        x = x[:, :, length:].reshape(batch, -1, copies.hidden, length, size)
        return jnp.pad(x, ((0, 0),) * 3 + ((before, padding), (0, 0)))

    edges = ((0, 0), (before, padding))
    inputs = _Inputs(
        near(k),
        near(v),
        jnp.pad(where, edges, constant_values=-1),
        jnp.pad(segments, edges),
    )
    out, number = [], -(-steps // MAX_GROUPS)
    for first in range(0, steps, number):
        last = min(first + number, steps)
        end = min(last * block, length)  # what none of the group sees is left out
        body = functools.partial(
            _block, copies, scale, k[:, :, :end], v[:, :, :end], segments[:, :end]
        )
        body = jax.checkpoint(functools.partial(body, inputs), prevent_cse=False)
        index = jnp.arange(first, last, dtype=jnp.int32)
        out.append(lax.map(lambda x, body=body: body(*x), (index, rows[first:last])))
    joined = jnp.moveaxis(jnp.concatenate(out), 0, 4)  # (B, Hkv, G, J, steps, P, D)
    joined = joined.reshape(*groups, -1, size)[:, :, :, :, :length]
    return joined.reshape(batch, heads, -1, size)


class _Inputs(NamedTuple):
    """Hidden tokens of every position, those before the first and behind the last too.

    The first of a block's are at its number times P: R - 1 before its own.
    """

    k: Float[Array, "B Hkv J S D"]
    v: Float[Array, "B Hkv J S D"]
    place: Int[Array, "B S"]  # -1 = none
    segments: Int[Array, "B S"]  # 0 = none


def _block(
    copies: Copies,
    scale: float,
    keys: Float[Array, "B Hkv E D"],
    values: Float[Array, "B Hkv E D"],
    segments: Int[Array, "B E"],
    inputs: _Inputs,
    number: Int[Array, ""],
    q: Float[Array, "B Hkv G J P D"],
) -> Float[Array, "B Hkv G J P D"]:
    """Attends from the hidden tokens of a block to originals and to each other."""
    hidden, block = q.shape[3], q.shape[4]
    before = copies.reach - 1

    def take(x: Array, axis: int) -> Array:
        return lax.dynamic_slice_in_dim(x, number * block, before + block, axis)

    near_k, near_v = take(inputs.k, 3), take(inputs.v, 3)
    token, segment = take(inputs.place, 1), take(inputs.segments, 1)
    own_token, own_segment = token[:, before:], segment[:, before:]

    index = number * block + jnp.arange(block, dtype=jnp.int32)
    seen = jnp.arange(keys.shape[2], dtype=jnp.int32) <= index[:, None]
    is_token = (own_segment > 0)[:, :, None]
    seen &= is_token & (own_segment[:, :, None] == segments[:, None])
    far = _product("bhgjpd,bhsd->bhgjps", q, keys) * scale
    far = jnp.where(seen[:, None, None, None], far, -jnp.inf)

    copy = jnp.arange(hidden, dtype=jnp.int32)
    sees = copies.sees(
        own_token[:, None, :, None, None],
        copy[:, None, None, None],
        token[:, None, None, None],
        copy[:, None],
    )  # (B, J, P, J, M)
    alike = is_token & (own_segment[:, :, None] == segment[:, None])
    sees &= alike[:, None, :, None]
    near = _product("bhgjpd,bhimd->bhgjpim", q, near_k) * scale
    near = jnp.where(sees[:, None, None], near, -jnp.inf)

    top = jnp.maximum(far.max(-1), near.max((-1, -2)))
    # Padding sees nothing.
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    far, near = jnp.exp(far - top[..., None]), jnp.exp(near - top[..., None, None])
    total = far.sum(-1) + near.sum((-1, -2))
    out = _product("bhgjps,bhsd->bhgjpd", far.astype(values.dtype), values)
    out += _product("bhgjpim,bhimd->bhgjpd", near.astype(values.dtype), near_v)
    return out / jnp.where(total == 0, 1.0, total)[..., None]


def _product(axes: str, a: Array, b: Array) -> Array:
    wide = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return jnp.einsum(axes, a, b, preferred_element_type=wide)
