"""CritiPrefill's prompt time against full attention's: one layer of an 8B model.

Both methods read the same random heads, chunk by chunk in turn, each as the reader cuts
prompts for it; seconds are added up. Beside attention alone the layer's matrix products
are timed, which both have: their ratio is that of the whole layer. Of long prompts only
some chunks are timed, and stand for their neighbours: see `--every`.

    python benchmarks/critiprefill.py --lengths 8192,16384,32768 --json found.json
"""

import argparse
import json
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import registry
from kvjax.decoding import cutting
from kvjax.interface import CacheSpec
from kvjax.rope import Rope

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
WIDTH, MLP_WIDTH = 4096, 14_336
CHUNK = 512
SPECS = {"full": "full", "critiprefill": "critiprefill:{options}+full"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--options", default="", help="of critiprefill, as in a spec")
    parser.add_argument(
        "--every", type=int, default=1, help="time one of so many chunks between ends"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-products", action="store_true", help="attention alone")
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


class Reader:
    """One method, and what of a prompt it has read."""

    def __init__(self, spec, length, dtype):
        self.method = registry.parse(spec)
        sizes = (1, HEADS, KV_HEADS, HEAD_DIM, length, dtype)
        rope = Rope(HEAD_DIM, theta=500_000.0)
        self.state = self.method.init(CacheSpec(*sizes, rope, layer=1, num_layers=2))
        self.below, self.seconds = None, 0.0
        granule = self.method.hooks.granule
        self.parts = [int(n[0]) for _, n in cutting.cut([[0] * length], CHUNK, granule)]
        self.read = jax.jit(self.method.prefill_layer, donate_argnums=0)

        def written(*inputs):
            return self.method.prefill_layer(*inputs)[0]  # XLA drops the attention

        self.write = jax.jit(written, donate_argnums=0)

    def take(self, heads, count, weight):
        """Reads a chunk of `count` tokens, timed if it has a weight."""
        inputs = (self.state, *heads, jnp.full((1,), count, jnp.int32), self.below)
        if not weight:
            self.state = jax.block_until_ready(self.write(*inputs))
            return
        begin = time.perf_counter()
        self.state, out, above = jax.block_until_ready(self.read(*inputs))
        self.seconds += weight * (time.perf_counter() - begin)
        assert bool(jnp.isfinite(out[:, :, :count]).all())
        # As from a layer below: shares of blocks, which the next chunk mixes in.
        self.below = above


def heads_of(rng, dtype):
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        x = rng.standard_normal((1, heads, CHUNK, HEAD_DIM), np.float32)
        yield jnp.asarray(x, dtype)


def weights_of(count, every):
    """How many chunks each stands for: the first 8 and the last 2 for themselves."""
    weights = np.zeros(count)
    weights[:8] = weights[-2:] = 1
    middle = np.arange(8, count - 2)
    timed = middle[every // 2 :: every]
    if len(middle):
        timed = timed if len(timed) else middle[:1]
        weights[timed] = len(middle) / len(timed)
    return weights


def attention(length, options, every, dtype):
    """Seconds of a prompt by method, in turn."""
    readers = {
        name: Reader(spec.format(options=options).replace(":+", "+"), length, dtype)
        for name, spec in SPECS.items()
    }
    for reader in readers.values():  # compile, on a copy
        state = jax.tree.map(jnp.copy, reader.state)
        heads = tuple(heads_of(np.random.default_rng(0), dtype))
        _, _, above = reader.read(state, *heads, jnp.full((1,), 1, jnp.int32), None)
        if above is not None:
            state = jax.tree.map(jnp.copy, reader.state)
            reader.below = jnp.zeros_like(above)
            reader.read(state, *heads, jnp.full((1,), 1, jnp.int32), reader.below)
        del state
    count = max(len(reader.parts) for reader in readers.values())
    rng, weights = np.random.default_rng(1), weights_of(count, every)
    for index in range(count):
        heads = tuple(heads_of(rng, dtype))
        for reader in readers.values():
            if index < len(reader.parts):
                reader.take(heads, reader.parts[index], weights[index])
    return {name: reader.seconds for name, reader in readers.items()}


def products(dtype):
    """Seconds of the matrix products of a layer for one chunk."""
    kv = KV_HEADS * HEAD_DIM
    shapes = {(WIDTH, WIDTH): 2, (WIDTH, kv): 2, (WIDTH, MLP_WIDTH): 2}
    shapes |= {(MLP_WIDTH, WIDTH): 1}
    total = 0.0
    for (inputs, outputs), times in shapes.items():
        x = jnp.ones((CHUNK, inputs), dtype)
        matrix = jnp.full((inputs, outputs), 0.01, dtype)
        run = jax.jit(jnp.matmul)
        jax.block_until_ready(run(x, matrix))
        samples = []
        for _ in range(3):
            begin = time.perf_counter()
            jax.block_until_ready(run(x, matrix))
            samples.append(time.perf_counter() - begin)
        total += times * float(np.median(samples))
    return total


def main():
    args = arguments()
    rows = []
    for length in map(int, args.lengths.split(",")):
        seconds = attention(length, args.options, args.every, args.dtype)
        row = {
            "length": length,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "ratio": round(seconds["full"] / seconds["critiprefill"], 3),
            "load": os.getloadavg()[0],
        }
        if not args.no_products:
            linear = products(args.dtype) * -(-length // CHUNK)
            both = [seconds[name] + linear for name in SPECS]
            row |= {"products": round(linear, 3), "layer_ratio": both[0] / both[1]}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    document = {
        "kvjax": kvjax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        "options": args.options,
        "every": args.every,
        "dtype": args.dtype,
        "chunk": CHUNK,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
