"""Triton kernels called through jax-triton: for which GPU, and interpreted without one.

Seen to compile: jax-triton 0.3.1 with triton 3.6.0, under jax 0.10.2, 0.11.2 and
0.12.0.1. jax-triton 0.4 cannot be traced under jax 0.12. Kernels are `@triton.jit`
around `@no_type_check`: a type checker's wrapper between the two would hide their
globals from Triton's compiler.

Triton interprets kernels in NumPy if `TRITON_INTERPRET=1` is set before it is imported.
Its interpreter asks for torch tensors, of which a pointer and a dtype suffice.
"""

import functools
import importlib.metadata
import re
from typing import Any

import jax
import jax_triton
import numpy as np
import triton
from triton.runtime import interpreter

from pallas_kernels.dispatch import device_kind

# (compute capability, multiprocessors) by model: of devices that programs are compiled
# for in their absence. One that is there is asked.
GPUS = {
    "A100": (80, 108),
    "L4": (89, 58),
    "H100": (90, 132),
    "H200": (90, 132),
}
VERSIONS = {"jax-triton": "0.3.", "triton": "3.6."}


@functools.cache
def versions_fit() -> str | None:
    """Says why the versions installed are not known to work, or None."""
    installed = {name: importlib.metadata.version(name) for name in VERSIONS}
    if all(installed[name].startswith(start) for name, start in VERSIONS.items()):
        return None
    here, works = (
        " and ".join(f"{name} {version}" for name, version in versions.items())
        for versions in (installed, VERSIONS)
    )
    return f"with {here} it was not seen to compile, but with {works}"


def is_interpreted() -> bool:
    """Says if kernels run in Triton's interpreter, as decided when it was imported."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


def unsupported() -> str | None:
    """Says why no kernel can be called here, or None."""
    if is_interpreted():
        if _gpu() is None:
            return None
        return "triton was imported with TRITON_INTERPRET=1, which compiles nothing"
    if _gpu() is None:
        return (
            f"the device is {device_kind()!r}: it needs an NVIDIA GPU, or "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    return versions_fit()


def _gpu() -> tuple[int, int] | None:
    kind = device_kind()
    device = jax.devices()[0]
    if device.device_kind == kind and device.platform == "gpu":
        capability = int(device.compute_capability.replace(".", ""))
        return capability, device.core_count
    words = re.findall(r"\w+", kind)
    return next((GPUS[word] for word in words if word in GPUS), None)


def num_cores() -> int:
    """Multiprocessors of the device that programs are traced for."""
    gpu = _gpu()
    return gpu[1] if gpu else 1


def call(
    kernel: Any,
    *arrays: Any,
    out_shape: Any,
    grid: tuple[int, ...],
    interpret: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **static: Any,
) -> Any:
    """Outputs of a kernel, whose pointers are of `arrays`, then of `out_shape`.

    Raises:
        RuntimeError: if it is to be interpreted, and Triton was imported to compile.
    """
    if interpret:
        if not is_interpreted():
            raise RuntimeError(
                "interpret=True needs TRITON_INTERPRET=1 before triton is imported."
            )
        run = functools.partial(_interpret, kernel, out_shape, grid, static)
        return jax.pure_callback(run, out_shape, *arrays)
    capability, _ = _gpu() or (None, None)
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=out_shape,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=capability,
        **static,
    )


class Pointer:
    """A NumPy array, as much of it as Triton's interpreter wants of a torch tensor."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> "Pointer":
        return self

    untyped_storage = cpu

    def new_empty(self, *_: Any, **__: Any) -> "Pointer":
        return Pointer(self.array)

    def set_(self, *_: Any) -> None:
        """Nothing: it is the same memory."""

    storage_offset = size = stride = copy_ = set_


@functools.cache
def _mend_the_interpreter():
    # Triton 3.6 asks for int(an array of one element), which NumPy 2.5 refuses.
    mended = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        mended(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _interpret(kernel, out_shape, grid, static, *arrays):
    _mend_the_interpreter()
    arrays = [np.ascontiguousarray(x) for x in arrays]
    outputs, tree = jax.tree.flatten(out_shape)
    outputs = [_poisoned(x) for x in outputs]
    with np.errstate(all="ignore"):  # inf - inf is no fault where it is not selected
        kernel[grid](*(Pointer(x) for x in (*arrays, *outputs)), **static)
    return jax.tree.unflatten(tree, outputs)


def _poisoned(shape):
    # What a kernel does not write shows.
    is_float = np.issubdtype(shape.dtype, np.floating)
    return np.full(shape.shape, np.nan if is_float else -(2**31), shape.dtype)
