"""The whole decode loop of an 8B model, compiled for a TPU that is not there.

The very program that generates text, at 128K tokens, from shapes alone: its memory is
what the compiler allots. Layers are alike, so that one and two of them tell the rest;
all 32 take minutes.

    PYTHONPATH=tests python -m aot.whole       # all layers of every case, a table
    PYTHONPATH=tests python -m aot.whole v5e 1 CASE    # so many layers, a line of JSON
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import NamedTuple

import numpy as np
from aot import child, tpu

CONFIG = pathlib.Path(__file__).parents[2] / "docs/configs/llama-3.1-8b.json"
CONTEXT, STEPS = 131_072, 16
# Caches that one v5e has room for beside weights in 4 bits. Rows of bytes lie in pages
# of 128 tokens without being laid out anew.
CASES = tuple(
    f"quantize:{bits},prompt=quantized+{method}"
    for method in ("full", "quest:page_size=128")
    for bits in ("bits=4", "keys=8,values=4", "bits=8")
)


class Memory(NamedTuple):
    """The bytes that the compiler allots to a program."""

    arguments: int
    temporaries: int
    outputs: int
    aliases: int  # of arguments that outputs take the place of

    @property
    def total(self) -> int:
        """The bytes that a device must have at once."""
        return self.arguments + self.temporaries + self.outputs - self.aliases


def arguments(spec: str, layers: int, weights="int4"):
    """The decoder, the method, and the shapes of all that the program takes."""
    import jax
    import jax.numpy as jnp

    import models
    from kvjax import registry
    from kvjax.decoding import generate, sampling
    from kvjax.interface import layer_specs
    from models.llama import LlamaDecoder
    from models.llama.weights import packed_shapes

    config = models.load_decoder(CONFIG).config
    decoder = LlamaDecoder(dataclasses.replace(config, num_layers=layers))
    method = registry.parse(spec, budget=4096)
    specs = layer_specs(decoder, 1, CONTEXT, STEPS)

    def begin():
        return tuple(method.finish(method.init(spec)) for spec in specs)

    row, one = jax.ShapeDtypeStruct((1,), bool), jax.ShapeDtypeStruct((), jnp.int32)
    chosen = jax.ShapeDtypeStruct((1,), jnp.int32)
    tail = generate.Tail(chosen, row, row, one, None)
    given = None, sampling.active(sampling.Sampling()), np.zeros(3, np.int32)
    window = jax.ShapeDtypeStruct((1, method.rows), jnp.int32)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    params, states = packed_shapes(decoder.config, weights), jax.eval_shape(begin)
    return decoder, method, (params, states, window, tail, given, limit)


def held(spec: str, layers: int, weights="int4") -> int:
    """The bytes of weights and states, by their shapes."""
    from kvjax.stores import buffers

    return buffers.num_bytes(arguments(spec, layers, weights)[2][:2])


def compiled(spec: str, layers: int, generation: str = "v5e", weights="int4"):
    """The executable of so many layers."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    from kvjax.decoding import generate, loop

    decoder, method, given = arguments(spec, layers, weights)
    sharding = SingleDeviceSharding(tpu.topology(generation).devices[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding),
        given,
    )
    kind = tpu.GENERATIONS[generation].device_kind
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        program = loop.steps(generate.SAMPLED).lower(decoder, method, STEPS, *placed)
        return program.compile()


def memory(spec: str, layers: int, generation: str = "v5e", weights="int4") -> Memory:
    """The bytes of a program of so many layers."""
    return measured(compiled(spec, layers, generation, weights))


def measured(program) -> Memory:
    """The bytes of a compiled program."""
    found = program.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
    )


def main():
    if len(sys.argv) > 1:
        generation, layers, *names = sys.argv[1:]
        for name in names or CASES:
            begin = time.perf_counter()
            found = memory(name, int(layers), generation)
            seconds = round(time.perf_counter() - begin, 1)
            row = {"case": name, "layers": int(layers), "seconds": seconds}
            row |= found._asdict() | {"total": found.total}
            print(json.dumps(row), flush=True)
        return
    for name in CASES:
        print(child.output("whole", "v5e", "32", name, **tpu.ENVIRONMENT), end="")


if __name__ == "__main__":
    main()
