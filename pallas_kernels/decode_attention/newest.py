"""Attention to quantised rows, and to the newest tokens as they came: two parts.

The first ends where the second begins, a query at a time, so that what computes it
needs to know nothing of the second. The second is a few rows, which XLA reads.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import reference
from pallas_kernels.shared.quantized import WithNewest
from pallas_kernels.shared.split_k import joined


def decode_attention(
    attend: Callable[..., tuple[Array, ...]],
    q: Float[Array, "B Hq T D"],
    k: WithNewest,
    v: WithNewest,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B H S"] | None,
    *,
    sm_scale: float,
    window: int | None,
    soft_cap: float | None,
    with_logits: bool,
) -> tuple[Array, ...]:
    """Attends as :func:`pallas_kernels.decode_attention.decode_attention` does.

    Args:
        attend: that function, for rows that are all quantised.
        q, k, v, query_positions, key_positions: its arguments.
        sm_scale, soft_cap, with_logits: its options.
        window: None.

    Raises:
        NotImplementedError: for a window, which would not end where the first part
            does.
    """
    if window is not None:
        raise NotImplementedError(
            f"{window=} over rows with the newest beside them: use window=None."
        )
    options = {"sm_scale": sm_scale, "soft_cap": soft_cap, "with_logits": with_logits}
    until = k.stored_until(query_positions)
    older = attend(q, k.rows, v.rows, until, key_positions, **options)
    newest = (q, k.newest, v.newest, query_positions, held(k, key_positions))
    newest = reference.decode_attention(*newest, window=k.residual, **options)
    merged = joined(older[0], older[1], newest[:2])
    if not with_logits:
        return merged
    logits = older[-1], newest[-1]
    width = k.at.shape[1]
    beside = _beside(*logits, width, until, query_positions, key_positions)
    return *merged, beside


def decode_logits(
    q: Float[Array, "B Hq T D"],
    k: WithNewest,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B H S"] | None,
    *,
    sm_scale: float,
) -> Float[Array, "B Hq T S"]:
    """Computes the logits of :func:`pallas_kernels.decode_attention.decode_logits`."""
    until = k.stored_until(query_positions)
    older = reference.decode_logits(q, k.rows, until, key_positions, sm_scale=sm_scale)
    newest = reference.decode_logits(
        q, k.newest, query_positions, k.at[:, None], sm_scale=sm_scale
    )
    return _beside(older, newest, k.at.shape[1], until, query_positions, key_positions)


def held(
    rows: WithNewest, key_positions: Int[Array, "#B H S"] | None
) -> Int[Array, "B H W"]:
    """Returns the positions of the newest tokens that slots hold, -1 = none."""
    at = rows.at[:, None]
    if key_positions is None:
        return at
    is_held = (key_positions[:, :, None, :] == at[..., None]).any(-1)
    return jnp.where(is_held, at, -1)


def _beside(
    older: Float[Array, "B Hq T S"],
    newest: Float[Array, "B Hq T W"],
    width: int,
    until: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B H S"] | None,
) -> Float[Array, "B Hq T S"]:
    """Puts the logits of the newest tokens where their slots are."""
    if key_positions is None:
        key_positions = jnp.arange(older.shape[3], dtype=jnp.int32)[None, None]
    heads = older.shape[1] // key_positions.shape[1]
    if key_positions.shape[1] > 1:
        key_positions = jnp.repeat(key_positions, heads, axis=1)
    position = key_positions[:, :, None]
    is_new = (position > until[:, None, :, None]) & (
        position <= query_positions[:, None, :, None]
    )
    slots = jnp.broadcast_to(jnp.maximum(position, 0) % width, older.shape)
    return jnp.where(is_new, jnp.take_along_axis(newest, slots, axis=3), older)
