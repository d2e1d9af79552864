r"""Cascading cache against StreamingLLM and full attention, on an embedded model.

    python benchmarks/cascade.py retrieval --budget 512 --n 50 --json cascade.json
    python benchmarks/cascade.py perplexity --budget 512 --n 8 --json cascade.json
    python benchmarks/cascade.py prefill --json cascade.json
    python benchmarks/cascade.py memory --method cascade:budget=128,stride=256 \
        --lengths 65536 1048576 --json cascade.json

Each call adds its part to the file. Retrieval: pass keys one to four cache sizes back;
"key" is the whole number, "first" its first token (three digits), "digits" the share of
its digits that are right in place, the paper's measure. Perplexity: by position in a
window of the model's whole context, every method through its prompt path, and then by
decode steps. Prefill: seconds of wall clock and of processor, in turns, the least of
some repetitions. Memory: the peak of this process while it reads one long prompt.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import resource
import time

import jax
import numpy as np
from entries import add

import models
from kvjax import files, registry
from kvjax.decoding import reader
from kvjax.decoding.generate import generate
from kvjax.decoding.scoring import score
from kvjax.evaluation import statistics
from kvjax.evaluation.tasks import needles
from kvjax.stores import buffers
from models import embedded

SEED = 30_000
DEPTHS = (0.2, 0.35, 0.5, 0.65, 0.8)  # of five cache sizes: four to one back
BUCKET = 1024


def load(context=None):
    model = models.load("embedded-softmax", dtype="float32")
    if context is None:
        return model
    config = dataclasses.replace(model.decoder.config, context=context)
    return model._replace(decoder=dataclasses.replace(model.decoder, config=config))


def digits_right(text, answer):
    found = text.lstrip()[: len(answer)].ljust(len(answer))
    return sum(a == b for a, b in zip(found, answer, strict=True)) / len(answer)


def retrieval(args):
    model, text = load(), embedded.heldout_text()
    context = 5 * args.budget
    examples = needles.passkey(
        model.tokenizer, text, context=context, n=args.n, seed=SEED, depths=DEPTHS
    )
    new_tokens = max(example.answer_tokens for example in examples) + 1
    for name in args.method:
        start, texts = time.perf_counter(), []
        method = registry.parse(name, budget=args.budget)
        for first in range(0, args.n, args.batch):
            found = generate(
                model,
                method,
                [example.prompt for example in examples[first : first + args.batch]],
                max_new_tokens=new_tokens,
                eos_ids=(),
                chunk_size=512,
            )
            texts += [generation.text for generation in found]
        pairs = list(zip(examples, texts, strict=True))
        whole = [example.score(text) for example, text in pairs]
        firsts = [text.lstrip()[:3] == e.answer[:3] for e, text in pairs]
        digits = np.array([digits_right(text, e.answer) for e, text in pairs])
        by_depth = {
            depth: {
                "back": round((1 - depth) * 5, 2),
                "first": sum(firsts[i :: len(DEPTHS)]),
                "digits": float(digits[i :: len(DEPTHS)].mean()),
                "n": len(firsts[i :: len(DEPTHS)]),
            }
            for i, depth in enumerate(DEPTHS)
        }
        yield {
            "part": "retrieval",
            "method": name,
            "budget": args.budget,
            "context": context,
            "n": args.n,
            "key": statistics.wilson(int(sum(whole)), args.n)._asdict(),
            "first": statistics.wilson(int(sum(firsts)), args.n)._asdict(),
            "digits": statistics.share_interval(digits)._asdict(),
            "by_depth": by_depth,
            "seconds": round(time.perf_counter() - start, 1),
        }


def perplexity(args):
    model, text = load(), embedded.heldout_text()
    context = model.decoder.context
    windows = needles.windows(
        model.tokenizer, text, context=context, n=args.n, seed=SEED
    )
    steps = 128
    baseline = None
    for name in args.method:
        start, parts = time.perf_counter(), []
        method = registry.parse(name, budget=args.budget)
        for first in range(0, args.n, args.batch):
            rows = windows[first : first + args.batch]
            found = score(model, method, rows, prefill=context - steps, chunk_size=512)
            parts.append(found.log_probs)
        nats = -np.concatenate(parts).astype(np.float64)
        prompt, decoded = nats[:, : context - steps], nats[:, context - steps :]
        beyond = prompt[:, 2 * args.budget :].mean(1)
        baseline = beyond if baseline is None else baseline
        yield {
            "part": "perplexity",
            "method": name,
            "budget": args.budget,
            "windows": args.n,
            "context": context,
            "nats_by_position": [
                float(prompt[:, i : i + BUCKET].mean())
                for i in range(0, context - steps, BUCKET)
            ],
            "bucket": BUCKET,
            "perplexity_beyond_two_caches": statistics.perplexity(-beyond)._asdict(),
            "nats_above_the_first_method": statistics.paired_difference(
                -baseline, -beyond
            )._asdict(),
            "perplexity_of_decode_steps": statistics.perplexity(
                -decoded.mean(1)
            )._asdict(),
            "decode_steps": steps,
            "seconds": round(time.perf_counter() - start, 1),
        }


@functools.cache
def long_text(length):
    tokens = load().tokenizer.encode(embedded.heldout_text())
    return np.resize(np.array(tokens, np.int32), length)


def once(model, method, length):
    wall, cpu = time.perf_counter(), time.process_time()
    done = reader.prefill(model, method, [long_text(length)], max_new_tokens=1)
    jax.block_until_ready(done)
    return time.perf_counter() - wall, time.process_time() - cpu


def prefill_times(args):
    longest = max(args.lengths)
    model = load(context=2 * longest)
    for length in args.lengths:
        for name in args.method:
            if name == "full" and length > args.longest_full:
                continue
            method = registry.parse(name, budget=args.budget)
            runs = [once(model, method, length) for _ in range(args.repeats + 1)]
            wall, cpu = (min(times) for times in zip(*runs[1:], strict=True))
            yield {
                "part": "prefill",
                "method": name,
                "budget": args.budget,
                "length": length,
                "wall_microseconds_a_token": wall / length * 1e6,
                "cpu_microseconds_a_token": cpu / length * 1e6,
            }


def memory(args):
    """One prompt, chunk by chunk: the peak of this process so far, at each length."""
    model, (name,) = load(), args.method
    method, chunk = registry.parse(name, budget=args.budget), 512
    lengths = np.full((1,), chunk, np.int32)
    text = load().tokenizer.encode(embedded.heldout_text())
    text = np.array(text, np.int32)
    reading = reader.begin(model.decoder, method, 1, max(args.lengths), 1)
    start = time.perf_counter()
    cpu = time.process_time()
    for done in range(0, max(args.lengths), chunk):
        where = np.arange(done, done + chunk) % len(text)
        part = text[None, where], lengths
        reading = reader.read(model, method, reading, [part])
        if done + chunk in args.lengths:
            jax.block_until_ready(reading)
            yield {
                "part": "memory",
                "method": name,
                "budget": args.budget,
                "length": done + chunk,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "state_bytes": buffers.num_bytes(reading.states),
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }


PARTS = {
    "retrieval": retrieval,
    "perplexity": perplexity,
    "prefill": prefill_times,
    "memory": memory,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--method", action="append", help="may be repeated")
    parser.add_argument("--budget", type=int, default=512, help="where left out")
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--longest-full", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="file to add to")
    args = parser.parse_args(argv)
    args.method = args.method or ["streaming_llm", "cascade"]
    for entry in PARTS[args.part](args):
        print(json.dumps(files.json_ready(entry)), flush=True)
        if args.json is not None:
            add(args.json, entry)


if __name__ == "__main__":
    main()
