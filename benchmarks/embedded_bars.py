"""Bars of the embedded models: retrieval at length, chains, bits per byte.

Every number comes with its n and its 95% interval. Answers are decoded greedily under
full attention; with --forced the right tokens are fed in one pass and compared with the
greedy choices, which scores the same in less time.

    python benchmarks/embedded_bars.py --model embedded-softmax --n 100 --json bars.json
"""

import argparse
import functools
import json
import pathlib
import time

import jax
from rich.console import Console
from rich.table import Table

import kvjax
import models
from kvjax import files
from kvjax.cli.progress import show_progress
from kvjax.evaluation import compare_runs, statistics, teacher_forced
from kvjax.evaluation.tasks import chain, needles
from kvjax.interface import layer_specs
from kvjax.text import encoding
from kvjax.training.attention import by_layer, causal_attention
from models import embedded

# name, task, context in tokens, the least that is wanted
TASKS = (
    ("pass key", needles.passkey, 1024, 0.98),
    ("pass key", needles.passkey, 4096, 0.95),
    ("multi-key, 8 keys", functools.partial(needles.multikey, keys=8), 4096, 0.9),
    ("chain, 5 links", functools.partial(chain.chain_of_key, links=5), 2048, 0.8),
)
# Far from the small seeds that training and the commands' defaults use.
SEED = 20_000


def measure(model, text, args, progress):
    """One entry a bar, ready for JSON."""
    attention = by_layer(
        causal_attention(spec.rope, alpha=spec.alpha, sm_scale=spec.sm_scale)
        for spec in layer_specs(model.decoder, 1, 1)
    )
    full = kvjax.full()
    entries = []

    def entry(name, context, interval, start, bar=None, **more):
        seconds = round(time.perf_counter() - start, 1)
        about = {"task": name, "context": context, "wanted": bar, "seconds": seconds}
        entries.append(about | interval._asdict() | more)

    for name, make, context, bar in TASKS:
        context = context if args.context is None else args.context
        start = time.perf_counter()
        examples = make(
            model.tokenizer, text, context=context, n=args.n, seed=args.seed
        )
        update = functools.partial(progress, f"{name} at {context:,}")
        if args.forced:
            answers = teacher_forced.answers(
                model, attention, examples, batch=args.batch, progress=update
            )
            scores = [e.score(x) for e, x in zip(examples, answers, strict=True)]
        else:
            (answered,) = compare_runs.retrieve(
                model,
                [full],
                examples,
                new_tokens=max(e.answer_tokens for e in examples) + 2,
                batch=args.batch,
                chunk_size=1024,
                progress=update,
            )
            scores = answered.scores
        interval = statistics.proportion(scores)
        if isinstance(examples[0], chain.Chain):
            interval = statistics.share_interval(scores)
        how = "forced" if args.forced else "greedy"
        entry(name, context, interval, start, bar, how=how, scores=scores)

    start = time.perf_counter()
    context = args.bits_context
    encode = model.tokenizer.encode
    room = context - len(encoding.added(encode).before)
    available = len(encoding.inside(encode, text)) // room
    windows = needles.windows(
        model.tokenizer,
        text,
        context=context,
        n=min(args.n, available),
        seed=args.seed,
    )
    name = "bits per byte, held-out text"
    interval = teacher_forced.bits_per_byte(
        model,
        attention,
        windows,
        batch=args.batch,
        progress=functools.partial(progress, name),
    )
    entry(name, context, interval, start, how="forced")
    return entries


def show(title, entries):
    table = Table(title=title, title_justify="left")
    for heading in ("task", "context", "measured", "95% interval", "n", "wanted", "s"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for entry in entries:
        wanted = "" if entry["wanted"] is None else f">= {entry['wanted']}"
        table.add_row(
            entry["task"],
            f"{entry['context']:,}",
            f"{entry['mean']:.3f}",
            f"{entry['low']:.3f} to {entry['high']:.3f}",
            str(entry["n"]),
            wanted,
            f"{entry['seconds']:.0f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=100)).print(table)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=embedded.DEFAULT, help="name or folder")
    parser.add_argument("--n", type=int, default=100, help="examples of each task")
    parser.add_argument("--batch", type=int, default=8, help="rows together")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--context", type=int, help="of every task, for a quick look")
    parser.add_argument("--bits-context", type=int, default=2048)
    parser.add_argument("--forced", action="store_true", help="feed the right tokens")
    parser.add_argument("--json", type=pathlib.Path, help="file for the numbers")
    args = parser.parse_args(argv)
    model = models.load(args.model, dtype="float32")
    with show_progress() as progress:
        entries = measure(model, embedded.heldout_text(), args, progress)
    show(model.name, entries)
    if args.json is not None:
        device = jax.devices()[0]
        about = {
            "model": model.name,
            "seed": args.seed,
            "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
            "jax": jax.__version__,
            "device": f"{device.device_kind} ({device.platform})",
        }
        document = files.json_ready(about | {"bars": entries})
        files.write_text(args.json, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
