"""XLA's flags for tests: small programs compile in about half the time.

In one piece each, and by the older code generator while XLA has it: a flag that it does
not know ends the process.
"""

import os

import jax

_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def environment() -> dict[str, str]:
    """This process's, and the flags unless it has its own; for the CPU alone."""
    return {"XLA_FLAGS": " ".join(_FLAGS)} | os.environ
