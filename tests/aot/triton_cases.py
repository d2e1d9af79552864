"""Compiles the Triton kernels for GPUs that are not there, at an 8B model's sizes.

What the assembler says of registers and spills, and the shared memory that a program
takes, decide how many programs a GPU can hold at once; nothing here was timed on one.

    PYTHONPATH=tests python -m aot.triton_cases         # prints and writes the JSON
    PYTHONPATH=tests python -m aot.triton_cases a100    # one target, as JSON lines
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from aot import child, gpu
from aot.cases import PROBLEMS

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/triton-static.json"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "0"}


class Case(NamedTuple):
    """One compilation, as `gpu.compiled` takes it."""

    target: str
    function: Callable
    arguments: tuple


# Every kernel for both; its variants for one, as compiling takes time.
BOTH = (
    "page_attention-P64-128K",
    "page_attention-int4-P64-128K",
    "decode_attention-K8V4-1M",
    "page_bounds-P16-1M",
    "page_moments-P64-128K",
    "entmax-1.5-1M",
    "top_k-64-of-2K",
    "top_k-8192-of-1M",
)
TARGETS = {
    "a100": (
        *BOTH,
        "page_attention-P16-1M",
        "page_attention-K8V4-P16-T8-mask-128K",
        "decode_attention-int4-T4-window-cap-128K",
        "page_attention-surrogate-P64-128K",
        "page_entmax-P16-1M",
        "page_bounds-mean-P64-128K",
        "entmax-1.5-8K",
        "entmax-1.7-128K",
    ),
    "h100": (
        *BOTH,
        "page_attention-P128-T16-mask-128K",
        "page_attention-P64-f32-128K",
        "page_attention-int8-P64-128K",
        "page_attention-K8V4-surrogate-P64-128K",
        "decode_attention-int8-ring-logits-64K",
        "page_entmax-K8V4-P64-128K",
        "page_attention-surrogate-P64-128K",
        "page_entmax-tau-P64-128K",
        "page_bounds-max-P64-128K",
        "page_moments-P16-1M",
    ),
}
# Bytes: parts to merge, counts by digit; no copy of a cache or of the scores.
TEMP_LIMIT = 16 << 20


def assembled(ptx: pathlib.Path) -> dict:
    """What the assembler of Triton's own distribution says of a kernel."""
    import triton

    architecture = re.search(r"\.target (\w+)", ptx.read_text())[1]
    done = subprocess.run(
        [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"-arch={architecture}",
            ptx,
            "-o",
            os.devnull,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return {
        "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
        "spilled_bytes": max(map(int, spills)),
        "matrix_products": len(re.findall(r"\bw?g?mma\.", ptx.read_text())),
        "async_copies": ptx.read_text().count("cp.async.cg"),
    }


def _child(target, names):
    """Compiles the cases and prints a line of JSON for each of their kernels."""
    folder = pathlib.Path(os.environ["JAX_TRITON_DUMP_DIR"])
    for name in names or TARGETS[target]:
        before = set(folder.glob("*/*.ptx"))
        function, arguments = PROBLEMS[name]
        run = functools.partial(function, implementation="triton")
        memory = gpu.compiled(Case(target, run, arguments)).memory_analysis()
        for ptx in sorted(set(folder.glob("*/*.ptx")) - before, key=_made):
            info = ptx.with_suffix(".compile_info").read_text()
            figures = {
                "target": target,
                "case": name,
                "kernel": ptx.stem,
                **assembled(ptx),
                "shared_bytes": int(info.split(":")[-1]),
                "temp_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
            }
            print(json.dumps(figures), flush=True)


def _made(path):
    return path.stat().st_mtime_ns


def figures(target: str, *names: str) -> list[dict]:
    """Static figures of the cases' kernels, from a process of their own.

    Raises:
        RuntimeError: if the compiler fails; carries the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = child.output(
            "triton_cases", target, *names, **ENVIRONMENT, JAX_TRITON_DUMP_DIR=folder
        )
    return [json.loads(line) for line in printed.splitlines()]


def main():
    if len(sys.argv) > 1:
        _child(sys.argv[1], sys.argv[2:])
        return
    rows = [row for target in TARGETS for row in figures(target)]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
