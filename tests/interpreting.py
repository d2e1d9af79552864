"""Triton's interpreter as tests run it; see `pallas_kernels/test_triton.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton.runtime import interpreter

from pallas_kernels.shared import triton_call, triton_lists


@pytest.fixture(autouse=True)
def traced_anew():
    """With the sizes of blocks that a test has set."""
    jax.clear_caches()


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """Most of its time the interpreter would look again for what it has patched."""
    patch, seen = interpreter._patch_lang, set()

    def patch_once(function):
        if id(function.__globals__) in seen:
            return interpreter._LangPatchScope()
        seen.add(id(function.__globals__))
        return patch(function)

    class Executor(interpreter.GridExecutor):
        def __call__(self, *args, **kwargs):
            seen.clear()  # the last one has taken its patches back
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "GridExecutor", Executor)


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Nothing is written behind the end of an output."""
    poisoned, guards = triton_call._poisoned, []

    def with_guard(shape):
        found = poisoned(jax.ShapeDtypeStruct((2, *shape.shape), shape.dtype))
        guards.append((found[1], found[1].copy()))
        return found[0]

    monkeypatch.setattr(triton_call, "_poisoned", with_guard)
    yield
    for guard, before in guards:
        np.testing.assert_array_equal(guard, before)


@pytest.fixture
def splits(monkeypatch, request):
    """Lists in as many parts, each in blocks of 32 tokens of 16 dimensions."""
    monkeypatch.setattr(triton_lists, "BLOCK_BYTES", 2 << 10)
    monkeypatch.setattr(triton_call, "num_cores", lambda: 2 * request.param)


@pytest.fixture
def eager(monkeypatch):
    """Kernels are called on NumPy's arrays as they are: no byte of them is copied."""

    def call(kernel, *arrays, out_shape, grid, interpret, num_warps, **static):
        found = triton_call._interpret(kernel, out_shape, grid, static, *arrays)
        return jax.tree.map(jnp.asarray, found)

    monkeypatch.setattr(triton_call, "call", call)
