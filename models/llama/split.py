"""The weights of the family over a mesh, and its hidden states.

Matrices of heads and of the MLP are split over the devices of `tensor`: those into it
by their outputs, those out of it by their inputs, so that a layer is two sums over the
devices. The rows of hidden states are split over `data`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kvjax import parallel
from kvjax.parallel.mesh import COPIES, HEADS, ROWS, SPLIT
from models.llama.config import LlamaConfig

_INTO, _OUT = ("q", "k", "v", "gate", "up"), ("o", "down")


def rows(mesh: parallel.AnyMesh | None, x: jax.Array) -> jax.Array:
    """Has hidden states split by their rows, if `data` divides them, and whole else."""
    if mesh is None:
        return x
    axis = None if x.shape[0] % mesh.shape[ROWS] else ROWS
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axis)))


def logits(mesh: parallel.AnyMesh | None, x: jax.Array) -> jax.Array:
    """Has logits whole on every device, which come from parts of the vocabulary."""
    if mesh is None:
        return x
    parts = parallel.ways(mesh)
    if x.shape[-1] % parts == 0:
        # First where their weights are: else these come to them.
        split = NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), SPLIT))
        x = jax.lax.with_sharding_constraint(x, split)
    return parallel.everywhere(mesh, x)


def exchanges(
    mesh: parallel.AnyMesh, config: LlamaConfig, batch: int
) -> tuple[parallel.Exchange, ...]:
    """Returns what the devices tell each other in a step of one token a row.

    Each half of a layer ends in a sum of hidden states, `(B, E)`. The embedding is a
    sum too and the logits are gathered, or the other way round where it is split by the
    elements of each token. Where KV heads are copied, queries are gathered.
    All copies of a token go through the layers, and one is turned into logits.
    """
    parts, rows = parallel.ways(mesh), mesh.shape[ROWS]
    own = batch if batch % rows else batch // rows
    fed = own * config.copies
    dtype = jnp.dtype(config.dtype).itemsize
    hidden = config.width * dtype
    found = []
    if own < batch:
        found.append(parallel.Exchange("all-gather", batch * hidden, rows))
    if parts == 1:
        return tuple(found)

    def add(kind: parallel.Kind, size: int, times: int = 1) -> None:
        found.extend([parallel.Exchange(kind, size, parts)] * times)

    shape = config.vocab_size, config.width
    split = _axis(("embedding",), shape, parts)
    if split is not None:
        add("all-gather" if split else "all-reduce", fed * hidden)
    add("all-reduce", fed * hidden, 2 * config.num_layers)
    if not config.tied_embeddings:
        split = 0 if config.vocab_size % parts == 0 else None
    if split is not None:
        add("all-reduce" if split else "all-gather", 4 * batch * config.vocab_size)
    if (copies := mesh.shape[COPIES]) > 1:
        heads = config.num_q_heads // mesh.shape[HEADS] * config.head_dim
        queries = parallel.Exchange("all-gather", fed * heads * dtype, copies)
        found += [queries] * config.num_layers
    return tuple(found)


def shardings(mesh: parallel.AnyMesh, shapes: Any) -> Any:
    """Returns the place of every parameter, in the structure of `shapes`.

    Raises:
        ValueError: if the devices do not divide a matrix.
    """

    def of(path: tuple[Any, ...], shape: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*_axes(mesh, path, shape.shape)))

    return jax.tree_util.tree_map_with_path(of, shapes)


def of_device(mesh: parallel.AnyMesh, shapes: Any) -> Any:
    """Returns the shapes of what each device has of parameters, packed ones too."""

    def of(path: tuple[Any, ...], shape: Any) -> jax.ShapeDtypeStruct:
        axes = _axes(mesh, path, shape.shape)
        sizes = [
            size // math.prod(mesh.shape[name] for name in names or ())
            for size, names in zip(shape.shape, axes, strict=True)
        ]
        return jax.ShapeDtypeStruct(tuple(sizes), shape.dtype)

    return jax.tree_util.tree_map_with_path(of, shapes)


def _axes(
    mesh: parallel.AnyMesh, path: tuple[Any, ...], shape: tuple[int, ...]
) -> list[Any]:
    """Returns the mesh's axes along each axis of a parameter, or of a packed one."""
    names = tuple(key.key for key in path if hasattr(key, "key"))
    axes: list[Any] = [None] * len(shape)
    # A KV head is whole on each device that copies it.
    over = SPLIT[:1] if {"k", "v"} & {*names} else SPLIT
    axis = _axis(names, shape, math.prod(mesh.shape[name] for name in over))
    if axis is not None:
        axes[axis] = over
    return axes


def _axis(names: tuple[Any, ...], shape: tuple[int, ...], parts: int) -> int | None:
    """Returns the axis of a parameter that is split."""
    if parts == 1:
        return None
    if names[0] == "embedding":
        # By its tokens, or if these do not go, by the elements of each.
        return next((a for a, size in enumerate(shape) if size % parts == 0), None)
    if names[0] == "output":
        return len(shape) - 1 if shape[-1] % parts == 0 else None
    module, kind = names[-2:]
    axis = None
    if module in _INTO:
        axis = len(shape) - 1  # of a kernel, or of a bias
    elif module in _OUT and kind == "kernel":
        axis = 0
    if axis is not None and shape[axis] % parts:
        raise ValueError(
            f"tensor={parts} does not divide the {shape[axis]} numbers of "
            f"{'.'.join(map(str, names))}: give fewer devices."
        )
    return axis
