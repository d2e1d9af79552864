"""Compiles for real GPUs on a machine without one, and reads what the compiler used.

XLA compiles for the GPU that a file of `gpu_targets` describes. Of each Mosaic kernel
the assembler tells registers and spills, Pallas the shared memory: how many programs
a multiprocessor holds at once follows. Nothing here was run or timed on a device.

Records the figures of every case, or compares them: see `test_gpu.py`.

    PYTHONPATH=tests python -m aot.gpu         # prints the table and writes the JSON
    PYTHONPATH=tests python -m aot.gpu h100    # one target, as JSON lines
"""

import contextlib
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
from aot import child
from aot.cases import PROBLEMS

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/gpu-static.json"
TARGETS = pathlib.Path(__file__).parent / "gpu_targets"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
}

# Of a multiprocessor of both an A100 and a H100.
REGISTERS = 65536
THREADS = 128  # of a program: one warpgroup
RESERVED_BYTES = 1024  # of shared memory, for each program


class Case(NamedTuple):
    """One compilation."""

    target: str  # a file of `gpu_targets`; one compute capability a process
    function: Callable
    arguments: tuple
    kernel: str  # name of its Mosaic kernel
    temp_limit: int = 8 << 20  # bytes: parts to merge, far below any cache
    programs: int = 2  # a multiprocessor holds at least so many at once


def unavailable() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    found = importlib.util.find_spec("jax_plugins")
    if jax.__version_info__ >= (0, 11) and found is not None:
        found = importlib.util.find_spec("jax_plugins.xla_cuda13")
        if found is not None:
            return None
    return (
        "compiling for GPUs without one needs Python 3.12, jax >= 0.11 and its CUDA "
        "plugin: pip install 'kvjax[aot]'"
    )


def _case(name, kernel, *, temp_limit=8 << 20, programs=2):
    """The operation as it is called, and left to choose."""
    return Case("h100", *PROBLEMS[name], kernel, temp_limit, programs)


_CASES = (
    # (name, kernel, what else is not the default)
    ("page_attention-P64-128K", "page_attention", {}),
    ("page_attention-P64-1M", "page_attention", {}),
    ("page_attention-P16-T8-mask-128K", "page_attention", {}),
    ("page_attention-int8-P64-128K", "page_attention", {}),
    ("page_attention-int4-P64-128K", "page_attention", {}),
    ("decode_attention-1M", "decode_attention", {}),
    ("decode_attention-K8V4-1M", "decode_attention", {}),
    ("decode_attention-int4-T4-window-cap-128K", "decode_attention", {}),
    ("decode_attention-T4-window-cap-128K", "decode_attention", {}),
    ("decode_attention-ring-4K", "decode_attention", {}),
    ("decode_attention-logits-128K", "decode_attention", {"temp_limit": 64 << 20}),
    (
        "decode_attention-prompt-T1024-128K",
        "decode_attention",
        {"temp_limit": 64 << 20},
    ),
    ("entmax-1.5-128K", "entmax_solve", {}),
    ("entmax-1.7-128K", "entmax_solve", {}),
    # At the edges of what the kernels say they support.
    (
        "page_attention-P8-T16-D256",
        "page_attention",
        {"programs": 1, "temp_limit": 32 << 20},
    ),
    ("page_attention-P256-D64-f16-list-a-query-head", "page_attention", {}),
    (
        "page_attention-K8V4-P128-T8-D256",
        "page_attention",
        {"programs": 1, "temp_limit": 32 << 20},
    ),
    ("page_attention-int8-P256-D64-f16-list-a-query-head", "page_attention", {}),
    ("entmax-3-1K", "entmax_solve", {}),
)
CASES = {name: _case(name, kernel, **more) for name, kernel, more in _CASES}


def _target(name):
    text = (TARGETS / f"{name}.txtpb").read_text()
    kind = re.search(r'device_description_str: "(.*)"', text)
    shared = re.search(r"shared_memory_per_core: (\d+)", text)
    return text, kind.group(1), int(shared.group(1))


@contextlib.contextmanager
def target(name):
    """Programs are traced for a GPU that is not there; yields its sharding."""
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    text, kind, _ = _target(name)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=text, topology="1x1x1"
    )
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield SingleDeviceSharding(topology.devices[0])


def compiled(case):
    """The case's executable for its target."""
    with target(case.target) as sharding:
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            case.arguments,
        )
        return jax.jit(case.function).lower(*arguments).compile()


def resources(listing: str, shared_bytes: int) -> list[dict]:
    """What a program of each Mosaic kernel takes, from what its compilation printed."""
    assembled = re.findall(
        r"entry function '(\w+)_mosaic_gpu_kernel'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        listing,
        re.DOTALL,
    )
    scratch = re.findall(r"Resources\(smem_scratch_bytes=(\d+)", listing)
    found = []
    for (kernel, *numbers), shared in zip(assembled, map(int, scratch), strict=True):
        stores, loads, registers = map(int, numbers)
        # Registers are given to a warp in eights a thread.
        by_registers = REGISTERS // (THREADS * (registers + -registers % 8))
        by_shared = shared_bytes // (shared + RESERVED_BYTES)
        found.append(
            {
                "kernel": kernel,
                "registers": registers,
                "spilled_bytes": max(stores, loads),
                "shared_bytes": shared,
                "programs": min(by_registers, by_shared),
            }
        )
    return found


def _child(target, names):
    """Compiles the cases and prints a line of JSON for each."""
    for name in names:
        memory = compiled(CASES[name]).memory_analysis()
        figures = {
            "target": target,
            "case": name,
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "jax": jax.__version__,
        }
        print(json.dumps(figures), flush=True)


def figures(target: str, *names: str) -> list[dict]:
    """Static figures of a target's cases (all by default), from a process of their own.

    Raises:
        RuntimeError: if the compiler fails; carries the end of what it said.
        ValueError: if not every case made one kernel.
    """
    names = names or tuple(x for x in CASES if CASES[x].target == target)
    printed = child.output("gpu", target, *names, **ENVIRONMENT)
    lines = printed.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    # One each: an operation that did not take its kernel is an error.
    kernels = resources(printed, _target(target)[2])
    return [row | kernel for row, kernel in zip(rows, kernels, strict=True)]


def main():
    if len(sys.argv) > 1:
        _child(sys.argv[1], sys.argv[2:])
        return
    targets = dict.fromkeys(case.target for case in CASES.values())
    rows = [row for target in targets for row in figures(target)]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
