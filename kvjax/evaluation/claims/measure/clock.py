"""The time that prompts take in one layer, methods in turns: ratios count."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.evaluation.claims.measure import steps
from kvjax.evaluation.claims.session import SOFTMAX, Session

CHUNK = 512  # tokens at once: a segment of most methods that read in segments


def seconds_a_token(
    session: Session, *runs: tuple[str, int], chunk: int = CHUNK
) -> list[np.ndarray]:
    """Times a token of a prompt in one layer, run by run, once a repeat, in turns.

    A run is a method and a length; queries and keys are random. Processor time where
    it is a CPU's: wall clock is also of what else runs there.
    """
    sizes = session.sizes
    # One capacity, so that both lengths run the same program.
    cache_spec = session.model(SOFTMAX).decoder.cache_spec(1, sizes.clocked[-1], 1)
    heads = (cache_spec.num_q_heads, *[cache_spec.num_kv_heads] * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    chunks = [
        jax.random.normal(key, (1, h, chunk, cache_spec.head_dim), jnp.float32)
        for key, h in zip(keys, heads, strict=True)
    ]
    lengths = jnp.full((1,), chunk, jnp.int32)
    is_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter

    def of_a_token(spec: str, length: int) -> float:
        method = session.method(spec)
        read = session.remember(
            ("chunk", spec), lambda: jax.jit(method.prefill, donate_argnums=0)
        )
        state = method.init(cache_spec)
        start = clock()
        for _ in range(length // chunk):
            state, out = read(state, *chunks, lengths)
            jax.block_until_ready(out)
        return (clock() - start) / length

    with steps.optimised():
        for spec, _ in runs:
            of_a_token(spec, chunk)  # compiles
        seconds = [[of_a_token(*run) for run in runs] for _ in range(sizes.repeats)]
    return list(np.array(seconds).T)
