"""The highest of many scores, by a search that halves groups and reads few of them.

Nothing here knows what is scored: pages, tokens, chunks.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import topk

Representative = Literal["centre", "first", "last"]


class Found(NamedTuple):
    """The candidates that a search ended with, and its length."""

    ids: Int[Array, "*B K"]  # distinct, best first, -1 = none
    rounds: Int[Array, ""]  # of all rows together: those of the longest search


def tree_search(
    score: Callable[[Int[Array, "*B N"]], Float[Array, "*B N"]],
    first: Int[Array, "*B"],
    count: Int[Array, "*B"],
    num: int,
    representative: Representative = "centre",
) -> Found:
    """Searches the candidates first ... first + count - 1 for the `num` best.

    They are cut into `num` groups of about one size. In each round every group is cut
    in two, a half is scored by one of its members, and the `num` best halves go on,
    until they are single candidates. A group dropped early does not come back.

    Args:
        score: of candidates; called with 2 * num of each row in every round.
        first, count: of each row's candidates; at most `num` if there are fewer.
        num: candidates to find, below 46,341.
        representative: the member of a group that is scored.

    Returns:
        The candidates found, min(num, count) of them. Of equal scores that of the
        group that came first goes on, and of the two halves of one the lower.
    """
    share, rest = (x[..., None] for x in jnp.divmod(count, num))
    edge = jnp.arange(num + 1, dtype=jnp.int32)
    # floor(j * count / num), in numbers that never exceed the count.
    edges = edge * share + edge * rest // num
    lowest = first[..., None]
    groups = lowest + edges[..., :-1], jnp.diff(edges), jnp.int32(0)

    def narrow(
        groups: tuple[Int[Array, "*B K"], Int[Array, "*B K"], Int[Array, ""]],
    ) -> tuple[Int[Array, "*B K"], Int[Array, "*B K"], Int[Array, ""]]:
        start, size, rounds = groups
        left = size // 2
        halves = interleave(start, start + left), interleave(left, size - left)
        member = halves[0] + offset_of(halves[1], representative)
        scores = score(jnp.where(halves[1] > 0, member, lowest))
        _, chosen = topk.top_k(scores, num, where=halves[1] > 0)
        start, size = (
            jnp.take_along_axis(x, jnp.maximum(chosen, 0), axis=-1) for x in halves
        )
        return start, jnp.where(chosen < 0, 0, size), rounds + 1

    def is_wide(
        groups: tuple[Int[Array, "*B K"], Int[Array, "*B K"], Int[Array, ""]],
    ) -> Array:
        # The first round also orders what is few enough to need no search. A group of
        # one is cut into none and itself: in the rounds of other rows nothing changes.
        return (groups[2] == 0) | (groups[1] > 1).any()

    start, size, rounds = lax.while_loop(is_wide, narrow, groups)
    return Found(jnp.where(size > 0, start, -1), rounds)


def interleave(
    left: Int[Array, "*B K"], right: Int[Array, "*B K"]
) -> Int[Array, "*B N"]:
    """Puts the halves of every group side by side, the left one first."""
    return jnp.stack([left, right], -1).reshape(*left.shape[:-1], -1)


def offset_of(
    size: Int[Array, "*B N"], representative: Representative
) -> Int[Array, "*B N"]:
    """Returns where in groups of a size the member is that is scored."""
    if representative == "centre":
        return size // 2
    return size - 1 if representative == "last" else jnp.zeros_like(size)


def most_rounds(count: int, num: int) -> int:
    """Bounds the rounds of a search for `num` of `count` candidates."""
    return max(1, (-(-count // num) - 1).bit_length())
