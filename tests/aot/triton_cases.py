"""Compiles the Triton kernels for GPUs that are not there, at an 8B model's sizes.

8 KV heads of 4 query heads and 128 dimensions, one row, 128K or 1M tokens. What the
assembler says of registers and spills, and the shared memory that a program takes,
decide how many programs a GPU can hold at once; nothing here was timed on a device.

    python tests/aot/triton_cases.py         # prints the table and writes the JSON
    python tests/aot/triton_cases.py a100    # one target, as JSON lines
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

import jax
import jax.numpy as jnp

from pallas_kernels.entmax import solve
from pallas_kernels.page_attention import page_attention
from pallas_kernels.topk import top_k

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/triton-static.json"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "0"}
KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
SHORT, LONG = 1 << 17, 1 << 20


class Case(NamedTuple):
    """One compilation, as `gpu.compiled` takes it."""

    target: str
    function: Callable
    arguments: tuple


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _pages(
    context,
    page_size,
    *,
    tokens=4096,
    rows=1,
    masked=False,
    dtype=jnp.bfloat16,
):
    listed = tokens // page_size
    arguments = (
        _array(1, KV_HEADS * GROUP, rows, HEAD_DIM, dtype=dtype),
        _array(1, KV_HEADS, context // page_size, page_size, 2 * HEAD_DIM, dtype=dtype),
        _array(1, KV_HEADS, listed, dtype=jnp.int32),
        _array(1, rows, dtype=jnp.int32),
    )
    if masked:
        arguments += (_array(1, KV_HEADS, listed, rows, dtype=jnp.bool),)
    return functools.partial(page_attention, sm_scale=0.1), arguments


def _entmax(num_scores, alpha):
    scores = _array(1, KV_HEADS * GROUP, num_scores, dtype=jnp.float32)
    return functools.partial(solve, alpha=alpha), (scores,)


def _top_k(num_scores, k):
    scores = _array(1, KV_HEADS, num_scores, dtype=jnp.float32)
    return functools.partial(top_k, k=k, order="index"), (scores,)


# (function, arguments)
CASES = {
    "page_attention-P64-128K": _pages(SHORT, 64),
    "page_attention-P16-1M": _pages(LONG, 16, tokens=LONG // 16),
    "page_attention-P128-T16-mask-128K": _pages(SHORT, 128, rows=16, masked=True),
    "page_attention-P64-f32-128K": _pages(SHORT, 64, dtype=jnp.float32),
    "entmax-1.5-8K": _entmax(8192, 1.5),
    "entmax-1.5-1M": _entmax(LONG, 1.5),
    "entmax-1.7-128K": _entmax(SHORT, 1.7),
    "top_k-64-of-2K": _top_k(SHORT // 64, 64),
    "top_k-8192-of-1M": _top_k(LONG, 8192),
}
# Every kernel for both; its variants for one, as compiling takes time.
BOTH = "page_attention-P64-128K", "entmax-1.5-1M", "top_k-64-of-2K", "top_k-8192-of-1M"
TARGETS = {
    "a100": (*BOTH, "page_attention-P16-1M", "entmax-1.5-8K", "entmax-1.7-128K"),
    "h100": (
        *BOTH,
        "page_attention-P128-T16-mask-128K",
        "page_attention-P64-f32-128K",
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
    import gpu

    folder = pathlib.Path(os.environ["JAX_TRITON_DUMP_DIR"])
    for name in names or TARGETS[target]:
        before = set(folder.glob("*/*.ptx"))
        function, arguments = CASES[name]
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
        done = subprocess.run(
            [sys.executable, __file__, target, *names],
            env=os.environ | ENVIRONMENT | {"JAX_TRITON_DUMP_DIR": folder},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"compiling for {target}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


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
