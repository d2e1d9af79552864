"""Prompts read for many methods at once, and for each alone: the same ones, in one run.

    python benchmarks/together.py --model smollm2 --context 4096

As `kvjax compare` reads them. Every program is compiled first; then seconds, of the
clock and of the processor, of all methods together and of one after the other.
"""

import argparse
import json
import time

import jax
import numpy as np

import models
from kvjax import registry
from kvjax.cli.compiled import keep_compiled_code
from kvjax.cli.options import share_heaps, with_budget
from kvjax.evaluation import together
from models import embedded

NEW = 64  # tokens that there is room for behind a prompt
# Eleven whose prompt is exact: those that `kvjax compare` has, and one more.
METHODS = ("full", "h2o", "oracle_topk", "quest", "refreshkv", "snapkv")
METHODS += ("token_select", "topk_completion", "tova", "retro+quest")
METHODS += ("expected_attention",)


def prompts_of(model, context, rows):
    """Windows of held-out text, of `context` tokens with what is decoded."""
    tokens = model.tokenizer.encode(embedded.heldout_text())
    size = context - NEW
    return [tokens[i * size : (i + 1) * size] for i in range(rows)]


def read(model, specs, prompts):
    """Reads the prompts; returns seconds of the clock and of the processor."""
    methods = [registry.parse(spec) for spec in specs]
    wall, cpu = time.perf_counter(), time.process_time()
    found = together.read(model, methods, prompts, max_new_tokens=NEW)
    jax.block_until_ready(found._read)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    found.drop()
    return np.array(spent)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="name or folder")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2, help="prompts of a batch")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args(argv)
    share_heaps()
    keep_compiled_code()
    model = models.load(args.model, dtype="float32")
    specs = [with_budget(name, args.context // 8) for name in args.methods]
    prompts = prompts_of(model, args.context, args.rows)
    for chosen in (specs, *([spec] for spec in specs)):
        read(model, chosen, prompts)  # compiles
    alone = np.sum([read(model, [spec], prompts) for spec in specs], axis=0)
    all_at_once = read(model, specs, prompts)
    print(
        json.dumps(
            {
                "model": args.model,
                "methods": specs,
                "tokens": [len(prompt) for prompt in prompts],
                "seconds, processor seconds": {
                    "together": all_at_once.round(2).tolist(),
                    "alone": alone.round(2).tolist(),
                    "ratio": (alone / all_at_once).round(2).tolist(),
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
