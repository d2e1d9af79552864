"""Clusters of keys by direction, scores of their centroids, and lists of whole ones.

Tokens are stored in the order of clusters, so that a cluster is a run of slots. Nothing
here is as large as keys times clusters: keys go by in blocks.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention import decode_logits
from pallas_kernels.shared.quantized import Rows, floats

BLOCK = 512  # keys whose products with all centres exist at once
TINY = 1e-12  # a key of no length has no direction
FINEST = 10_000  # the largest denominator of a share


class Clusters(NamedTuple):
    """The clusters of the first tokens of each row, by KV head."""

    labels: Int[Array, "B H S"]  # cluster of each token; C of tokens that have none
    means: Float[Array, "B H C D"]  # of the keys as they came, float32; 0 of no key
    size: Int[Array, "B H C"]  # keys in it; 0 = no cluster


def share_of(count: Any, share: float) -> Any:
    """Returns floor(share * count) exactly, of whole numbers, traced or not."""
    ratio = Fraction(share).limit_denominator(FINEST)
    part, whole = ratio.numerator, ratio.denominator
    return count // whole * part + count % whole * part // whole


def unit(keys: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Divides keys by their lengths, in float32; a key of zeros stays one."""
    keys = keys.astype(jnp.float32)
    return keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), TINY)


