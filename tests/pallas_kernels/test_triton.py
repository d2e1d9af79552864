"""Triton kernels: numerics in Triton's interpreter, and who gets to run them."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.entmax import solve
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.page_scores import page_bounds, page_moments
from pallas_kernels.topk import top_k

if importlib.util.find_spec("jax_triton") is None:
    pytest.skip(
        "Triton kernels need jax-triton: pip install 'kvjax[triton]'",
        allow_module_level=True,
    )

from pallas_kernels.shared import cases, triton_call

ALONE = "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"
INTERPRETED = [
    pathlib.Path(__file__).with_name(f"triton_{name}.py")
    for name in ("interpreted", "quantized")
]


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _pages(head_dim=64, dtype=jnp.bfloat16, rows=1):
    return (
        _array(1, 4, rows, head_dim, dtype=dtype),
        _array(1, 2, 9, 16, 2 * head_dim, dtype=dtype),
        _array(1, 2, 4, dtype=jnp.int32),
        _array(1, rows, dtype=jnp.int32),
    )


def _stored(rows=1, slots=144):
    """Keys and values in 4 bits, and a query."""
    kept = cases.stored(1, 2, slots, 64, bits=(4,))
    q = _array(1, 4, rows, 64)
    return q, kept, kept, _array(1, rows, dtype=jnp.int32)


def _stored_pages(**sizes):
    q, pages, *rest = _pages(**sizes)
    return q, cases.stored(*pages.shape, bits=(8, 4), dtype=pages.dtype), *rest


def _statistics(heads=4, head_dim=64, num_pages=9, dtype=jnp.bfloat16):
    of_pages = _array(1, 2, num_pages, head_dim)
    return _array(1, heads, head_dim, dtype=dtype), of_pages, of_pages


def test_in_the_interpreter():
    """In a process of its own: what kernels are is decided when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *INTERPRETED, *ALONE],
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        cwd=INTERPRETED[0].parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture
def on_a100():
    """As if for an A100 that is not there."""
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA A100-SXM4-80GB", num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.usefixtures("on_a100")
def test_an_a100_takes_them_unasked():
    scores = _array(2, 300, dtype=jnp.float32)
    pages = functools.partial(page_attention, sm_scale=0.1)
    # Under entmax: the keys, the threshold, the values.
    for function, arguments, kernels in (
        (pages, _pages(), 1),
        (functools.partial(page_entmax, sm_scale=0.1, alpha=1.5), _pages(), 3),
        (pages, _stored_pages(), 1),
        (functools.partial(page_entmax, sm_scale=0.1, alpha=1.5), _stored_pages(), 3),
        (functools.partial(decode_attention, sm_scale=0.1), _stored(), 1),
        (functools.partial(page_bounds, group_reduce="mean"), _statistics(), 1),
        (page_moments, _statistics(), 1),
        (functools.partial(solve, alpha=1.5), (scores,), 1),
        (functools.partial(top_k, k=5), (scores,), 1),
    ):
        traced = jax.jit(function).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("triton_kernel_call") == kernels


def _named(function, **static):
    return functools.partial(function, implementation="triton", **static)


@pytest.mark.usefixtures("on_a100")
@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (
            _named(page_entmax, sm_scale=1.0, alpha=1.5),
            _pages(rows=1 << 19),
            r"scores of 536,870,912 bytes must be at most 268,435,456",
        ),
        (_named(page_bounds), _statistics(130), "130 query heads must be at most 64"),
        (_named(page_bounds), _statistics(head_dim=48), "D=48 must be a power of"),
        (_named(page_moments), _statistics(num_pages=0), r"\(1, 2, 0, 64\) must be"),
        (_named(page_moments), _statistics(dtype=jnp.float32), "bfloat16, float32"),
        (_named(page_attention, sm_scale=1.0), _pages(48), "D=48 must be a power of"),
        (
            _named(page_attention, sm_scale=1.0),
            _pages(dtype=jnp.float8_e5m2),
            "dtypes f",
        ),
        (
            _named(page_attention, sm_scale=1.0),
            _stored_pages(head_dim=96),
            "D=96 must be",
        ),
        (
            _named(decode_attention, sm_scale=1.0),
            (
                _array(1, 4, 1, 64),
                *[_array(1, 2, 9, 64)] * 2,
                _array(1, 1, dtype="int32"),
            ),
            "its keys and values must be quantised",
        ),
        (_named(decode_attention, sm_scale=1.0), _stored(0), "144 slots and 0 rows"),
        (_named(solve, alpha=1.5), (_array(2, 9),), "bfloat16, it knows float32"),
        (_named(top_k, k=1), (_array(0, 9),), r"scores \(0, 9\) must be from 1 to"),
    ],
    ids=[
        "prompt",
        "group",
        "statistics",
        "no-pages",
        "mixed",
        "D",
        "dtype",
        "stored-D",
        "floats",
        "no-rows",
        "scores",
        "empty",
    ],
)
def test_what_they_cannot(function, arguments, reason):
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(function, *arguments)


def test_a_device_that_is_no_gpu_says_so():
    if jax.devices()[0].platform == "gpu":
        pytest.skip("a GPU is there")
    with pytest.raises(
        NotImplementedError, match=r"the device is 'cpu': .*INTERPRET=1"
    ):
        jax.eval_shape(_named(solve, alpha=1.5), _array(2, 9, dtype=jnp.float32))


@pytest.mark.usefixtures("on_a100")
def test_versions_that_were_not_seen_to_work(monkeypatch):
    monkeypatch.setitem(triton_call.VERSIONS, "triton", "9.9.")
    triton_call.versions_fit.cache_clear()
    with pytest.raises(NotImplementedError, match=r"with jax-triton 0.3.* and triton"):
        jax.eval_shape(_named(solve, alpha=1.5), _array(2, 9, dtype=jnp.float32))
    triton_call.versions_fit.cache_clear()


@pytest.mark.usefixtures("on_a100")
def test_interpretation_is_decided_before_triton_is_imported():
    run = _named(solve, alpha=1.5, interpret=True)
    with pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1"):
        jax.eval_shape(run, _array(2, 9, dtype=jnp.float32))
