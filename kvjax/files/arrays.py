"""Marks that identify saved arrays: their layout, digests and fingerprints."""

import hashlib
import logging
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import files

WRITE = (OSError, ValueError, RuntimeError)


class DamagedError(ValueError):
    """A checkpoint that is not what was saved."""


def quiet_orbax() -> None:
    """Keeps orbax from printing a dozen tracebacks for an error that it raises too."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    # The other writes at that time say the same in three ways of their own.
    logging.getLogger("asyncio").addFilter(_is_no_lost_write)
    warnings.filterwarnings("ignore", "coroutine .*serialize.* was never awaited")
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


class _Hook(NamedTuple):
    """Passes on all but the errors of writes that end after the first that failed."""

    before: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if type(error) is not RuntimeError or str(error) != "Event loop is closed":
            self.before(unraisable)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in pathlib.Path(record.pathname).parts


def _is_no_lost_write(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in str(record.msg)


def dense(state: Any) -> Any:
    """Makes arrays of the host dense; orbax copies those of devices by their values."""
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else files.dense(x), state
    )


def describe(state: Any) -> dict[str, list]:
    """{path of a leaf: [shape, dtype]}, as JSON has it."""
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), jnp.dtype(leaf.dtype).name]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def digest(state: Any) -> str:
    """Sixteen hexadecimal digits that tell one set of arrays from another."""
    hashed = hashlib.sha256()
    for fingerprint in jax.device_get(fingerprints(state)):
        hashed.update(np.uint32(fingerprint).tobytes())
    return hashed.hexdigest()[:16]


def fingerprints(state: Any) -> list[jax.Array]:
    """A uint32 per leaf, of every bit and its place, whatever the sharding."""
    # One by one: a device may not have room for all that the host's memory holds.
    return [_fingerprint(leaf) for leaf in jax.tree.leaves(state)]


@jax.jit
def _fingerprint(leaf: jax.Array) -> jax.Array:
    leaf = jax.device_put(leaf, jax.memory.Space.Device)
    if leaf.dtype == jnp.bool_:
        bits = leaf.astype(jnp.uint32)
    else:
        width = np.dtype(leaf.dtype).itemsize * 8
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(leaf.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place + index * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    # Odd factors, so that no changed bit vanishes; sums of integers have no order.
    factor = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
    return jnp.sum(bits * factor, dtype=jnp.uint32)
