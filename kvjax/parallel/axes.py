"""The axes of a state's arrays that are rows, or heads: found by tracing, not declared.

A function is traced with one row more than once, and with as many heads: the axis whose
size doubles is the one. Whatever a method keeps, it needs no line about it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kvjax.cache_spec import CacheSpec, Share, with_specs
from kvjax.parallel.mesh import HEADS, ROWS, AnyMesh

Axes = tuple[PartitionSpec, ...]  # of each leaf, in order


def multiplied(spec: CacheSpec, rows: int = 1, heads: int = 1) -> CacheSpec:
    """Returns the spec with so many times the rows and the heads."""
    return dataclasses.replace(
        spec,
        batch=spec.batch * rows,
        num_q_heads=spec.num_q_heads * heads,
        num_kv_heads=spec.num_kv_heads * heads,
    )


def shapes_of(mesh: AnyMesh, function: Callable[..., Any], *args: Any) -> Any:
    """Returns the shapes of what a device computes, of arguments that are its own."""
    every = PartitionSpec()
    run = jax.shard_map(
        function, mesh=mesh, in_specs=every, out_specs=every, check_vma=False
    )
    return jax.eval_shape(run, *args)


def of_init(mesh: AnyMesh, init: Callable[[CacheSpec], Any], spec: CacheSpec) -> Axes:
    """Returns the axes of the state that `init` makes of a device's spec."""

    def shapes(rows: int, heads: int) -> Any:
        return shapes_of(mesh, lambda: init(multiplied(spec, rows, heads)))

    return _compared(spec.share or Share(HEADS), shapes)


def of_result(
    mesh: AnyMesh, function: Callable[[Any], Any], share: Share, state: Any, axes: Axes
) -> Axes:
    """Returns the axes of what a function makes of a state.

    Args:
        share: that a device has.
        state: of a device, shapes alone.
        axes: of its leaves.
    """

    def shapes(rows: int, heads: int) -> Any:
        return shapes_of(mesh, function, resized(state, axes, rows, heads))

    return _compared(share, shapes)


def resized(state: Any, axes: Axes, rows: int, heads: int) -> Any:
    """Returns shapes of a state with so many times the rows and the heads."""
    times = {ROWS: rows, HEADS: heads}
    leaves, structure = jax.tree.flatten(
        with_specs(state, lambda spec: multiplied(spec, rows, heads))
    )
    scaled = []
    for leaf, named in zip(leaves, axes, strict=True):
        shape = list(leaf.shape)
        for axis, name in enumerate(named):
            shape[axis] *= times.get(name, 1)
        scaled.append(jax.ShapeDtypeStruct(tuple(shape), leaf.dtype))
    return jax.tree.unflatten(structure, scaled)


def _compared(share: Share, shapes: Callable[[int, int], Any]) -> Axes:
    """Compares what is traced once, with twice the rows, and with twice the heads."""
    one = jax.tree.leaves_with_path(shapes(1, 1))
    found: list[list[str | None]] = [[None] * len(leaf.shape) for _, leaf in one]
    for name, sizes, parts in (
        (ROWS, (2, 1), share.rows),
        (HEADS, (1, 2), share.heads),
    ):
        if parts == 1:
            continue
        other = jax.tree.leaves_with_path(shapes(*sizes))
        for (path, leaf), (_, larger), axes in zip(one, other, found, strict=True):
            pairs = zip(leaf.shape, larger.shape, strict=True)
            moved = [axis for axis, (a, b) in enumerate(pairs) if a != b]
            if not moved:
                continue
            (axis, *others) = moved
            if others or larger.shape[axis] != 2 * leaf.shape[axis]:
                what = "rows" if name == ROWS else "heads"
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)} is {leaf.shape}, and with "
                    f"twice the {what} {larger.shape}: no axis of it is the {what}, so "
                    "devices cannot share it out. If heads share memory, let its class "
                    "say HEADS_TOGETHER = True."
                )
            axes[axis] = name
    return tuple(PartitionSpec(*axes) for axes in found)
