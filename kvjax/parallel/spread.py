"""A method over a mesh: every device runs it on its own rows and heads of a layer.

The functions of a method go into `shard_map` as they are, with a spec of the device's
share: a choice that is made for each head takes no word between devices, and kernels
run as on one. What a method does over all heads it does by
:mod:`kvjax.attention.heads`. The state is born in parts, and stays in them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kvjax import naming
from kvjax.interface import CacheSpec, Diagnostics, Hooks, Method, Recipe, Share, State
from kvjax.parallel import axes as state_axes
from kvjax.parallel.axes import Axes
from kvjax.parallel.mesh import HEADS, ROWS, AnyMesh, parts_of


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of a state's arrays on a mesh."""

    mesh: AnyMesh
    share: Share  # that a device has
    axes: Axes

    @property
    def rows(self) -> P:
        """The partition of an array of rows."""
        return P(ROWS if self.share.rows > 1 else None)

    @property
    def heads(self) -> P:
        """The partition of an array of rows, then heads."""
        return P(*self.rows, HEADS if self.share.heads > 1 else None)

    def of(self, state: State) -> Any:
        """The partitions of a state, in its structure."""
        return jax.tree.unflatten(jax.tree.structure(state), self.axes)

    def run(self, function: Callable[..., Any], given: Any, returned: Any) -> Any:
        """The function as each device runs it on its share."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=given,
            out_specs=returned,
            check_vma=False,  # kernels do not say how their results vary
        )


class Spread(NamedTuple):
    """A state over a mesh: arrays of all rows and heads, each in parts."""

    layout: Layout
    state: State  # its specs are those of a device's share


def inside(states: Any) -> Any:
    """Returns states as their method made them: arrays of all rows and heads."""

    def is_spread(node: Any) -> bool:
        return isinstance(node, Spread)

    def taken(node: Any) -> Any:
        return node.state if is_spread(node) else node

    return jax.tree.map(taken, states, is_leaf=is_spread)


def in_parts(states: Any) -> Any:
    """Constrains states of a program that are over a mesh to lie where they belong."""

    def is_spread(node: Any) -> bool:
        return isinstance(node, Spread)

    def placed(node: Any) -> Any:
        if not is_spread(node):
            return node
        leaves, structure = jax.tree.flatten(node.state)
        leaves = [
            lax.with_sharding_constraint(leaf, NamedSharding(node.layout.mesh, axes))
            for leaf, axes in zip(leaves, node.layout.axes, strict=True)
        ]
        return node._replace(state=jax.tree.unflatten(structure, leaves))

    return jax.tree.map(placed, states, is_leaf=is_spread)


@functools.cache
def over(method: Method, mesh: AnyMesh | None) -> Method:
    """Returns a method as a mesh runs it; its state is a :class:`Spread`.

    Equal arguments give one object, so that compiled code is found again.
    """
    if mesh is None:
        return method
    bind = functools.partial(functools.partial, mesh=mesh, method=method)
    again, hooks = method.reread, method.hooks
    if again is not None:
        again = again._replace(prefill=functools.partial(_prefill, again.prefill))
    spread = method._replace(
        init=bind(_init),
        prefill=functools.partial(_prefill, method.prefill),
        finish=functools.partial(_finish, method.finish),
        append=functools.partial(_append, method.append),
        inspect_step=functools.partial(_inspect_step, method.inspect_step),
        select=method.select and functools.partial(_listed, method.select),
        importance=None,
        rewind=method.rewind and functools.partial(_rewind, method.rewind),
        reread=again,
        hooks=_hooks(hooks),
    )
    made_of = naming.RECIPES.get(method)
    naming.RECIPES[spread] = made_of or Recipe(method.spec_text(), {}, _not_remade)
    return spread


def of_state(method: Method, state: State) -> Method:
    """Returns the method as it runs on a state: over its mesh, if it has one."""
    return over(method, state.layout.mesh) if isinstance(state, Spread) else method


def _not_remade(**options: Any) -> Method:
    raise ValueError(f"a method that no spec made is not made with {options}.")


def _hooks(hooks: Hooks) -> Hooks:
    asked, after = hooks.asked, hooks.prefill_after
    if asked is not None:
        asked = asked._replace(
            probe=functools.partial(_prefill, asked.probe),
            close=functools.partial(_finish, asked.close),
            settle=functools.partial(_finish, asked.settle),
        )
    return hooks._replace(
        asked=asked,
        settle=hooks.settle and functools.partial(_settle, hooks.settle),
        seal=hooks.seal and functools.partial(_finish, hooks.seal),
        prefill_after=after and functools.partial(_prefill_after, after),
    )


# --- shares


@functools.cache
def share_of(method: Method, mesh: AnyMesh, spec: CacheSpec) -> CacheSpec:
    """Returns the spec of a device's share of a layer."""
    rows, heads = parts_of(mesh, spec)
    if marked(method, spec, "ONE_DEVICE"):
        raise ValueError(
            f"{method.spec_text()} has {marked(method, spec, 'ONE_DEVICE')}, and a "
            "mesh has several devices: leave either out."
        )
    if marked(method, spec, "HEADS_TOGETHER"):
        heads = 1
    return dataclasses.replace(
        spec,
        batch=spec.batch // rows,
        num_q_heads=spec.num_q_heads // heads,
        num_kv_heads=spec.num_kv_heads // heads,
        share=Share(HEADS, heads, rows),
    )


