"""Many prompts through one batch: rows that take the next prompt, and static batches.

    python benchmarks/serving.py --model smollm2 --json FILE

Prompts of held-out text, 32 to 2,000 tokens by the logarithm, in the order in which
they were drawn; each answer ends by a token of the model's or at `--new-tokens`. Both
ways say the same, which is checked; each runs once before it is timed, so that nothing
compiles. A static batch reads its prompts together and waits for its longest answer.
"""

import argparse
import json
import math
import pathlib
import time

import jax
import numpy as np

import models
from kvjax import files, registry
from kvjax.cli.compiled import keep_compiled_code
from kvjax.cli.options import share_heaps
from kvjax.decoding import generate, serving
from models import embedded


def drawn(model, args):
    """Prompts of many lengths, and how many tokens each answer may have."""
    rng = np.random.default_rng(args.seed)
    tokens = model.tokenizer.encode(embedded.heldout_text())
    low, high = math.log(args.shortest), math.log(args.longest)
    sizes = np.exp(rng.uniform(low, high, args.n)).astype(int).tolist()
    starts = rng.integers(0, len(tokens) - args.longest, args.n).tolist()
    return [tokens[i : i + size] for i, size in zip(starts, sizes, strict=True)]


def in_static_batches(model, method, prompts, options, args):
    """Continues `batch` prompts after the other, all with room for the longest."""
    found = []
    for start in range(0, len(prompts), args.batch):
        group = prompts[start : start + args.batch]
        found += generate.generate(model, method, group, **options)
    return found


def in_rows(model, method, prompts, options, args):
    """Continues them all by :func:`kvjax.decoding.serving.serve_rows`."""
    served = serving.serve_rows(model, method, prompts, batch=args.batch, **options)
    return [said for _, said in sorted(served)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded-softmax", help="name or folder")
    parser.add_argument("--method", default="full")
    parser.add_argument("--n", type=int, default=200, help="prompts")
    parser.add_argument("--shortest", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--longest", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    args = parser.parse_args(argv)
    share_heaps()
    keep_compiled_code()
    model = models.load(args.model, dtype="float32")
    method = registry.parse(args.method)
    prompts = drawn(model, args)
    options = {
        "max_new_tokens": args.new_tokens,
        "eos_ids": [*model.eos_ids, *model.tokenizer.encode("\n")],
    }
    seconds, said = {}, {}
    for way in (in_static_batches, in_rows):
        way(model, method, prompts, options, args)  # compiles
        start = time.perf_counter()
        said[way.__name__] = way(model, method, prompts, options, args)
        seconds[way.__name__] = round(time.perf_counter() - start, 2)
    static, rows = (
        [row.tokens for row in said[way.__name__]]
        for way in (in_static_batches, in_rows)
    )
    tokens = sum(map(len, rows))
    document = vars(args) | {
        "json": None,
        "jax": jax.__version__,
        "prompt_tokens": sum(map(len, prompts)),
        "tokens": tokens,
        "same_answers": sum(a == b for a, b in zip(static, rows, strict=True)),
        "seconds": seconds,
        "ratio": round(seconds["in_static_batches"] / seconds["in_rows"], 2),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if args.json is not None:
        files.write_text(args.json, text + "\n")


if __name__ == "__main__":
    main()
