"""Centres of keys: greedy k-center, and clusters that keys found as they come.

Distances are sums of squared differences, in float32: |a|^2 + |b|^2 - 2 a.b would
cancel between keys that are alike. A key that is no candidate may hold anything.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Clusters(NamedTuple):
    """Keys by the centre that each joined; the centres in use come first."""

    centres: Int[Array, "B H M"]  # the keys' slots, -1 = none
    labels: Int[Array, "B H S"]  # a number of a centre, -1 = no candidate
    squared: Float[Array, "B H S"]  # distance to it, squared; +inf = no candidate


def squared_distances(
    keys: Float[Array, "B H N D"], centre: Float[Array, "B H 1 D"]
) -> Float[Array, "B H N"]:
    """Returns the squared distance of each key to one centre."""
    apart = keys.astype(jnp.float32) - centre.astype(jnp.float32)
    return (apart * apart).sum(-1)


def farthest_first(
    keys: Float[Array, "B H S D"], candidates: Bool[Array, "B H S"], count: int
) -> Clusters:
    """Chooses `count` centres, each the candidate farthest from those before it.

    The first is the first candidate; ties go to the lower slot. Of any number of
    centres these have at most twice the least radius (Gonzalez, 1985). Of equal keys
    one is chosen until all distinct ones are; a key of a later centre's joins the
    earliest of the nearest, so that a centre that repeats another has no keys.
    """
    slots = jnp.arange(keys.shape[2], dtype=jnp.int32)

    def choose(
        i: Int[Array, ""], carry: tuple[Clusters, Bool[Array, "B H S"]]
    ) -> tuple[Clusters, Bool[Array, "B H S"]]:
        clusters, is_free = carry
        farthest = jnp.where(is_free, clusters.squared, -1.0)
        chosen = farthest.argmax(-1).astype(jnp.int32)
        is_one = is_free.any(-1)
        is_free &= slots != chosen[..., None]
        return _with_centre(clusters, keys, candidates, i, chosen, is_one), is_free

    begun = _no_centres(candidates, count), candidates
    number = jnp.int32(min(count, keys.shape[2]))
    return lax.fori_loop(jnp.int32(0), number, choose, begun)[0]


def online(
    keys: Float[Array, "B H S D"],
    candidates: Bool[Array, "B H S"],
    delta: float,
    most: int,
) -> Clusters:
    """Clusters candidates in their order: one joins the nearest centre, or founds one.

    It founds one if no centre is within `delta`, while there are fewer than `most`. A
    key keeps the centre it joined when it came. The loop is over foundings: between two
    of them every key is compared with the newest centre alone.
    """

    def is_far(clusters: Clusters) -> Bool[Array, "B H S"]:
        return candidates & (clusters.squared > delta * delta)

    def is_due(carry: tuple[Int[Array, ""], Clusters]) -> Bool[Array, ""]:
        return (carry[0] < most) & is_far(carry[1]).any()

    def found(
        carry: tuple[Int[Array, ""], Clusters],
    ) -> tuple[Int[Array, ""], Clusters]:
        i, clusters = carry
        far = is_far(clusters)
        # All keys before it are within delta of an earlier centre.
        founder = far.argmax(-1).astype(jnp.int32)
        later = jnp.arange(keys.shape[2], dtype=jnp.int32) >= founder[..., None]
        clusters = _with_centre(
            clusters, keys, candidates & later, i, founder, far.any(-1)
        )
        return i + 1, clusters

    begun = jnp.int32(0), _no_centres(candidates, most)
    return lax.while_loop(is_due, found, begun)[1]


def nearest(
    key: Float[Array, "B H 1 D"],
    centres: Float[Array, "B H M D"],
    is_used: Bool[Array, "B H M"],
) -> tuple[Int[Array, "B H"], Float[Array, "B H"]]:
    """Returns the nearest centre in use, the first of those, and its squared distance.

    The distance is +inf where none is in use.
    """
    squared = jnp.where(is_used, squared_distances(centres, key), jnp.inf)
    return squared.argmin(-1).astype(jnp.int32), squared.min(-1)


def sizes(clusters: Clusters) -> Int[Array, "B H M"]:
    """Counts the keys of each cluster."""
    count = clusters.centres.shape[-1]
    labels = clusters.labels[..., None, :]
    of_each = labels == jnp.arange(count, dtype=jnp.int32)[:, None]
    return of_each.sum(-1, dtype=jnp.int32)


def _no_centres(candidates: Bool[Array, "B H S"], count: int) -> Clusters:
    none = jnp.full((*candidates.shape[:2], count), -1, jnp.int32)
    apart = jnp.full(candidates.shape, jnp.inf, jnp.float32)
    return Clusters(none, jnp.full(candidates.shape, -1, jnp.int32), apart)


def _with_centre(
    clusters: Clusters,
    keys: Float[Array, "B H S D"],
    joining: Bool[Array, "B H S"],
    number: Int[Array, ""],
    slot: Int[Array, "B H"],
    is_one: Bool[Array, "B H"],
) -> Clusters:
    """Adds the key in `slot` as a centre, where there `is_one`; nearer keys join it."""
    centre = jnp.take_along_axis(keys, slot[..., None, None], axis=2)
    squared = squared_distances(keys, centre)
    joins = joining & is_one[..., None] & (squared < clusters.squared)
    chosen = jnp.where(is_one, slot, -1)
    return Clusters(
        clusters.centres.at[:, :, number].set(chosen),
        jnp.where(joins, number, clusters.labels),
        jnp.where(joins, squared, clusters.squared),
    )
