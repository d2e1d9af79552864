"""Which code runs: decided at lowering, by support; never silently against a name."""

import functools
import importlib.util
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import tpu

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import device_kind, dispatch

MODULE = "pallas_kernels.made_up"


def scaled(x, offset, *, by):
    """The reference: offset may be None."""
    y = x**2 * by
    return y if offset is None else y + offset


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that computes something else, so that it shows where it ran."""
    module = types.ModuleType(MODULE)
    module.traced = []

    def scaled(x, offset, *, by, interpret):
        module.traced.append(interpret)
        return jnp.tanh(x) * by

    def unsupported(x, offset, *, by):
        return f"{x.shape[0]} rows are odd" if x.shape[0] % 2 else None

    module.scaled, module.unsupported = scaled, unsupported
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def _call(x, offset=None, by=3.0, kernels=("mosaic_tpu",), **options):
    kernels = dict.fromkeys(kernels, MODULE)
    return dispatch(scaled, kernels, (x, offset), {"by": by}, **options)


def _on(kind, platform):
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=None, platform=platform
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def _lowered(function, *arguments, platform):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_is_known_when_a_program_is_lowered(kernel):
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(_call(x), 3 * x**2)
    np.testing.assert_array_equal(jax.jit(_call)(x), 3 * x**2)
    assert "tanh" in _lowered(_call, x, platform="tpu")
    for platform in ("cpu", "cuda"):
        assert "tanh" not in _lowered(_call, x, platform=platform)


def test_what_the_kernel_cannot_is_the_reference_s(kernel):
    assert "tanh" not in _lowered(_call, jnp.arange(3.0), platform="tpu")
    assert kernel.traced == []


def test_a_name_is_obeyed(kernel):
    x = jnp.arange(4.0)
    run = functools.partial(_call, x, 1.0)
    np.testing.assert_array_equal(run(implementation="xla"), 3 * x**2 + 1)
    assert kernel.traced == []
    named = run(implementation="mosaic_tpu", interpret=True)
    np.testing.assert_allclose(named, 3 * np.tanh(x), rtol=1e-6)
    assert kernel.traced == [True]
    assert "tanh" not in _lowered(
        functools.partial(_call, implementation="xla"), x, platform="tpu"
    )


def test_a_kernel_is_never_traced_for_a_cpu(kernel):
    x = jnp.arange(4.0)

    @jax.jit
    def layers(x):
        for _ in range(3):
            x = _call(x)
        return x

    layers(x)
    _call(x)
    assert kernel.traced == []
    assert _lowered(layers, x, platform="tpu").count("tanh") <= 3
    assert set(kernel.traced) == {False}


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_shard_of_a_mesh_runs(kernel, check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    run = jax.shard_map(
        _call, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=check_vma
    )
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(jax.jit(run)(x), 3 * x**2)


@pytest.mark.parametrize("by_hand", [False, True], ids=["partitioned", "shard_map"])
def test_several_tpus(kernel, by_hand):
    """The compiler cannot partition a kernel: there the reference runs."""
    pytest.importorskip("libtpu", reason=tpu.REASON)
    topology = tpu.topology("v5e")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
    run = _call
    if by_hand:
        run = jax.shard_map(_call, mesh=mesh, in_specs=(spec,), out_specs=spec)
    text = jax.jit(run).lower(x).as_text()
    assert ("tanh" in text) == by_hand


@pytest.mark.parametrize("named", [False, True])
def test_derivatives_and_batches_are_the_reference_s(kernel, named):
    options = {"implementation": "mosaic_tpu", "interpret": True} if named else {}
    run = functools.partial(_call, **options)
    x = jnp.arange(4.0)
    gradient = jax.grad(lambda x: run(x, jnp.ones_like(x)).sum())(x)
    np.testing.assert_array_equal(gradient, 6 * x)
    np.testing.assert_array_equal(jax.jvp(run, (x,), (x,))[1], 6 * x**2)
    batched = jax.vmap(run)(jnp.stack([x, x + 1]))
    np.testing.assert_array_equal(batched[1], run(x + 1))


def test_errors_name_the_choices(kernel):
    with pytest.raises(ValueError, match="'triton' must be None or one of 'xla', 'mos"):
        _call(jnp.ones(4), implementation="triton")
    for name in (None, "xla"):
        with pytest.raises(ValueError, match=r"interpret runs a kernel: .*mosaic_tpu"):
            _call(jnp.ones(4), implementation=name, interpret=True)
    expected = "mosaic_tpu cannot run scaled: 3 rows are odd. implementation='xla' can"
    with pytest.raises(NotImplementedError, match=expected):
        _call(jnp.ones(3), implementation="mosaic_tpu")


def test_an_abstract_device_goes_first():
    assert device_kind() == jax.devices()[0].device_kind
    with _on("TPU v5 lite", "tpu"):
        assert device_kind() == "TPU v5 lite"


def test_kernels_of_gpus_run_on_gpus_alone(kernel):
    x = jnp.arange(4.0)
    run = functools.partial(_call, kernels=("mosaic_tpu", "mosaic_gpu"))
    assert "tanh" not in _lowered(run, x, platform="cuda")  # traced on a CPU
    with _on("NVIDIA H100", "gpu"):
        assert "tanh" in _lowered(run, x, platform="cuda")


def test_a_gpu_without_a_kernel_gets_the_reference_and_one_note(kernel):
    x = jnp.arange(3.0)
    run = functools.partial(_call, kernels=("mosaic_tpu", "mosaic_gpu"))
    message = r"scaled runs without a kernel on NVIDIA L4 .*mosaic_gpu: 3 rows are odd"
    with _on("NVIDIA L4", "gpu"):
        with pytest.warns(UserWarning, match=message):
            assert "tanh" not in _lowered(run, x, platform="cuda")
        run(jnp.arange(5.0))  # a second warning would be an error here


def test_an_optional_backend_says_how_to_get_it(kernel, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = functools.partial(_call, kernels=("triton",), implementation="triton")
    with pytest.raises(NotImplementedError, match=r"jax_triton: .*'kvjax\[triton\]'"):
        run(jnp.arange(4.0))


@pytest.mark.parametrize(("head_dim", "is_kernel"), [(128, True), (64, False)])
def test_an_operation_takes_its_kernel_on_tpu_alone(head_dim, is_kernel):
    q = jnp.ones((1, 2, 1, head_dim))
    k = jnp.ones((1, 2, 16, head_dim))
    run = functools.partial(decode_attention, sm_scale=1.0)
    arguments = (q, k, k, jnp.zeros((1, 1), jnp.int32))
    text = _lowered(run, *arguments, platform="tpu")
    assert ("tpu_custom_call" in text) == is_kernel
    assert "custom_call" not in _lowered(run, *arguments, platform="cpu")


def test_importing_does_not_import_pallas():
    """A quarter of a second; it comes with the first call."""
    code = "import sys, kvjax; print('jax.experimental.pallas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
