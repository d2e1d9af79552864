r"""RetroAttention against Quest and full attention, on an embedded model.

    python benchmarks/retro.py text --n 6 --context 2048 --new-tokens 1280 --json F
    python benchmarks/retro.py lost --json F
    python benchmarks/retro.py chain --n 20 --context 2048 --links 20 --json F
    python benchmarks/retro.py extraction --model embedded-refreshkv --n 20 --json F
    python benchmarks/retro.py questions --n 20 --context 2048 --keys 12 --json F
    python benchmarks/retro.py bytes --json F
    python benchmarks/retro.py time --json F

Each call adds its part to the file. Every method reads the same pages a step: a share
of the tokens so far, at least 256, and all layers are sparse. Text: held-out text fed
token by token; perplexity by position, how far the keys that stay behind are from those
of full attention, a layer at a time, and what revising did. Lost: the text's entries of
the file against each other. Chain and extraction: long answers from a list, links or
rows. Questions: keys hidden in one prompt, all asked for, one after the other; the
questions are fed, the answers decoded. Bytes: of a layer of an 8B model. Time: a decode
step, in turns. One file: all parts are against the same baselines, by the same pages.
"""

import argparse
import functools
import json
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from entries import add

import kvjax
import models
from kvjax import accounting, files, registry
from kvjax.decoding import finite, loop
from kvjax.decoding.reader import prefill
from kvjax.evaluation import statistics
from kvjax.evaluation.claims.measure import steps as measure_steps
from kvjax.evaluation.tasks import chain, extraction, haystack
from kvjax.evaluation.tasks import needles as tasks_needles
from kvjax.evaluation.tasks.words import WORDS
from kvjax.methods.retro import history
from kvjax.rope import Rope
from kvjax.stores import paged
from models import embedded

SEED = 60_000
BUCKET = 512
STEPS = 256  # between two looks of the host
QUEST = "quest:budget={budget},budget_ratio={ratio}"
PAGE = 16  # quest's default


def named(args):
    """Name and method: full, quest, and retro of every window."""
    inner = QUEST.format(budget=args.budget, ratio=args.ratio)
    specs = {"full": "full", "quest": inner}
    specs |= {f"retro {w}": f"retro:window={w}+{inner}" for w in args.windows}
    chosen = args.only or specs
    return {name: registry.parse(specs[name]) for name in chosen}


def judged(logits, index, memory, given):
    tokens = given[:, index]
    return tokens, memory, finite.log_prob(logits, tokens)


def revised(before, after):
    """What revising did in each layer of a step."""
    layers = [told(*pair) for pair in zip(before, after, strict=True)]
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


JUDGED = loop.Rule(judged)
REVISED = loop.Rule(judged, watch=revised)


def told(before, after):
    length = after.store.length
    moved = history.revision(before.window, after.window, length, PAGE)
    return {
        "seen": history.num_seen(after.window, length, PAGE),
        "correction": moved.correction.mean(1),
        "new_pages": moved.new_pages.mean(1),
    }


