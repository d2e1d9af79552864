"""The statistics of a page's keys that a query's scores can be bounded from."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Statistics(NamedTuple):
    """The statistics of the keys of each page, element by element."""

    minimum: Float[Array, "*B D"]  # in the keys' dtype
    maximum: Float[Array, "*B D"]
    mean: Float[Array, "*B D"]  # float32
    variance: Float[Array, "*B D"]  # float32, over P and not P - 1


# --- what is stored of a page, and what it says of a query


def page_statistics(keys: Float[Array, "*B P D"]) -> Statistics:
    """Summaries of whole pages of keys, as they are cached (rotated).

    The variance in two passes: the mean of squares less the square of the mean would
    lose the digits of keys far from 0.
    """
    wide = keys.astype(jnp.float32)
    mean = wide.mean(-2)
    variance = jnp.square(wide - mean[..., None, :]).mean(-2)
    return Statistics(keys.min(-2), keys.max(-2), mean, variance)
