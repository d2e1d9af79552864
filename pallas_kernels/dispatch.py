"""The choice of the code that runs an operation: its definition in XLA, or a kernel.

The choice is made here and nowhere else, when a program is lowered, so that a program
traced on a CPU may be compiled for a TPU.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

# By what name a caller may ask for one: the definition in XLA, or a kernel.
Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu", "triton"]

# The platform each kernel is lowered for; the first that can, runs.
_PLATFORMS: dict[Implementation, Literal["tpu", "cuda"]] = {
    "mosaic_tpu": "tpu",
    "mosaic_gpu": "cuda",
    "triton": "cuda",
}
# What is optional, and how to get it.
_NEEDS = {"triton": ("jax_triton", "pip install 'kvjax[triton]'")}


def dispatch(
    reference: Callable[..., Any],
    kernels: Mapping[Implementation, str],
    arrays: tuple[Any, ...],
    static: Mapping[str, Any],
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Any:
    """Calls `reference(*arrays, **static)` or a kernel that computes the same.

    A kernel module holds a function named as the reference, which also takes
    `interpret`, and `unsupported(*arrays, **static)`, which says from shapes and dtypes
    alone why that function cannot, or None. Derivatives are the reference's.

    Args:
        reference: the definition, which serves every device.
        kernels: module of each kernel by implementation. Imported when first needed.
        arrays: positional arguments: arrays, or None.
        static: keyword arguments, hashable.
        implementation: None takes a platform's kernel wherever it supports the
            arguments, else the reference; also where the compiler partitions the
            program over devices, unless inside a `shard_map` over all of its mesh.
            A name takes that one or raises.
        interpret: True, or Pallas' parameters of a simulation, run a kernel asked for
            by name on any device, slowly: for tests.

    Raises:
        ValueError: if there is no such implementation, or none to interpret.
        NotImplementedError: if the kernel asked for cannot; says why.
    """
    if implementation not in (None, "xla", *kernels):
        known = ", ".join(repr(name) for name in ("xla", *kernels))
        raise ValueError(f"{implementation=} must be None or one of {known}.")
    if interpret and implementation not in kernels:
        raise ValueError(
            f"interpret runs a kernel: {implementation=} must be one of "
            f"{', '.join(kernels)}."
        )
    if implementation == "xla":
        return reference(*arrays, **dict(sorted(static.items())))
    options = tuple(sorted(static.items()))
    if implementation is not None:
        kernel, reason = _kernel(
            reference, implementation, kernels[implementation], arrays, options
        )
        if reason is not None:
            raise NotImplementedError(
                f"{implementation} cannot run {reference.__name__}: {reason}. "
                "implementation='xla' can."
            )
        return _runner(reference, kernel, options, interpret)(*arrays)

    branches, reasons = {}, {}
    for name, module in kernels.items():
        platform = _PLATFORMS[name]
        # The kernels of GPUs take seconds to import, and depend on which GPU it is.
        if platform in branches or (platform == "cuda" and not _is_for_gpu()):
            continue
        kernel, reason = _kernel(reference, name, module, arrays, options)
        if reason is None:
            branches[platform] = _runner(reference, kernel, options, None)
        elif platform == "cuda":
            reasons[name] = reason
    if reasons and "cuda" not in branches:
        _note(reference.__name__, reasons)
    defined = functools.partial(reference, **dict(options))
    if not branches:
        return defined(*arrays)
    return lax.platform_dependent(*arrays, default=defined, **branches)


def device_kind() -> str:
    """The device programs are traced for, as tuning tables spell it: `TPU v5 lite`.

    An abstract device set by the caller, who compiles for another machine, goes first.
    """
    return _device().device_kind


def _device():
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return abstract or jax.devices()[0]


def _is_for_gpu():
    return _device().platform in ("gpu", "cuda")


_noted = set()


def _note(operation, reasons):
    # Once for an operation and a device: programs are right, and slower than they need.
    if (operation, device_kind()) in _noted:
        return
    _noted.add((operation, device_kind()))
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    warnings.warn(
        f"{operation} runs without a kernel on {device_kind()} ({why}).", stacklevel=3
    )


def _kernel(reference, name, module, arrays, options):
    """The kernel that a module holds, and why it cannot run the arguments, or None."""
    package, command = _NEEDS.get(name, (None, None))
    if package and importlib.util.find_spec(package) is None:
        return None, f"it needs {package}: {command}"
    imported = importlib.import_module(module)
    reason = imported.unsupported(*arrays, **dict(options))
    return getattr(imported, reference.__name__), reason


@functools.cache
def _runner(reference, kernel, options, interpret):
    # One jitted function per kernel and sizes: traced once in a process, however many
    # layers or eager calls there are.
    static = dict(options)
    defined = functools.partial(reference, **static)
    run = functools.partial(kernel, **static, interpret=interpret or False)
    if interpret is None:  # not asked for by name
        run = functools.partial(_when_lowered, defined, run)
    run = jax.custom_jvp(run)
    run.defjvp(lambda x, dx: jax.jvp(defined, x, dx))
    return jax.jit(run)


# A kernel that is traced when it is lowered: never on a CPU, and with a last choice.
# The compiler cannot partition a kernel over devices; a program that it partitions gets
# the reference, which it can, and one under `shard_map` the kernel.
_late = Primitive("kernel_when_lowered")
_late.multiple_results = True


def _when_lowered(reference, kernel, *arrays):
    leaves, tree = jax.tree.flatten(arrays)

    def flat(function):
        return lambda *x: jax.tree.leaves(function(*jax.tree.unflatten(tree, x)))

    made, shape = jax.make_jaxpr(reference, return_shape=True)(*arrays)
    out = _late.bind(
        *leaves,
        reference=flat(reference),
        kernel=flat(kernel),
        avals=tuple(made.out_avals),
    )
    return jax.tree.unflatten(jax.tree.structure(shape), out)


@_late.def_abstract_eval
def _(*_, avals, **__):
    return list(avals)


def _lower(context, *operands, reference, kernel, avals):
    del avals
    devices = context.module_context.axis_context
    manual = getattr(devices, "manual_axes", frozenset())
    is_partitioned = getattr(devices, "num_devices", 1) != 1 or (
        manual and manual != frozenset(devices.mesh.axis_names)
    )
    function = reference if is_partitioned else kernel
    return mlir.lower_fun(function, multiple_results=True)(context, *operands)


def _batch(arrays, axes, *, reference, **_):
    out = jax.vmap(reference, in_axes=axes)(*arrays)
    return out, [0] * len(out)


for _platform in set(_PLATFORMS.values()):
    mlir.register_lowering(_late, _lower, platform=_platform)
batching.primitive_batchers[_late] = _batch
