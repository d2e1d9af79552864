"""Meshes of devices: rows over `data`, heads and MLP over `tensor`.

The axes are those of :data:`AXES`. Where a model has fewer KV heads than `tensor` has
devices, that axis is two: `tensor` has the heads, and devices along `copies` hold the
same ones. They read the same cache, so that a step takes no longer than with one list
a query head, and what is chosen for a group of query heads is chosen by all of it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kvjax.interface import CacheSpec

AXES = ("data", "tensor", "copies")
ROWS, HEADS, COPIES = AXES
SPLIT = (HEADS, COPIES)  # the axes over which weights are split
_GIVEN = ("data", "tensor", "seq")  # names that a user may give
_FORM = "must name axes and their devices, as tensor=4 or data=2,tensor=2"


AnyMesh = Mesh | AbstractMesh


class Sizes(NamedTuple):
    """The devices along each axis of a mesh."""

    data: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.tensor


def parse(text: str) -> Sizes:
    """Returns the sizes that a text such as `data=2,tensor=4` names.

    Raises:
        ValueError: for other axes, sizes that are no numbers from 1 on, or an axis that
            is named twice; and for a `seq` of more than 1.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in _GIVEN or not size.isascii() or not size.isdigit():
            raise ValueError(f"mesh={text!r} {_FORM}; {part.strip()!r} is neither.")
        if name in found or int(size) < 1:
            what = "is there twice" if name in found else "is not at least 1"
            raise ValueError(f"mesh={text!r} {_FORM}; {part.strip()!r} {what}.")
        found[name] = int(size)
    if (tokens := found.pop("seq", 1)) != 1:
        raise ValueError(
            f"mesh={text!r}: seq={tokens} would split a cache by its tokens, which is "
            "not there yet: give seq=1, or more of tensor."
        )
    return Sizes(**found)


def make(sizes: Sizes | str, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of the first devices.

    Raises:
        ValueError: as :func:`parse`, or if there are fewer devices.
    """
    given = sizes
    sizes = parse(sizes) if isinstance(sizes, str) else sizes
    devices = jax.devices() if devices is None else devices
    if sizes.devices > len(devices):
        named = given if isinstance(given, str) else f"{sizes}"
        hint = (
            "; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{sizes.devices} makes as many"
            if devices[0].platform == "cpu"
            else ""
        )
        raise ValueError(
            f"mesh={named!r} needs {sizes.devices} devices, and there "
            f"{'is' if len(devices) == 1 else 'are'} {len(devices)} of kind "
            f"{devices[0].platform}: give smaller axes{hint}."
        )
    grid = np.array(devices[: sizes.devices]).reshape(*sizes, 1)
    return Mesh(grid, AXES)


def imagined(sizes: Sizes | str) -> AbstractMesh:
    """Makes a mesh of devices that need not be there: for shapes and plans.

    Raises:
        ValueError: as :func:`parse`.
    """
    sizes = parse(sizes) if isinstance(sizes, str) else sizes
    return AbstractMesh((*sizes, 1), AXES)


def fitted(mesh: Any, num_kv_heads: int) -> Any:
    """Returns the mesh with KV heads shared out: those that devices copy along COPIES.

    Raises:
        ValueError: if the axes are not :data:`AXES`, or neither the heads divide the
            devices of `tensor` nor these the heads.
    """
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(
            f"a mesh has axes {mesh.axis_names}, not {AXES}: make it by "
            "kvjax.parallel.make, as make('data=2,tensor=4')."
        )
    parts = ways(mesh)
    if parts % num_kv_heads and num_kv_heads % parts:
        raise ValueError(
            f"tensor={parts} does not share out {num_kv_heads} KV heads: give a "
            "divisor of them, or a multiple."
        )
    heads = min(parts, num_kv_heads)
    shape = mesh.shape[ROWS], heads, parts // heads
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, AXES)
    return Mesh(mesh.devices.reshape(shape), AXES)


def of(decoder: Any) -> AnyMesh | None:
    """Returns the mesh that a decoder runs over; None is one device."""
    return getattr(decoder, "mesh", None)


def everywhere(mesh: AnyMesh | None, tree: Any) -> Any:
    """Constrains arrays of a program to be whole on every device of a mesh.

    Small ones, so that what a program returns lies as what it was given: the next call
    then runs the same program.
    """
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def ways(mesh: AnyMesh) -> int:
    """Returns the parts that weights are in."""
    return math.prod(mesh.shape[axis] for axis in SPLIT)


def whole(mesh: AnyMesh | None, array: Any) -> Any:
    """Puts an array on every device of a mesh; where there is none, leaves it."""
    if mesh is None:
        return array
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def beside(array: Any, other: Any) -> Any:
    """Puts `other` whole where `array` is, if that is on a mesh."""
    sharding = getattr(array, "sharding", None)
    return whole(getattr(sharding, "mesh", None), other)


def parts_of(mesh: AnyMesh, spec: CacheSpec) -> tuple[int, int]:
    """Returns the parts of a layer's rows and of its KV heads.

    Rows that `data` does not divide, as those of a last batch, are on all its devices.

    Raises:
        ValueError: if `tensor` does not divide the KV heads.
    """
    rows, heads = mesh.shape[ROWS], mesh.shape[HEADS]
    if spec.num_kv_heads % heads:
        raise ValueError(
            f"tensor={heads} does not divide {spec.num_kv_heads} KV heads: make the "
            "mesh fit the model, as kvjax.load(..., mesh=) does."
        )
    return (1 if spec.batch % rows else rows), heads
