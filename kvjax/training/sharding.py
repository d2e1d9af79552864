"""Meshes for training: batches split over ("data", "fsdp"), weights over "fsdp"."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.training import config as settings

AXES = ("data", "fsdp")


def make_mesh(mesh: settings.Mesh) -> jax.sharding.Mesh:
    """The first `mesh.size` devices as a `jax.sharding.Mesh` with axes `AXES`.

    Raises:
        ValueError: if there are fewer devices, or several processes.
    """
    devices = jax.devices()
    if mesh.size > len(devices):
        raise ValueError(
            f"mesh.data={mesh.data} * mesh.fsdp={mesh.fsdp} needs {mesh.size} devices, "
            f"and there are {len(devices)} of kind {devices[0].platform}."
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes: training runs in one, over all devices "
            "that it sees."
        )
    grid = np.array(devices[: mesh.size]).reshape(mesh.data, mesh.fsdp)
    return jax.sharding.Mesh(grid, AXES)


def of_state(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A sharding per leaf: its largest axis that "fsdp" divides, split over it.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
    """
    parts = mesh.shape["fsdp"]

    def of_leaf(leaf):
        axes: list[str | None] = [None] * len(leaf.shape)
        fitting = [i for i, size in enumerate(leaf.shape) if size % parts == 0]
        if fitting and parts > 1:
            axes[max(fitting, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(of_leaf, tree)


def of_batch(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """A batch of the host, its rows over the devices."""
    return jax.device_put(batch, of_batch(mesh))
