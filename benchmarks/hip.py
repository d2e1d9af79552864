r"""How HiP grows with the context: one small layer, by what is counted and the clock.

    python benchmarks/hip.py decode --json hip.json
    python benchmarks/hip.py prefill --json hip.json

Lengths are 8K to 512K. Each call adds to the file an entry for every length and method,
and one for every method with slopes: those of the least squares line of the logarithm
over that of the length. Of n it would be 1; an entry says how much of n log2 n, and of
n log2(n / k) for k tokens that a search finds.

Of a decode step: what it reads (`Method.traffic`), the rounds that its search took, and
the least time of some steps, methods in turns; of `refresh` and stages, a step that
chooses anew. Keys are like their neighbours, as HiP takes them to be. Of a prompt: what
its blocks read, and the time since its beginning, of one prompt read chunk by chunk;
`full` up to a length of its own.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from entries import add
from scipy import signal

from kvjax import files, registry
from kvjax.interface import CacheSpec
from kvjax.methods.hip import page_lists
from kvjax.rope import Rope
from kvjax.stores import paged

LENGTHS = [1 << power for power in range(13, 20)]
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32}
DECODE = ("full", "hip", "refresh:stride=8+hip", "hip:search=stages")
PREFILL = ("full", "hip:prefill=sparse", "hip:prefill=sparse,key_stride=4")
ALIKE = 0.95  # correlation of a key with the one before it


def spec_of(length):
    return CacheSpec(1, **HEADS, capacity=length, dtype="float32", rope=Rope(32))


def drawn(seed, heads, length):
    """Rows of heads, each like the one before."""
    rows = np.random.default_rng(seed).standard_normal((1, heads, length, 32))
    fresh = (1 - ALIKE**2) ** 0.5
    return signal.lfilter([fresh], [1, -ALIKE], rows, axis=2).astype(np.float32)


@functools.cache
def stream():
    longest = LENGTHS[-1]
    return drawn(0, 4, longest), drawn(1, 2, longest), drawn(2, 2, longest)


def options_of(method):
    """The options of `hip` with a tree; None of other methods."""
    options = getattr(method.select, "args", [None])[0]
    return options if hasattr(options, "representative") else None


def rounds_of(method, state, q):
    """The rounds of a search, where a step is one; None of other methods."""
    options = options_of(method)
    if options is None:
        return None
    found = jax.jit(functools.partial(page_lists.search, options))(
        state, q, state.length - 1
    )
    return int(found.rounds)


def filled(method, spec):
    """A state with a whole cache in it."""
    state, (_, k, v) = method.init(spec), stream()
    k, v = (x[:, :, : spec.capacity] for x in (k, v))
    length = jnp.full((1,), spec.capacity, jnp.int32)
    store = getattr(state, "store", state)
    if isinstance(store, paged.Paged):
        pages = np.concatenate([k, v], -1).reshape(store.pages.shape)
        filled = store._replace(pages=jnp.asarray(pages), length=length)
    else:
        filled = store._replace(k=jnp.asarray(k), v=jnp.asarray(v), length=length)
    return filled if store is state else state._replace(store=filled)


def decode(args):
    """One step at each length: of `refresh` and stages, of one that chooses anew."""
    for length in args.lengths:
        spec, steps = spec_of(length), {}
        q = jnp.asarray(stream()[0][:, :, length - 1 : length])
        for name in args.method or DECODE:
            method = registry.parse(name, budget=args.budget)
            state = filled(method, spec)
            step = jax.jit(lambda state, q, m=method: m.inspect_step(state, q)[1])
            step(state, q).block_until_ready()
            steps[name] = (method, state, step, [])
        for _ in range(args.repeats):
            for _, state, step, times in steps.values():
                start = time.perf_counter()
                step(state, q).block_until_ready()
                times.append(time.perf_counter() - start)
        for name, (method, state, _, times) in steps.items():
            traffic = method.traffic(spec, length)
            yield {
                "part": "decode",
                "method": name,
                "budget": args.budget,
                "length": length,
                "counted": traffic.total,
                "kv_bytes": traffic.kv,
                "rounds": rounds_of(method, state, q),
                "microseconds": min(times) * 1e6,
                "median_microseconds": float(np.median(times)) * 1e6,
            }


def prefill(args):
    for name in args.method or PREFILL:
        method = registry.parse(name, budget=args.budget)
        longest, size = max(args.lengths), args.chunk
        if name == "full":
            longest = min(longest, args.longest_full)
        spec = spec_of(longest)
        step = jax.jit(method.prefill, donate_argnums=0)
        counts = jnp.full((1,), size, jnp.int32)
        first = [x[:, :, :size] for x in stream()]
        jax.block_until_ready(step(method.init(spec), *first, counts))
        # A block of queries reads what a step does, once; full attention's is a chunk.
        block, counted = (args.block if "sparse" in name else size), 0
        state = method.init(spec)
        start, cpu = time.perf_counter(), time.process_time()
        for begin in range(0, longest, size):
            part = [x[:, :, begin : begin + size] for x in stream()]
            state, out = step(state, *part, counts)
            blocks = range(begin, begin + size, block)
            counted += sum(method.traffic(spec, first + 1).total for first in blocks)
            if begin + size in args.lengths:
                out.block_until_ready()
                yield {
                    "part": "prefill",
                    "method": name,
                    "budget": args.budget,
                    "length": begin + size,
                    "counted": counted,
                    "seconds": time.perf_counter() - start,
                    "cpu_seconds": time.process_time() - cpu,
                }


def slope(lengths, values):
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def of_a_search(name, budget, lengths):
    """The slopes of a search for k of n tokens, of a method that is one."""
    options = options_of(registry.parse(name, budget=budget))
    if options is None:
        return {}
    rounds = np.log2(lengths / (options.pages_to_search_for * options.page_size))
    return {
        "n log2(n / k)": slope(lengths, lengths * rounds),
        "log2(n / k)": slope(lengths, rounds),
    }


def slopes(entries):
    """An entry for every method, of its entries at all lengths."""
    for name in dict.fromkeys(entry["method"] for entry in entries):
        of_method = [entry for entry in entries if entry["method"] == name]
        lengths = np.array([entry["length"] for entry in of_method], np.float64)
        if len(lengths) < 2:
            continue
        measures = ("counted", "microseconds", "seconds", "cpu_seconds")
        yield {
            "part": f"slopes of {of_method[0]['part']}",
            "method": name,
            "budget": of_method[0]["budget"],
            "lengths": [int(length) for length in lengths],
            "n log2 n": slope(lengths, lengths * np.log2(lengths)),
            "log2 n": slope(lengths, np.log2(lengths)),
            **of_a_search(name, of_method[0]["budget"], lengths),
        } | {
            measure: slope(lengths, [entry[measure] for entry in of_method])
            for measure in measures
            if measure in of_method[0]
        }


PARTS = {"decode": decode, "prefill": prefill}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--method", action="append", help="may be repeated")
    parser.add_argument("--budget", type=int, default=256, help="where left out")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--longest-full", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=2048, help="of a prompt")
    parser.add_argument("--block", type=int, default=32, help="query_block")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path, help="file to add to")
    args = parser.parse_args(argv)
    entries = []

    def show(entry):
        print(json.dumps(files.json_ready(entry)), flush=True)
        if args.json is not None:
            add(args.json, entry)

    for entry in PARTS[args.part](args):
        entries.append(entry)
        show(entry)
    for entry in slopes(entries):
        show(entry)


if __name__ == "__main__":
    main()