@functools.cache
def marked(method: Method, spec: CacheSpec, mark: str) -> Any:
    """Returns what the class of a part of the state says of it, or None.

    HEADS_TOGETHER: heads share memory, so that every device has all of them, and what
    goes on elsewhere in a layer is split all the same. ONE_DEVICE: what it is.
    """

    def said(node: Any) -> Any:
        return getattr(type(node), mark, None)

    def states() -> tuple[State, State]:
        state = method.init(spec)
        return state, method.finish(state)

    nodes = jax.tree.leaves(jax.eval_shape(states), is_leaf=lambda x: bool(said(x)))
    return next(filter(None, map(said, nodes)), None)


# --- the functions of a method


def _init(
    spec: CacheSpec, weights: Any = None, *, mesh: AnyMesh, method: Method
) -> Spread:
    if weights is not None:
        raise ValueError("weights of a method are not split over a mesh: name a file.")
    own = share_of(method, mesh, spec)
    share = own.share or Share(HEADS)
    layout = Layout(mesh, share, state_axes.of_init(mesh, method.init, own))
    shapes = state_axes.shapes_of(mesh, lambda: method.init(own))
    run = layout.run(lambda: method.init(own), (), layout.of(shapes))
    return Spread(layout, run())


def _prefill(
    function: Callable[..., Any],
    state: Spread,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Spread, Float[Array, "B Hq T D"]]:
    layout, inner = state
    own, heads = layout.of(inner), layout.heads
    given = own, heads, heads, heads, layout.rows
    inner, out = layout.run(function, given, (own, heads))(inner, q, k, v, lengths)
    return Spread(layout, inner), out


def _prefill_after(
    function: Callable[..., Any],
    state: Spread,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
    below: Any,
) -> tuple[Spread, Float[Array, "B Hq T D"], Any]:
    """Hands up arrays of rows, then heads."""
    layout, inner = state
    own, heads = layout.of(inner), layout.heads
    given = own, heads, heads, heads, layout.rows, heads
    run = layout.run(function, given, (own, heads, heads))
    inner, out, above = run(inner, q, k, v, lengths, below)
    return Spread(layout, inner), out, above


def _finish(function: Callable[[State], State], state: Spread) -> Spread:
    """Runs `finish`, or another function that ends something, of a state."""
    layout, inner = state
    mine = local(layout, inner)
    after = state_axes.of_result(layout.mesh, function, layout.share, mine, layout.axes)
    ended = dataclasses.replace(layout, axes=after)
    shapes = state_axes.shapes_of(layout.mesh, function, mine)
    run = layout.run(function, (layout.of(inner),), ended.of(shapes))
    return Spread(ended, run(inner))


def local(layout: Layout, state: State) -> State:
    """Returns the shapes of a device's part of a state."""
    parts = {ROWS: layout.share.rows, HEADS: layout.share.heads}
    leaves, structure = jax.tree.flatten(state)
    own = []
    for leaf, named in zip(leaves, layout.axes, strict=True):
        sizes = zip(leaf.shape, named, strict=True)
        shape = tuple(size // parts.get(name, 1) for size, name in sizes)
        own.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
    return jax.tree.unflatten(structure, own)


def _settle(
    function: Callable[..., tuple[State, ...]], states: tuple[Spread, ...]
) -> tuple[Spread, ...]:
    layouts, inner = zip(*states, strict=True)
    own = tuple(layout.of(x) for layout, x in zip(layouts, inner, strict=True))
    settled = layouts[0].run(function, (own,), own)(tuple(inner))
    return tuple(map(Spread, layouts, settled))


def _append(
    function: Callable[..., State],
    state: Spread,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
) -> Spread:
    layout, inner = state
    own, heads = layout.of(inner), layout.heads
    return Spread(layout, layout.run(function, (own, heads, heads), own)(inner, k, v))


def _inspect_step(
    function: Callable[..., Any], state: Spread, q: Float[Array, "B Hq T D"]
) -> tuple[Spread, Float[Array, "B Hq T D"], Diagnostics]:
    layout, inner = state
    own, heads, rows = layout.of(inner), layout.heads, layout.rows

    def step(state: State, q: Float[Array, "B Hq T D"]) -> Any:
        state, out, found = function(state, q)
        if layout.share.heads > 1:
            # Of all heads; where nobody asks, no word goes between devices.
            read = found.refreshed.astype(jnp.int32)
            found = found._replace(refreshed=lax.pmin(read, HEADS) > 0)
        return state, out, found

    places: Any = heads, heads, rows, heads
    run = layout.run(step, (own, heads), (own, heads, Diagnostics(*places)))
    inner, out, found = run(inner, q)
    return Spread(layout, inner), out, found


def _listed(
    function: Callable[..., Any], state: Spread, q: Float[Array, "B Hq 1 D"]
) -> Int[Array, "B H K"]:
    layout, inner = state
    given = layout.of(inner), layout.heads
    return layout.run(function, given, layout.heads)(inner, q)


def _rewind(
    function: Callable[..., State], state: Spread, count: Int[Array, "B"], most: int
) -> Spread:
    layout, inner = state
    own = layout.of(inner)

    def back(state: State, count: Int[Array, "B"]) -> State:
        return function(state, count, most)

    return Spread(layout, layout.run(back, (own, layout.rows), own)(inner, count))
