"""Sums over all heads of a layer, some of which other devices may have.

Over a mesh a method's functions see the heads of one device, as `CacheSpec.share` says.
A choice that is one for all heads is made of sums over them: here, so that every device
makes the same one. For a whole layer these are the plain reductions.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kvjax.interface import CacheSpec


def count(spec: CacheSpec, of_own: int) -> int:
    """Returns how many heads the layer has, of which the spec's device has `of_own`."""
    return of_own if spec.share is None else of_own * spec.share.heads


def total(spec: CacheSpec, x: Array) -> Array:
    """Sums over axis 1, the heads, of all devices."""
    axis, own = axis_of(spec), x.sum(1)
    return own if axis is None else lax.psum(own, axis)


def mean(spec: CacheSpec, x: Array) -> Array:
    """Averages over axis 1, the heads, of all devices."""
    if axis_of(spec) is None:
        return x.mean(1)
    return total(spec, x) / jnp.asarray(count(spec, x.shape[1]), x.dtype)


def largest(spec: CacheSpec, x: Array) -> Array:
    """Returns the maximum over axis 1, the heads, of all devices."""
    axis, own = axis_of(spec), x.max(1)
    return own if axis is None else lax.pmax(own, axis)


def gathered(spec: CacheSpec, x: Array) -> Array:
    """Returns the heads of all devices along axis 1, in their order."""
    axis = axis_of(spec)
    return x if axis is None else lax.all_gather(x, axis, axis=1, tiled=True)


def own(spec: CacheSpec, x: Array, axis: int = 0) -> Array:
    """Returns the device's own heads of an array that has all of them along `axis`."""
    if spec.share is None or axis_of(spec) is None:
        return x
    size = x.shape[axis] // spec.share.heads
    return lax.dynamic_slice_in_dim(x, _place(spec) * size, size, axis)


def first(spec: CacheSpec) -> Array | int:
    """Returns the number of the device's first KV head."""
    return 0 if axis_of(spec) is None else _place(spec) * spec.num_kv_heads


def axis_of(spec: CacheSpec) -> str | None:
    """Returns the axis over which the heads lie, if they are on several devices."""
    share = spec.share
    return None if share is None or share.heads == 1 else share.axis


def _place(spec: CacheSpec) -> Array:
    return lax.axis_index(axis_of(spec))
