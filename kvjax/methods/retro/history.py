"""The attention of the newest tokens so far, and how later steps add to it.

    W   tokens of the window: the newest, and those before it that are revised with it
    R   past tokens that are revised: W - 1

A row of a step is a token of the window, the newest last. Softmax only: results over
disjoint pages merge.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial
from kvjax.interface import CacheSpec
from kvjax.stores import buffers


class Window(NamedTuple):
    """The newest tokens of each row of a batch, one layer, after their last step."""

    start: Int[Array, "B"]  # the first position that a step decoded
    # Position of the token whose step read a page last, -1 = none so far: token t has
    # seen exactly the pages where it is t or later.
    last_loaded: Int[Array, "B H NP"]
    out: Float[Array, "B Hq R D"]  # attention over what each has seen, oldest first
    lse: Float[Array, "B Hq R"]


def empty(spec: CacheSpec, rows: int, lists: int, num_pages: int) -> Window:
    """Makes a window that has seen nothing."""
    past = (spec.batch, spec.num_q_heads, rows - 1)
    is_double = jnp.dtype(spec.dtype) == jnp.float64
    wide = jnp.float64 if is_double else jnp.float32
    return Window(
        buffers.lengths(spec),
        buffers.allocate((spec.batch, lists, num_pages), jnp.int32, fill=-1.0),
        buffers.allocate((*past, spec.head_dim), wide, fill=0.0),
        buffers.allocate(past, wide, fill=-jnp.inf),
    )


def is_decoded(window: Window, positions: Int[Array, "B W"]) -> Bool[Array, "B W"]:
    """Rows that a step decoded: tokens of the prompt are exact, and left alone."""
    return positions >= window.start[:, None]


def unseen(
    window: Window, page_ids: Int[Array, "B H K"], positions: Int[Array, "B W"]
) -> Bool[Array, "B H K W"]:
    """Says which listed pages (-1 = none) each row has not attended to yet."""
    loaded = jnp.take_along_axis(window.last_loaded, jnp.maximum(page_ids, 0), axis=2)
    # A row of position t has seen what was loaded from step t on. None was loaded at
    # the newest token's step yet, so to it all are new.
    is_new = loaded[..., None] < positions[:, None, None, :]
    decoded = is_decoded(window, positions)[:, None, None, :]
    return (page_ids[..., None] >= 0) & is_new & decoded


def attention_so_far(window: Window, positions: Int[Array, "B W"]) -> Partial:
    """Returns each row's attention to what it has seen: of the newest, none yet."""
    decoded = is_decoded(window, positions)[:, None, :-1]
    lse = jnp.where(decoded, window.lse, -jnp.inf)
    newest = ((0, 0), (0, 0), (0, 1))
    return Partial(
        jnp.pad(window.out, (*newest, (0, 0))),
        jnp.pad(lse, newest, constant_values=-jnp.inf),
    )


def advance(
    window: Window,
    page_ids: Int[Array, "B H K"],
    position: Int[Array, "B"],
    attended: Partial,
) -> Window:
    """Records that `page_ids` were read at `position`, and each row's attention now."""
    now = jnp.broadcast_to(position[:, None, None], page_ids.shape)
    return window._replace(
        last_loaded=buffers.write(window.last_loaded, now, page_ids, page_ids >= 0),
        out=attended.out[:, :, 1:].astype(window.out.dtype),
        lse=attended.lse[:, :, 1:].astype(window.lse.dtype),
    )


def end(window: Window, length: Int[Array, "B"]) -> Window:
    """Ends the revision of the tokens so far, of a prompt or before a rewind.

    Pages that tokens now gone have loaded are not seen by those that come instead.
    """
    last = (length - 1)[:, None, None]
    loaded = jnp.minimum(window.last_loaded, last)
    return window._replace(start=length, last_loaded=loaded)


def num_seen(
    window: Window, length: Int[Array, "B"], page_size: int
) -> Int[Array, "B H W"]:
    """Counts the pages that each row of the last step has seen, of those up to its own.

    The newest token comes last, with what its step read; -1 = no such token. What a
    row has seen n steps later over what it read itself is the effective KV exposure.
    """
    rows = window.out.shape[2] + 1
    positions = length[:, None] - rows + jnp.arange(rows, dtype=jnp.int32)
    page = jnp.arange(window.last_loaded.shape[2], dtype=jnp.int32)
    t = positions[:, None, :, None]
    is_seen = (window.last_loaded[:, :, None] >= t) & (page * page_size <= t)
    count = is_seen.sum(-1, dtype=jnp.int32)
    return jnp.where(is_decoded(window, positions)[:, None], count, -1)


def exposure(counts: Int[np.ndarray, "steps *B W"]) -> Float[np.ndarray, "W"]:
    """Computes E_n, the mean over tokens of |union of S_t .. S_t+n| / |S_t|, n < W.

    Args:
        counts: what :func:`num_seen` gave at every step, in order.
    """
    ratios = []
    for age in range(counts.shape[-1]):
        own = counts[: len(counts) - age, ..., -1]
        later = counts[age:, ..., counts.shape[-1] - 1 - age]
        decoded = own > 0
        ratios.append(float((later[decoded] / own[decoded]).mean()))
    return np.array(ratios)


class Revision(NamedTuple):
    """The effect of one step on past tokens, oldest first; NaN = no such token."""

    correction: Float[Array, "B Hq R"]  # relative L2 change of the attention output
    new_pages: Float[Array, "B H R"]  # share of the pages read that are new to it


def revision(
    before: Window, after: Window, length: Int[Array, "B"], page_size: int
) -> Revision:
    """Compares the windows before and after a step that ended with `length` tokens.

    The window holds the tokens revised in this step and kept for the next: R - 1 of
    them, behind a NaN for the one that left.
    """
    past = before.out.shape[2]
    positions = length[:, None] - 1 - past + jnp.arange(past, dtype=jnp.int32)
    decoded = is_decoded(before, positions)[:, None]
    left = ((0, 0), (0, 0), (1, 0))

    old, new = before.out[:, :, 1:], after.out[:, :, :-1]
    gap = jnp.linalg.norm(new - old, axis=-1)
    scale = jnp.linalg.norm(new, axis=-1)
    correction = gap / jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)
    correction = jnp.pad(correction, left, constant_values=jnp.nan)

    page = jnp.arange(before.last_loaded.shape[2], dtype=jnp.int32)
    t = positions[:, None, :, None]
    read = after.last_loaded == length[:, None, None] - 1
    is_new = (before.last_loaded[:, :, None] < t) & (page * page_size <= t)
    count = (read[:, :, None] & is_new).sum(-1)
    share = count.astype(jnp.float32) / read.sum(-1, keepdims=True).astype(jnp.float32)
    return Revision(
        jnp.where(decoded, correction, jnp.nan), jnp.where(decoded, share, jnp.nan)
    )
