"""The exchanges of devices in a decode step: counted, before anything is run."""

import math
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.interface import CacheSpec, Method
from kvjax.parallel import axes
from kvjax.parallel.mesh import HEADS, AnyMesh
from kvjax.parallel.spread import share_of

_EXCHANGE = re.compile(
    r"= (\(?[a-z][^=]*?) (all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_WIDTHS = {"pred": 1}

Kind = Literal["all-reduce", "all-gather"]

_KINDS: dict[str, Kind] = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
}


class Exchange(NamedTuple):
    """One exchange of a step: an array that every device has afterwards."""

    kind: Kind
    bytes: int  # of the array, on one device
    devices: int  # that take part in it

    @property
    def sent(self) -> int:
        """Bytes that a device sends, and receives as many: along a ring of them."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return -(-rounds * self.bytes * (self.devices - 1) // self.devices)


def exchanged(method: Method, mesh: AnyMesh, spec: CacheSpec) -> tuple[Exchange, ...]:
    """Returns what a method exchanges in a step of a layer; mostly nothing.

    Of branches of a program those that exchange most, and of a loop one turn.
    """
    own = share_of(method, mesh, spec)
    if own.share is None or own.share.heads == 1:
        return ()
    rows = method.rows if own.copies is None else own.copies.count

    def heads(count: int) -> jax.Array:
        return jnp.zeros((own.batch, count, rows, own.head_dim), own.dtype)

    def step() -> Any:
        kv, state = heads(own.num_kv_heads), method.finish(method.init(own))
        return state, heads(own.num_q_heads), kv

    def one(state: Any, q: jax.Array, kv: jax.Array) -> Any:
        return method.decode_step(method.append(state, kv, kv), q)

    every = jax.sharding.PartitionSpec()
    run = jax.shard_map(
        one, mesh=mesh, in_specs=every, out_specs=every, check_vma=False
    )
    traced = jax.make_jaxpr(run)(*axes.shapes_of(mesh, step))
    return tuple(_found(traced.jaxpr, mesh.shape[HEADS]))


def compiled(text: str) -> list[tuple[str, int]]:
    """Returns the kind and the bytes of every exchange in a compiled program's text.

    Bytes are those of the array that each device has afterwards.
    """
    return [
        (kind, sum(_bytes(*shape) for shape in _SHAPE.findall(shapes)))
        for shapes, kind in _EXCHANGE.findall(text)
    ]


def _bytes(dtype: str, sizes: str) -> int:
    width = _WIDTHS.get(dtype) or int(re.sub(r"\D", "", dtype)) // 8
    return width * math.prod(int(size) for size in sizes.split(",") if size)


def _found(jaxpr: Any, devices: int) -> Iterable[Exchange]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removesuffix("_invariant").rstrip("2")
        if name in _KINDS:
            for out in equation.outvars:
                size = out.aval.size * out.aval.dtype.itemsize
                yield Exchange(_KINDS[name], size, devices)
            continue
        inner = [
            [*_found(getattr(sub, "jaxpr", sub), devices)]
            for value in equation.params.values()
            for sub in (value if isinstance(value, tuple | list) else [value])
            if hasattr(getattr(sub, "jaxpr", sub), "eqns")
        ]
        if equation.primitive.name == "cond":
            inner = [max(inner, key=lambda some: sum(x.sent for x in some))]
        for some in inner:
            yield from some
