"""Counts beyond 31 bits, of each row, in two words: 64 bits may be off."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

BITS = 30  # of the low word: what is added to it does not pass 31


def none(rows: Int[Array, "B"]) -> Int[Array, "B 2"]:
    """Makes a count of nothing for as many rows."""
    return jnp.zeros((*rows.shape, 2), jnp.int32)


def add(count: Int[Array, "B 2"], more: Int[Array, "*B"]) -> Int[Array, "B 2"]:
    """Adds a number from 0 to 2**30, of each row or of all."""
    low = count[:, 0] + more
    high = count[:, 1] + (low >> BITS)
    return jnp.stack([low & ((1 << BITS) - 1), high], axis=-1)


def total(count: Int[Array, "*B 2"] | np.ndarray) -> np.ndarray:
    """Returns counts as whole numbers of 64 bits, on the host."""
    low, high = np.moveaxis(np.asarray(count, np.int64), -1, 0)
    return low + (high << BITS)