def kmeans(
    keys: Float[Rows, "B H S D"],
    count: Int[Array, "B H"],
    num: Int[Array, "B H"],
    most: int,
    rounds: int,
) -> Clusters:
    """Clusters the directions of the first `count` keys of each head.

    Lloyd's rounds on unit vectors: a key goes to the centre nearest to it, the lower
    one among equals; a centre becomes the mean of its directions, which is not made a
    unit vector again, and stays where it has none. They start at keys at even distances
    from each other. Nothing is drawn: the result depends on the keys alone.

    Args:
        num: clusters of each head, at most `most` and at most its keys.
        most: C, static.
        rounds: after them each key goes to its centre once more.
    """
    index = jnp.arange(most, dtype=jnp.uint32)
    whole, parts = (
        jnp.maximum(x, 1).astype(jnp.uint32)[..., None] for x in (count, num)
    )
    # floor(index * count / num), without a product that passes 32 bits.
    start = index * (whole // parts) + index * (whole % parts) // parts
    start = jnp.minimum(start, whole - 1).astype(jnp.int32)
    is_centre = index.astype(jnp.int32) < num[..., None]
    centres = unit(_taken(keys, start))

    def improve(_: Int[Array, ""], centres: Array) -> Array:
        found = assign(keys, count, centres, is_centre, directions=True)
        return jnp.where(found.size[..., None] > 0, found.means, centres)

    centres = lax.fori_loop(0, rounds, improve, centres)
    return assign(keys, count, centres, is_centre)


def _taken(keys: Rows, slots: Int[Array, "B H C"]) -> Float[Array, "B H C D"]:
    taken = jax.tree.map(
        lambda x: jnp.take_along_axis(x, slots[..., None], axis=2), keys
    )
    return floats(taken)


def assign(
    keys: Float[Rows, "B H S D"],
    count: Int[Array, "B H"],
    centres: Float[Array, "B H C D"],
    is_centre: Bool[Array, "B H C"],
    *,
    directions: bool = False,
) -> Clusters:
    """Assigns the first `count` keys of each head to the centres nearest to them.

    Args:
        directions: the means are of unit vectors, and labels are left out: all C.
    """
    batch, heads, slots = keys.shape[:3]
    most, block = centres.shape[2], min(BLOCK, slots)
    # |u - z|^2 / 2, without the term that is the same for every centre.
    penalty = 0.5 * jnp.square(centres).sum(-1)
    penalty = jnp.where(is_centre, penalty, jnp.inf)[..., None]
    numbers = jnp.arange(most, dtype=jnp.int32)[:, None]

    def add_block(index: Int[Array, ""], found: Clusters) -> Clusters:
        index = index.astype(jnp.int32)
        # The last one is moved back, and what was counted before is passed over.
        start = jnp.minimum(index * block, slots - block)
        taken = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, start, block, 2), keys
        )
        rows = floats(taken).astype(jnp.float32)
        directed = unit(rows)
        place = start + jnp.arange(block, dtype=jnp.int32)
        is_new = (place >= index * block) & (place < count[..., None])
        products = jnp.einsum(
            "bhcd,bhsd->bhcs", centres, directed, precision=lax.Precision.HIGHEST
        )
        closeness = products - penalty
        best = closeness.max(2, keepdims=True)
        # The lowest of those that are nearest.
        label = jnp.where(closeness == best, numbers, most).min(2)
        label = jnp.where(is_new, label, most)
        sums, size = add_to(
            found.means, found.size, directed if directions else rows, label
        )
        if directions:
            return Clusters(found.labels, sums, size)
        old = lax.dynamic_slice_in_dim(found.labels, start, block, 2)
        new = jnp.where(is_new, label, old)
        labels = lax.dynamic_update_slice_in_dim(found.labels, new, start, 2)
        return Clusters(labels, sums, size)

    nothing = Clusters(
        jnp.full((batch, heads, slots), most, jnp.int32),
        jnp.zeros(centres.shape, jnp.float32),
        jnp.zeros((batch, heads, most), jnp.int32),
    )
    blocks = (-(-count.max() // block)).astype(jnp.int32)
    found = lax.fori_loop(jnp.int32(0), blocks, add_block, nothing)
    number = jnp.maximum(found.size, 1).astype(jnp.float32)
    return found._replace(means=found.means / number[..., None])


def add_to(
    sums: Float[Array, "B H C D"],
    size: Int[Array, "B H C"],
    rows: Float[Array, "B H N D"],
    labels: Int[Array, "B H N"],
) -> tuple[Float[Array, "B H C D"], Int[Array, "B H C"]]:
    """Adds each row to the sum of its label, and counts it; label C is none.

    An accelerator sums by products: a GPU scatters in an order that is not always the
    same, and a TPU one by one.
    """

    def one_head(sums: Array, rows: Array, labels: Int[Array, "N"]) -> Array:
        return sums.at[labels].add(rows, mode="drop")

    def scattered(sums: Array, rows: Array) -> Array:
        return jax.vmap(jax.vmap(one_head))(sums, rows, labels)

    summed = lax.platform_dependent(
        sums,
        rows,
        cpu=scattered,
        default=lambda sums, rows: sums + multiplied(rows, labels, size.shape[-1]),
    )
    return summed, scattered(size, jnp.ones(labels.shape, jnp.int32))


def multiplied(
    rows: Float[Array, "B H N D"], labels: Int[Array, "B H N"], most: int
) -> Float[Array, "B H C D"]:
    """Sums the rows of each label by a product with which of them have it."""
    has_label = labels[..., None] == jnp.arange(most, dtype=jnp.int32)
    return jnp.einsum(
        "bhnc,bhnd->bhcd",
        has_label.astype(jnp.float32),
        rows,
        precision=lax.Precision.HIGHEST,
    )


def in_runs(labels: Int[Array, "B H N"]) -> Int[Array, "B H N"]:
    """Returns what goes into each place so that clusters lie together, in their order.

    Within a cluster order stays; what has no cluster, behind all that have, stays too.
    """
    return jnp.argsort(labels, axis=-1, stable=True).astype(jnp.int32)


def first_slots(size: Int[Array, "B H C"]) -> Int[Array, "B H C"]:
    """Returns where the run of each cluster begins."""
    return jnp.cumsum(size, axis=-1, dtype=jnp.int32) - size


# --- scores


def log_scores(
    q: Float[Array, "B Hq T D"],
    centroids: Float[Array, "B Hkv C D"],
    size: Int[Array, "B Hkv C"],
    *,
    sm_scale: float,
    counted: Int[Array, "B Hkv C"] | None = None,
) -> Float[Array, "B Hq T C"]:
    """Estimates the log of the softmax weight that a query gives one key of a cluster.

    As if every key were the centroid of its cluster: the weights of all keys add up to
    1. -inf where there is no cluster.

    Args:
        counted: keys of each cluster that the softmax is over, where not all are.
    """
    batch, heads, num = size.shape
    counted = size if counted is None else counted
    anywhere = jnp.zeros((batch, q.shape[2]), jnp.int32)
    places = jnp.where(size > 0, 0, -1)
    logits = decode_logits(q, centroids, anywhere, places, sm_scale=sm_scale)
    # By group of query heads, whose KV head's sizes they share.
    logits = logits.reshape(batch, heads, -1, num)
    mass = logits + jnp.log(counted.astype(jnp.float32))[:, :, None]
    mass = jax.nn.logsumexp(mass, axis=-1, keepdims=True)
    # Where there is no cluster at all: -inf, and not -inf less -inf.
    scores = logits - jnp.where(mass == -jnp.inf, 0.0, mass)
    return scores.reshape(batch, q.shape[1], q.shape[2], num)


def weighted_quantile(
    values: Float[Array, "*B N"], weights: Int[Array, "*B N"], share: float
) -> Float[Array, "*B"]:
    """Returns the quantile of values that each occur as often as their weight says.

    Between two values it is linear, as `numpy.quantile` of all of them. 0 of none.
    """
    ratio = Fraction(share).limit_denominator(FINEST)
    part, whole = ratio.numerator, ratio.denominator
    order = jnp.argsort(values, axis=-1)
    values, weights = (
        jnp.take_along_axis(x, order, axis=-1) for x in (values, weights)
    )
    upto = jnp.cumsum(weights, axis=-1, dtype=jnp.int32)
    last = jnp.maximum(upto[..., -1:] - 1, 0)
    # The rank last * share is a whole number and a fraction, both exact.
    low = share_of(last, share)
    fraction = (last % whole * part % whole).astype(jnp.float32) / whole

    def at(rank: Int[Array, "*B 1"]) -> Float[Array, "*B 1"]:
        # The first whose values reach beyond the rank.
        place = (upto <= rank).sum(-1, keepdims=True, dtype=jnp.int32)
        place = jnp.minimum(place, values.shape[-1] - 1)
        return jnp.take_along_axis(values, place, axis=-1)

    below, above = at(low), at(jnp.minimum(low + 1, last))
    found = below + fraction * (above - below)
    return jnp.where(upto[..., -1] > 0, found[..., 0], 0.0)


# --- lists


def listed_slots(
    clusters: Int[Array, "B H K"],
    size: Int[Array, "B H C"],
    first: Int[Array, "B H C"],
    most: int,
) -> Int[Array, "B H M"]:
    """Lists the slots of clusters, one run after the other; -1 behind the last.

    Args:
        clusters: best first, then -1.
        size, first: of every cluster, how many slots it has and which is the first.
        most: M, slots of the list: the run that passes it is cut.
    """
    place = jnp.maximum(clusters, 0)
    count = jnp.where(clusters >= 0, jnp.take_along_axis(size, place, axis=-1), 0)
    begin = jnp.take_along_axis(first, place, axis=-1)
    upto = jnp.cumsum(count, axis=-1, dtype=jnp.int32)
    rank = jnp.arange(most, dtype=jnp.int32)

    def which(upto: Int[Array, "K"]) -> Int[Array, "M"]:
        return jnp.searchsorted(upto, rank, side="right").astype(jnp.int32)

    run = jax.vmap(jax.vmap(which))(upto)
    is_there = run < clusters.shape[-1]
    run = jnp.minimum(run, clusters.shape[-1] - 1)
    # Slot of rank r in its run: the first, and how far r is behind where the run began.
    shift = jnp.take_along_axis(begin - (upto - count), run, axis=-1)
    return jnp.where(is_there, shift + rank, -1)
