"""The theorem's promise in numbers, of given keys: they may be too large to mean much.

For tokens F of keys K, values V and weights p = softmax(K x), x a scaled query:

    |log tau - log Z| <= diameter of the widest cluster * |x|, for every draw
    sqrt(mean |z - N|^2) / Z <= |V|_F |p| / sqrt(s) <= sqrt(D / s) |V|_op |p|

The paper asks for t = e^(2 delta |x|) log(n) / eps^2 keys of each cluster, but for a
constant, where delta bounds diameters: of fewer than n only where the exponent is below
log n.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.attention.centres import Clusters, farthest_first
from kvjax.methods.subgen.stream import squared_norm


def diameters(clusters: Clusters) -> Float[Array, "B H"]:
    """Returns twice the largest distance of a key to its centre: no diameter is more.

    0 where there are no keys.
    """
    joined = jnp.where(clusters.labels >= 0, clusters.squared, 0.0)
    return 2 * jnp.sqrt(joined.max(-1))


def lengths(
    x: Float[Array, "B Hq T D"], num_kv_heads: int
) -> Float[Array, "B Hkv G T"]:
    """Returns |x| of scaled queries, by the KV head that they ask."""
    norms = jnp.sqrt(squared_norm(x))
    return norms.reshape(x.shape[0], num_kv_heads, -1, x.shape[2])


def normaliser(
    clusters: Clusters, x: Float[Array, "B Hq T D"]
) -> Float[Array, "B Hkv G T"]:
    """Bounds |log tau - log Z|, in nats, for every draw of keys."""
    widest = diameters(clusters)
    return widest[..., None, None] * lengths(x, widest.shape[1])


def log_samples(
    nats: Float[Array, "*B"], tokens: int, error: float
) -> Float[Array, "*B"]:
    """Returns the logarithm of the keys that the theorem asks of each cluster.

    Args:
        nats: delta |x|, as :func:`normaliser` has it.
        tokens: n; 3 or more.
        error: eps, relative to |V|_op |p|.

    Raises:
        ValueError: for fewer tokens, or an error that is not positive.
    """
    if tokens < 3 or not error > 0:
        raise ValueError(f"{tokens=} must be at least 3, and {error=} positive.")
    return 2 * nats + math.log(math.log(tokens) / error**2)


def numerator(
    weights: Float[Array, "B H T S"], values: Float[Array, "B H S D"], samples: int
) -> Float[Array, "B H T"]:
    """Bounds the root mean square of |z - N| / Z over draws of `samples` values.

    Args:
        weights: p, of the folded tokens alone; 0 of others.
        values: V; what has no weight in any row must be 0.
        samples: s.
    """
    frobenius = jnp.sqrt(squared_norm(values).sum(-1))[..., None]
    return frobenius * jnp.sqrt(squared_norm(weights)) / math.sqrt(samples)


def radius_over_spread(
    x: Float[Array, "B H S D"], candidates: Bool[Array, "B H S"], count: int
) -> Float[Array, "B H"]:
    """Divides the radius of greedy centres by the spread, the distance to the mean.

    The smaller it is, the more the vectors cluster.
    """
    found = farthest_first(x, candidates, count)
    weights = candidates[..., None]
    number = candidates.sum(-1, dtype=x.dtype)[..., None]
    mean = jnp.where(weights, x, 0.0).sum(2) / number
    apart = jnp.where(weights, x - mean[:, :, None], 0.0)
    wide = jnp.sqrt((apart**2).sum((2, 3)) / number[..., 0])
    return diameters(found) / 2 / wide