def text(args):
    model = models.load("embedded-softmax", dtype="float32")
    windows = tasks_needles.windows(
        model.tokenizer,
        embedded.heldout_text(),
        context=args.context,
        n=args.n,
        seed=SEED,
    )
    before = args.context - args.new_tokens
    rows = np.array(windows, np.int32)
    truth = whole_keys(model, rows[:, :-1])
    for name, method in named(args).items():
        start = time.perf_counter()
        states, _, recent, *_ = prefill(
            model,
            method,
            [row[:before] for row in windows],
            max_new_tokens=args.new_tokens,
        )
        parts, run = [], loop.steps(REVISED if method.rows > 1 else JUDGED)
        window = loop.pushed(recent, jnp.asarray(rows[:, before]))
        for first in range(before, args.context - 1, STEPS):
            taken = run(
                model.decoder,
                method,
                STEPS,
                model.params,
                states,
                window,
                None,
                jnp.asarray(
                    np.pad(rows, ((0, 0), (0, STEPS)))[:, first + 1 :][:, :STEPS]
                ),
                np.int32(min(STEPS, args.context - 1 - first)),
            )
            states, window, count = taken.states, taken.window, int(taken.taken)
            parts.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], taken.kept))
        likely, found = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        likely = likely.T.astype(np.float64)  # windows, steps
        finished = slice(before, args.context - max(args.windows))
        entry = {
            "part": "text",
            "method": name,
            "context": args.context,
            "prompt": before,
            "windows": args.n,
            "perplexity": statistics.perplexity(likely.mean(1))._asdict(),
            "nats_by_window": (-likely.mean(1)).tolist(),
            "bucket": BUCKET,
            "nats_by_position": [
                float(-likely[:, i : i + BUCKET].mean())
                for i in range(0, likely.shape[1], BUCKET)
            ],
            "key_error_by_layer": key_errors(method, states, truth, finished),
            "bytes_read": accounting.bytes_read(method, model.decoder, args.context),
        }
        if method.rows > 1:
            seen = found["seen"]  # steps, layers, B, lists, rows
            entry |= {
                "exposure": history.exposure(seen).tolist(),
                "exposure_of_last_by_layer": [
                    float(history.exposure(seen[:, layer])[-1])
                    for layer in range(seen.shape[1])
                ],
                # Of the token that was decoded one step before.
                "new_pages_by_layer": last_mean(found["new_pages"]),
            }
            if method.rows > 2:  # else it leaves the window: its output is not kept
                entry["correction_by_layer"] = last_mean(found["correction"])
        yield entry | {"seconds": round(time.perf_counter() - start, 1)}


def lost(args):
    """Nats a token of the file's text entries above those of full and quest."""
    entries = json.loads(args.json.read_text(encoding="utf-8"))["entries"]
    found = {e["method"]: e for e in entries if e["part"] == "text"}
    for name, entry in found.items():
        for other in {"full", "quest"} & set(found) - {name}:
            above = statistics.paired_difference(
                entry["nats_by_window"], found[other]["nats_by_window"]
            )
            yield {
                "part": "lost",
                "method": name,
                "against": other,
                "nats_above": above._asdict(),
                "nats_above_by_position": [
                    mine - theirs
                    for mine, theirs in zip(
                        entry["nats_by_position"],
                        found[other]["nats_by_position"],
                        strict=True,
                    )
                ],
            }


def last_mean(values):
    """`(steps, layers, B, R)` to the newest past row's mean, a layer each."""
    newest = np.moveaxis(values[..., -1], 1, 0).reshape(values.shape[1], -1)
    return np.nanmean(newest, axis=1).tolist()


def whole_keys(model, rows):
    states = prefill(model, kvjax.full(), rows.tolist(), max_new_tokens=1).states
    return [np.asarray(state.k)[:, :, : rows.shape[1]] for state in states]


def key_errors(method, states, truth, finished):
    """Mean relative L2 distance of the keys of decoded tokens from the dense ones."""
    errors = []
    for state, expected in zip(states, truth, strict=True):
        if method.rows > 1:
            state = state.store
        keys = paged.views(state)[0] if hasattr(state, "pages") else state.k
        kept, true = np.asarray(keys)[:, :, finished], expected[:, :, finished]
        gap = np.linalg.norm(kept - true, axis=-1) / np.linalg.norm(true, axis=-1)
        errors.append(float(gap.mean()))
    return errors


def chains(args):
    make = functools.partial(chain.chain_of_key, links=args.links)
    yield from answers(args, "chain", make, {"links": args.links})


def extractions(args):
    make = functools.partial(extraction.extraction, rows=args.rows)
    yield from answers(args, "extraction", make, {"rows": args.rows})


def answers(args, part, make, about):
    model = models.load(args.model, dtype="float32")
    text = embedded.heldout_text()
    examples = make(model.tokenizer, text, context=args.context, n=args.n, seed=SEED)
    new_tokens = max(example.answer_tokens for example in examples) + 2

    def scores(method):
        sizes = {"new_tokens": new_tokens, "batch": args.batch}
        (answered,) = compare_runs.retrieve(model, [method], examples, **sizes)
        return answered.scores

    yield from against_quest(args, part, scores, about | {"new_tokens": new_tokens})


class Asked(NamedTuple):
    """Keys hidden in a prompt, and all questions after it with their answers."""

    prompt: list[int]
    after: list[int]
    answer: list[int]  # of each token after the prompt: of which answer it is, or -1


