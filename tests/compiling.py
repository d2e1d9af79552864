"""Flags with which XLA compiles tiny programs in half the time."""

import jax

# In one piece each, and by the older code generator while XLA has it.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# Of a program of its own, for the same.
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(FLAGS),
}
