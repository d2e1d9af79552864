"""One layer with the heads of an 8B model, compiled for a TPU, in two memories."""

from typing import Any

import jax
import jax.numpy as jnp
from aot import tpu
from jax.sharding import SingleDeviceSharding

from kvjax.interface import CacheSpec
from kvjax.rope import Rope
from kvjax.stores import buffers

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def spec(context):
    return CacheSpec(
        *(1, HEADS, KV_HEADS, HEAD_DIM, context, "bfloat16", Rope(HEAD_DIM), 1024),
        layer=7,
    )


def memory_of(run, made, tokens):
    """Returns the compiler's counts of a call, whose state is donated.

    Args:
        run: `run(state, q, k, v) -> (state, out)`.
        made: makes the state: where its arrays lie is where they are when it is given.
        tokens: of the queries, keys and values.
    """
    sharding, hosted = SingleDeviceSharding(tpu.topology("v5e").devices[0]), []

    def state():
        found = made()
        hosted.extend(map(buffers.in_host, jax.tree.leaves(found)))
        return found

    def placed(leaf, is_hosted=False):
        kind = "pinned_host" if is_hosted else "device"
        where = sharding.with_memory_kind(kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    leaves, structure = jax.tree.flatten(jax.eval_shape(state))

    def call(leaves, *inputs):
        # Shapes that are given for compilation do not say it.
        space = jax.memory.Space.Host
        leaves = [
            jax.device_put(x, space) if is_hosted else x
            for x, is_hosted in zip(leaves, hosted, strict=True)
        ]
        after, out = run(jax.tree.unflatten(structure, leaves), *inputs)
        return jax.tree.leaves(after), out

    shapes = ((1, h, tokens, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    inputs = [placed(jax.ShapeDtypeStruct(x, "bfloat16")) for x in shapes]
    given = list(map(placed, leaves, hosted))
    compiled = jax.jit(call, donate_argnums=0).lower(given, *inputs).compile()
    counts: Any = compiled.memory_analysis()
    return counts


def memory_of_step(method, context):
    """Returns the counts of a decode step; nobody looks at what it attended to."""

    def step(state, q, k, v):
        state, out, _ = method.inspect_step(method.append(state, k, v), q)
        return state, out

    made = spec(context)
    return memory_of(step, lambda: method.finish(method.init(made)), 1)


def memory_of_chunk(method, context, tokens):
    """Returns the counts of a chunk of a prompt."""

    def read(state, q, k, v):
        return method.prefill(state, q, k, v, jnp.full((1,), tokens, jnp.int32))

    return memory_of(read, lambda: method.init(spec(context)), tokens)