def questions(args):
    model = models.load(args.model, dtype="float32")
    asked = [several_questions(model.tokenizer, args, i) for i in range(args.n)]
    steps = max(len(example.after) for example in asked)
    shape = measure_steps.Shape(args.batch, args.context, steps, BUCKET)
    # The questions are fed and their answers decoded; a row that has ended goes on.
    given = [
        [
            token if answer < 0 else -1
            for token, answer in zip(x.after, x.answer, strict=True)
        ]
        + [-1] * (steps - len(x.after))
        for x in asked
    ]

    def scores(method):
        prompts = [example.prompt for example in asked]
        said = measure_steps.drive(model, method, shape, prompts, given, steps).tokens
        return [share_right(*pair) for pair in zip(asked, said.tolist(), strict=True)]

    yield from against_quest(args, "questions", scores, {"keys": args.keys})


def several_questions(tokenizer, args, index):
    """`keys` facts, evenly apart in held-out text, asked for in another order."""
    rng = np.random.default_rng((SEED, index))
    source = haystack.source(
        tokenizer, embedded.heldout_text(), lambda line: "key" in line
    )
    lines = haystack.cut(source, rng, args.context)
    words = rng.permutation(WORDS)[: args.keys].tolist()
    numbers = haystack.new_numbers(rng, "".join(lines), args.keys)
    facts = [
        (f"key {word} has value ", number)
        for word, number in zip(words, numbers, strict=True)
    ]
    order = rng.permutation(args.keys).tolist()
    needles = haystack.Needles(
        [f"{before}{number}.\n" for before, number in facts],
        np.linspace(0, 1, args.keys).tolist(),
        "\n",
        "".join(f"{facts[i][0]}{facts[i][1]}.\n" for i in order),
    )
    fitted = haystack.fit(tokenizer, lines, source.sizes, needles, args.context)
    encoded = tokenizer.backend.encode(fitted.text + needles.answer)
    first = len(fitted.prompt)
    assert encoded.ids[:first] == fitted.prompt
    answer, at = [-1] * len(encoded.ids), len(fitted.text)
    for number, (before, value) in enumerate(facts[i] for i in order):
        at += len(before)
        for token, (start, end) in enumerate(encoded.offsets):
            if at <= start < end <= at + len(value):
                answer[token] = number
        at += len(value) + len(".\n")
    return Asked(fitted.prompt, encoded.ids[first:], answer[first:])


def share_right(asked, said):
    """The share of the answers of which every token is right."""
    wrong = {
        answer
        for token, right, answer in zip(said, asked.after, asked.answer, strict=False)
        if token != right
    }
    every = set(asked.answer) - {-1}
    return len(every - wrong) / len(every)


def against_quest(args, part, scores, about):
    """An entry a method: its scores, and how far above Quest's they are."""
    baseline = None
    for name, method in named(args).items():
        start = time.perf_counter()
        found = np.array(scores(method))
        if name == "quest":
            baseline = found
        entry = {
            "part": part,
            "model": args.model,
            "method": name,
            "context": args.context,
            "n": args.n,
            "score": statistics.share_interval(found.tolist())._asdict(),
        } | about
        if baseline is not None and name != "quest":
            above = statistics.paired_shares(found, baseline)
            entry["above_quest"] = above._asdict()
        yield entry | {"seconds": round(time.perf_counter() - start, 1)}


def layer_of_8b(context, heads=8):
    return kvjax.CacheSpec(
        batch=1,
        num_q_heads=4 * heads,
        num_kv_heads=heads,
        head_dim=128,
        capacity=context,
        dtype="float32",
        rope=Rope(128),
    )


def compiled_bytes(method, spec):
    """Bytes that the compiled step accesses, append included, by the compiler."""
    state = jax.eval_shape(lambda: method.finish(method.init(spec)))
    rows = method.rows

    def shape(heads):
        return jax.ShapeDtypeStruct((1, heads, rows, spec.head_dim), spec.dtype)

    def step(state, q, k, v):
        return method.decode_step(method.append(state, k, v), q)

    arguments = state, shape(spec.num_q_heads), *[shape(spec.num_kv_heads)] * 2
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    return compiled.cost_analysis()["bytes accessed"]


