"""Flags with which XLA compiles tiny programs in half the time; JAX's cache of them."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

# In one piece each, and by the older code generator while XLA has it.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# Of a program of its own, for the same.
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(FLAGS),
}

CACHE = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@contextlib.contextmanager
def cache(folder: pathlib.Path | None = None) -> Iterator[None]:
    """Keeps all that is compiled in a folder, or where others say; then JAX forgets it.

    Its cache would stay what it was at its first use, whatever the configuration says.
    """
    before = {name: getattr(jax.config, name) for name in CACHE}
    compilation_cache.reset_cache()
    try:
        if folder is not None:
            jax.config.update(CACHE[0], str(folder))
            jax.config.update(CACHE[1], 0.0)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
