"""Compiles for real TPUs on a machine without one, and reads the compiler's schedule.

A static schedule is a performance model without a device: a bundle of instructions
takes one cycle at best, and the bytes that a loop iteration moves take
`bytes / HBM bandwidth` seconds. A kernel whose iteration has fewer bundles than its
transfer has cycles can be bound by memory; nothing here was timed on a device.

Records the figures of every case, or compares them: see `test_tpu.py`.

    PYTHONPATH=tests python -m aot.tpu        # prints the table and writes the JSON
    PYTHONPATH=tests python -m aot.tpu v5e    # one generation, as JSON lines
"""

import json
import os
import pathlib
import re
import sys
import tempfile
from typing import NamedTuple

from aot import child

REASON = "libtpu compiles for TPUs without one: pip install 'kvjax[aot]'"
RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/tpu-static.json"

# libtpu looks for a TPU's host otherwise, logs into a folder, and locks other processes
# out. The values do not matter: nothing is run.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Generation(NamedTuple):
    """A TPU as the compiler knows it."""

    topology: str
    device_kind: str
    hbm_bytes_per_second: float
    hertz: float  # peak flops over the flops of a cycle

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm_bytes_per_second / self.hertz


GENERATIONS = {
    "v5e": Generation("v5e:2x2", "TPU v5 lite", 819e9, 1.5e9),
    "v6e": Generation("v6e:2x2", "TPU v6 lite", 1640e9, 1.75e9),
    "v5p": Generation("v5p:2x2x1", "TPU v5", 2765e9, 1.75e9),
    "v7x": Generation("tpu7x:2x2x1", "TPU7x", 7380e9, 2.0e9),
}


def topology(generation):
    """Four devices or more of a generation; needs libtpu, and no TPU."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=GENERATIONS[generation].topology,
        chips_per_host_bounds=(2, 2, 1),
    )


def compiled(case, generation):
    """The case's executable for a TPU of this generation."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    sharding = SingleDeviceSharding(topology(generation).devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        case.arguments,
    )
    kind = GENERATIONS[generation].device_kind
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(case.function).lower(*arguments).compile()


def loops(listing: str) -> list[int]:
    """Bundles of one iteration of each loop of a final listing, in order of address.

    All branches inside count, and the loops inside once. A line of a listing reads
    `address [mark] : depth {...}`, depth one > for each loop around it; LB marks the
    first bundle of a loop, and PF the one behind a branch, such as the one back. Some
    bundles around a branch carry too low a depth: up to eight in a row belong to the
    loop they are in, if they have no mark.
    """
    found = re.findall(
        r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)", listing, re.MULTILINE
    )
    lines = [(mark, len(arrows)) for mark, arrows in found]
    starts = [i for i, (mark, _) in enumerate(lines) if mark == "LB"]
    return [_end(lines, start) - start for start in starts]


def _end(lines, start):
    depth, outside = lines[start][1], 0
    for i, (mark, own) in enumerate(lines[start:], start):
        outside = outside + 1 if own < depth else 0
        if outside and mark:
            return i
        if outside > 8:
            return i - 8
    return len(lines) - outside


def _dumped(folder, kernel):
    found = pathlib.Path(folder).glob(f"*-{kernel}.*-final_bundles.txt")
    return {path for path in found if "schedule-analysis" not in path.name}


def _child(generation, names):
    """Compiles the cases and prints a line of JSON for each."""
    import jax
    import libtpu
    from aot import cases

    folder = os.environ["LIBTPU_INIT_ARGS"].split("--xla_jf_dump_to=")[1].split()[0]
    for name in names or cases.CASES:
        case = cases.CASES[name]
        before = _dumped(folder, case.kernel)
        memory = compiled(case, generation).memory_analysis()
        (listing,) = _dumped(folder, case.kernel) - before
        cycles = case.block_bytes / GENERATIONS[generation].hbm_bytes_per_cycle
        figures = {
            "generation": generation,
            "case": name,
            "bundles_per_iteration": loops(listing.read_text())[case.loop],
            "hbm_cycles_per_iteration": round(cycles),
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "compiler": f"libtpu {libtpu.__version__}, jax {jax.__version__}",
        }
        print(json.dumps(figures), flush=True)


def figures(generation: str, *names: str) -> list[dict]:
    """Static figures of the cases (all by default), from a process of their own.

    Raises:
        RuntimeError: if the compiler fails; carries the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The last of its some seventy stages: writing all takes as long as compiling.
        dump = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
        printed = child.output(
            "tpu", generation, *names, **ENVIRONMENT, LIBTPU_INIT_ARGS=dump
        )
    return [json.loads(line) for line in printed.splitlines()]


def main():
    if len(sys.argv) > 1:
        _child(sys.argv[1], sys.argv[2:])
        return
    rows = [row for generation in ("v5e", "v6e") for row in figures(generation)]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
