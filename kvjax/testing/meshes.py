"""The promise of every method that devices may share its rows and its heads."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kvjax import parallel
from kvjax.interface import Method
from kvjax.parallel.mesh import HEADS, ROWS
from kvjax.parallel.spread import marked
from kvjax.stores import buffers
from kvjax.testing import streams
from kvjax.testing.streams import NothingToCheckError, expect
from kvjax.testing.subject import PROMPTS, STEPS, Subject


def devices_share_rows_and_heads(subject: Subject) -> None:
    """Each of a mesh decodes what it has, and tells others what is counted before.

    The state is born in parts and stays in them, and its memory is used again. A choice
    over all heads is made by :mod:`kvjax.attention.heads`.
    """
    mesh, spec = _mesh(), subject.spec
    if marked(subject.method, spec, "ONE_DEVICE"):
        raise NothingToCheckError
    method, before = parallel.over(subject.method, mesh), subject.baseline
    state = _in_parts(jax.jit(lambda: method.init(spec))())
    inputs = streams.chunk(subject.stream, [0] * len(PROMPTS), PROMPTS, size=21)
    state, out = jax.jit(streams.one_layer(method))(state, *inputs)
    for b, length in enumerate(PROMPTS):
        rows = np.asarray(out)[b, :, :length]
        streams.assert_rows_close(rows, before.prompt_out[b], what=f"prompt of row {b}")
    again = method.reread and jax.jit(method.reread.prefill)
    state = streams.reread(method, _in_parts(state), subject.stream, prefill=again)
    state = _in_parts(jax.jit(method.finish)(state))
    steps = subject.step_inputs()
    step = jax.jit(functools.partial(streams.step, method), donate_argnums=0)
    compiled: Any = step.lower(state, [x[0] for x in steps]).compile()
    _tells_what_is_counted(subject.method, compiled.as_text(), mesh, spec)
    held = buffers.num_bytes(parallel.local(*state))
    aliased = compiled.memory_analysis().alias_size_in_bytes
    expect(aliased == held, f"of {held} bytes on a device {aliased} are reused.")
    for i in range(STEPS):
        state, (out, found) = compiled(state, [x[i] for x in steps])
        newest, what = np.asarray(out)[:, :, -1], f"step {i} over {_named(mesh)}"
        streams.assert_rows_close(newest, before.out[i], what=what)
        expect(
            np.array_equal(found.attended, before.diagnostics.attended[i]),
            f"{what} attended to other tokens: what is one for all heads must be made "
            "by kvjax.attention.heads.",
        )
    _in_parts(state)


def _mesh() -> Mesh:
    devices = jax.devices("cpu")
    if len(devices) < 2:
        # Before JAX is used, jax.config.update("jax_num_cpu_devices", 4) makes four.
        raise NothingToCheckError
    rows = 2 if len(devices) > 3 else 1
    return parallel.make(parallel.Sizes(rows, 2), devices)


def _named(mesh: Mesh) -> str:
    return f"data={mesh.shape[ROWS]},tensor={mesh.shape[HEADS]}"


def _in_parts(state: parallel.Spread) -> parallel.Spread:
    """Returns the state, if every device has its part and no more."""
    leaves = jax.tree.leaves_with_path(state.state)
    for (path, leaf), axes in zip(leaves, state.layout.axes, strict=True):
        place = NamedSharding(state.layout.mesh, axes)
        expect(
            leaf.sharding.is_equivalent_to(place, leaf.ndim),
            f"state{jax.tree_util.keystr(path)} is {leaf.sharding}, not {place}.",
        )
    return state


def _tells_what_is_counted(method: Method, text: str, mesh: Mesh, spec) -> None:
    found = sorted(parallel.compiled(text))
    counted = parallel.exchanged(method, mesh, spec)
    expected = sorted((one.kind, one.bytes) for one in counted)
    # `Diagnostics.refreshed`, unless it is known beforehand.
    own = parallel.share_of(method, mesh, spec)
    asked = [("all-reduce", 4 * own.batch)]
    expect(
        found in (expected, sorted(expected + asked)),
        f"a step over {_named(mesh)} tells {found}, and {expected} is counted.",
    )
