"""Compilers in processes of their own, as they are told things only when they start."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parents[1]


def output(module: str, target: str, *names: str, **environment: str) -> str:
    """What a module of this folder prints about cases, compiled for a target.

    Raises:
        RuntimeError: if the compiler fails; carries the end of what it said.
    """
    paths = str(TESTS), os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-m", f"aot.{module}", target, *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"compiling for {target}: {done.stderr[-3000:]}")
    return done.stdout
