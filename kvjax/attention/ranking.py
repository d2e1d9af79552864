"""The highest of scores that come in parts: each is pooled with its neighbours."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.topk import top_k


class Best(NamedTuple):
    """The tokens that score highest of those that came."""

    scores: Float[Array, "B R K"]  # pooled, best first; -inf = none
    positions: Int[Array, "B R K"]  # of equals the lower first; -1 = none
    before: Float[Array, "B R W"]  # the last that came, which meet the next: kernel - 1


def none_yet(batch: int, rows: int, most: int, kernel: int) -> Best:
    """Makes the best of no scores: at most `most` of each row, pooled over `kernel`."""
    return Best(
        jnp.full((batch, rows, most), -jnp.inf, jnp.float32),
        jnp.full((batch, rows, most), -1, jnp.int32),
        jnp.full((batch, rows, kernel - 1), -jnp.inf, jnp.float32),
    )


def add(
    best: Best,
    scores: Float[Array, "B R N"],
    start: int | Int[Array, ""],
    end: Int[Array, "B"],
) -> Best:
    """Adds the scores of adjacent tokens, from position `start` on.

    Those of the last few tokens count once their neighbours have come.

    Args:
        scores: -inf = none.
        end: the position of each row from which on there is no token.
    """
    kernel = best.before.shape[-1] + 1
    near = jnp.concatenate([best.before, scores], axis=-1)
    pooled = lax.reduce_window(
        near, -jnp.inf, lax.max, (1, 1, kernel), (1, 1, 1), "VALID"
    )
    position = start - kernel // 2 + jnp.arange(scores.shape[-1], dtype=jnp.int32)
    is_token = (position >= 0) & (position < end[:, None, None])
    pooled = jnp.where(is_token, pooled, -jnp.inf)
    positions = jnp.broadcast_to(position, scores.shape)
    # What came before is first, and of equals the first is taken.
    both = jnp.concatenate([best.positions, positions], axis=-1)
    values, where = top_k(
        jnp.concatenate([best.scores, pooled], axis=-1), best.scores.shape[-1]
    )
    taken = jnp.take_along_axis(both, jnp.maximum(where, 0), axis=-1)
    before = near[..., scores.shape[-1] :]
    return Best(values, jnp.where(where < 0, -1, taken), before)


def ended(best: Best, start: int | Int[Array, ""], end: Int[Array, "B"]) -> Best:
    """Returns the best of all: no score comes from position `start` on."""
    size = best.before.shape[-1] // 2
    if not size:
        return best
    nothing = jnp.full((*best.scores.shape[:2], size), -jnp.inf, jnp.float32)
    return add(best, nothing, start, end)


def of_groups(
    scores: Float[Array, "B R K"], positions: Int[Array, "B R K"], groups: int
) -> Int[Array, "B H K"]:
    """Ranks the tokens that any row of a group lists by their highest scores there.

    Of lists that hold the best of their row, these are the best of all scores' maxima:
    whatever a row ranks below as many others as the list has, so does their maximum.

    Args:
        scores: -inf = none.
        positions: of the tokens.
        groups: of adjacent rows.

    Returns:
        Positions, best first, of equals the lower; -1 = none.
    """
    by_group = (len(scores), groups, -1)
    is_none = (positions < 0) | (scores == -jnp.inf)
    place = jnp.where(is_none, jnp.iinfo(jnp.int32).max, positions)
    place, lowest = lax.sort(
        (place.reshape(by_group), -scores.reshape(by_group)), num_keys=2
    )
    is_again = jnp.pad(place[..., 1:] == place[..., :-1], ((0, 0), (0, 0), (1, 0)))
    _, where = top_k(jnp.where(is_again, -jnp.inf, -lowest), scores.shape[-1])
    found = jnp.take_along_axis(place, jnp.maximum(where, 0), axis=-1)
    return jnp.where(where < 0, -1, found)
