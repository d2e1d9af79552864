"""Reservoirs: keys of tokens drawn at random from a stream, in slots of fixed number.

Every slot is won by a race: each token has a number of its own for it, and the lowest
wins. That is the law of reservoir sampling (replace with probability weight over the
sum so far, Efraimidis and Spirakis, 2006), but no running sum enters a comparison: a
minimum does not depend on the order, the chunks or the appends that it was taken in.
Numbers come of a key, the token's position, the KV head and the slot, by Threefry.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from kvjax.attention.heads import count, own
from kvjax.interface import CacheSpec

GENERATOR = "threefry2x32"
CHUNK = 256  # tokens whose numbers exist at once
UNIFORM, WEIGHTED = 0, 1  # the two races of a token, which draw apart
LAST = jnp.iinfo(jnp.uint32).max


class Winners(NamedTuple):
    """The token that won each slot of a race, and the number it won by."""

    positions: Int[Array, "*B K"]  # -1 = nobody's
    race: Array  # `(*B, K)`, uint32 or float32; the highest there is where nobody won


def row_keys(seed: int, layer: int, batch: int) -> UInt[Array, "B 2"]:
    """Makes the key of a layer, raw, the same for every row.

    A row's draws depend neither on its place in a batch nor on other rows.
    """
    key = jax.random.key(seed, impl=GENERATOR)
    data = jax.random.key_data(jax.random.fold_in(key, layer))
    return jnp.broadcast_to(data, (batch, *data.shape))


def bits(
    key: UInt[Array, "B 2"],
    positions: Int[Array, "B N"],
    race: int,
    heads: int,
    slots: int,
    spec: CacheSpec | None = None,
) -> UInt[Array, "B H N K"]:
    """Draws 32 bits for each token, KV head and slot; the key is not used up.

    With the spec of a device's share, its heads' part of what the layer's draw.
    """
    every = heads if spec is None else count(spec, heads)

    def one(key: UInt[Array, "2"], position: Int[Array, ""]) -> UInt[Array, "H K"]:
        wrapped = jax.random.wrap_key_data(key, impl=GENERATOR)
        of_token = jax.random.fold_in(jax.random.fold_in(wrapped, position), race)
        drawn = jax.random.bits(of_token, (every, slots), jnp.uint32)
        return drawn if spec is None else own(spec, drawn)

    drawn = jax.vmap(jax.vmap(one, (None, 0)))(key, positions)
    return drawn.swapaxes(1, 2)


def exponentials(
    drawn: UInt[Array, "B H N K"], weights: Float[Array, "B H N"]
) -> Float[Array, "B H N K"]:
    """Turns bits into waiting times, the shorter the heavier a token; never if 0.

    The least of some is a token's with probability its weight over their sum.
    """
    # All 32 bits: a float32 uniform has 24, and ties among many tokens.
    uniform = (drawn.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    weights = weights[..., None].astype(jnp.float32)
    is_in = weights > 0
    times = -jnp.log1p(-uniform) / jnp.where(is_in, weights, 1.0)
    return jnp.where(is_in, times, jnp.inf)


def race_weighted(
    key: UInt[Array, "B 2"],
    weights: Float[Array, "B H S"],
    slots: int,
    spec: CacheSpec | None = None,
) -> Winners:
    """Draws a token for every slot, each position with the chance of its weight."""
    batch, heads, size = weights.shape

    def step(won: Winners, positions: Int[Array, "N"]) -> Winners:
        at = jnp.broadcast_to(positions, (batch, *positions.shape))
        some = lax.dynamic_slice_in_dim(weights, positions[0], len(positions), 2)
        times = exponentials(bits(key, at, WEIGHTED, heads, slots, spec), some)
        first = positions[times.argmin(2)]
        return _earlier(won, Winners(first, times.min(2)))

    nobody = Winners(
        jnp.full((batch, heads, slots), -1, jnp.int32),
        jnp.full((batch, heads, slots), jnp.inf, jnp.float32),
    )
    return _over_chunks(step, nobody, size)


def race_uniform(
    key: UInt[Array, "B 2"],
    labels: Int[Array, "B H S"],
    centres: Int[Array, "B H M"],
    per_cluster: int,
    spec: CacheSpec | None = None,
) -> Winners:
    """Draws `per_cluster` tokens of each cluster, all with the same chance.

    Args:
        key: of each row.
        labels: the cluster of the token at each position, -1 = none.
        centres: a token of each cluster, that stands where nobody wins.
        per_cluster: slots K of a cluster.
        spec: as :func:`bits`.

    Returns:
        Positions and bits `(B, Hkv, M, K)`.
    """
    batch, heads, size = labels.shape
    clusters = centres.shape[2]

    def lowest(label: Int[Array, "N"], of: Array) -> Array:
        highest = jnp.full((clusters, per_cluster), jnp.iinfo(of.dtype).max, of.dtype)
        return highest.at[label].min(of, mode="drop")

    per_head = jax.vmap(jax.vmap(lowest))

    def step(won: Winners, positions: Int[Array, "N"]) -> Winners:
        at = jnp.broadcast_to(positions, (batch, *positions.shape))
        label = lax.dynamic_slice_in_dim(labels, positions[0], len(positions), 2)
        label = jnp.where(label < 0, clusters, label)
        drawn = bits(key, at, UNIFORM, heads, per_cluster, spec)
        least = per_head(label, drawn)
        own = jnp.minimum(label, clusters - 1)[..., None]
        is_least = drawn == jnp.take_along_axis(least, own, axis=2)
        none = jnp.iinfo(jnp.int32).max
        first = per_head(label, jnp.where(is_least, positions[:, None], none))
        return _earlier(won, Winners(first, least))

    begun = jnp.broadcast_to(centres[..., None], (*centres.shape, per_cluster))
    nobody = Winners(begun, jnp.full(begun.shape, LAST, jnp.uint32))
    return _over_chunks(step, nobody, size)


def _earlier(won: Winners, by: Winners) -> Winners:
    """Returns the winners of both, the former where they tie."""
    is_new = by.race < won.race
    return Winners(
        jnp.where(is_new, by.positions, won.positions),
        jnp.where(is_new, by.race, won.race),
    )


def _over_chunks(
    step: Callable[[Winners, Int[Array, "N"]], Winners], won: Winners, size: int
) -> Winners:
    """Runs a race over all positions, `CHUNK` at a time.

    The last chunk is moved back to where it fits: who runs again wins nothing new.
    """
    chunk = min(CHUNK, size)
    offset = jnp.arange(chunk, dtype=jnp.int32)

    def body(i: Int[Array, ""], won: Winners) -> Winners:
        start = jnp.minimum(i * chunk, size - chunk).astype(jnp.int32)
        return step(won, start + offset)

    return lax.fori_loop(jnp.int32(0), jnp.int32(-(-size // chunk)), body, won)