def num_bytes(args):
    methods = {name: m for name, m in named(args).items() if name != "full"}
    for context in args.contexts:
        whole = layer_of_8b(context)
        read = methods["quest"].traffic(whole, context).total
        counted = counted_more(args, context)
        for name, method in methods.items():
            past, wide = method.rows - 1, 4
            # Written again: outputs, log-sum-exps, keys and values of the past rows.
            written = past * whole.num_q_heads * (whole.head_dim + 1) * wide
            written += past * 2 * whole.num_kv_heads * whole.head_dim * wide
            total = method.traffic(whole, context).total
            yield {
                "part": "bytes",
                "method": name,
                "context": context,
                "read": total,
                "read_over_quest": total / read,
                "read_and_written_over_quest": (total + written) / read,
                "counted_over_quest": 1 + counted.get(method.rows, 0),
            }


def counted_more(args, context):
    """By window: bytes that the compiler counts beyond Quest's, over what Quest reads.

    Of one KV head, as a loop over lists is counted once. A gather is counted as its
    operand, which grows with the cache: of caches of one size and two, with as many
    pages chosen, what does not grow is told from that. What passes between operations,
    such as the logits of more rows, counts as well, though no cache is read for it.
    """
    budget = max(args.budget, int(args.ratio * context)) // PAGE * PAGE
    quest = f"quest:budget={budget}"
    found, least = {}, registry.parse(quest).traffic(layer_of_8b(context, 1), context)
    for window in args.windows:
        one, two = (
            compiled_bytes(registry.parse(f"retro:window={window}+{quest}"), spec)
            - compiled_bytes(registry.parse(quest), spec)
            for spec in (layer_of_8b(context, 1), layer_of_8b(2 * context, 1))
        )
        found[window] = (2 * one - two) / least.total
    return found


def times(args):
    model = models.load("embedded-softmax", dtype="float32")
    tokens = model.tokenizer.encode(embedded.heldout_text())
    steps = 64
    row = np.array(tokens[: args.context], np.int32)
    before = args.context - steps - 1
    methods = named(args)
    runs = {}
    for name, method in methods.items():
        ready = prefill(
            model, method, [row[:before].tolist()], max_new_tokens=steps + 1
        )

        def run(method=method, ready=ready):
            states = jax.tree.map(jnp.copy, ready.states)
            jax.block_until_ready(states)
            window = loop.pushed(ready.recent, jnp.asarray(row[None, before]))
            ahead = row[None, before + 1 :]
            start = time.perf_counter()
            done = loop.steps(LIKELIEST)(
                model.decoder,
                method,
                steps,
                model.params,
                states,
                window,
                None,
                ahead,
                np.int32(steps),
            )
            jax.block_until_ready(done)
            return (time.perf_counter() - start) / steps

        run()
        runs[name] = run
    seconds = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    for name, samples in seconds.items():
        ratios = np.array(samples) / np.array(seconds["quest"])
        yield {
            "part": "time",
            "method": name,
            "context": args.context,
            "steps": steps,
            "repeats": args.repeats,
            "milliseconds_a_token": float(np.median(samples) * 1e3),
            "over_quest": float(np.median(ratios)),
            "over_quest_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        }


def likeliest(logits, index, memory, given):
    return given[:, index], memory, logits.argmax(-1)


LIKELIEST = loop.Rule(likeliest)


PARTS = {
    "text": text,
    "lost": lost,
    "chain": chains,
    "extraction": extractions,
    "questions": questions,
    "bytes": num_bytes,
    "time": times,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--only", nargs="*", help="names of methods, quest first")
    parser.add_argument("--budget", type=int, default=256, help="least tokens read")
    parser.add_argument("--ratio", type=float, default=0.15, help="of those so far")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--contexts", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--new-tokens", type=int, default=1280)
    parser.add_argument("--model", default="embedded-softmax", help="that answers")
    parser.add_argument("--links", type=int, default=20)
    parser.add_argument("--rows", type=int, default=extraction.ROWS)
    parser.add_argument("--keys", type=int, default=12, help="asked for, of a prompt")
    parser.add_argument("--n", type=int, default=6)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path, help="file to add to")
    args = parser.parse_args(argv)
    for entry in PARTS[args.part](args):
        entry |= {"budget": args.budget, "ratio": args.ratio}
        print(json.dumps(files.json_ready(entry)), flush=True)
        if args.json is not None:
            add(args.json, entry)


if __name__ == "__main__":
    main()
