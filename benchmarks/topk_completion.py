r"""Top-k retrieval with and without completion, on an embedded model.

    python benchmarks/topk_completion.py quality --windows 8 --n 24 \
        --json benchmarks/results/2026-11-21-topk-completion.json
    python benchmarks/topk_completion.py overhead --json (the same file)
    python benchmarks/topk_completion.py figure --json (the same file) --out gain.png

Quality: every method starts from one and the same prefill, whose attention is exact.
Then, a token at a time: the relative L2 error of each head's output, all layers fed
what full attention gives them; the perplexity of the text that follows; pass keys and
multi-key questions. Budgets are shares of the context in token equivalents, summary and
map counted at every step, or once a request. The selector is an oracle: no
speed is claimed for it. Overhead: a layer's decode step at 32K tokens, selection alone
and completed in turns.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics as plain
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from entries import add

import models
from kvjax import dense, files, registry
from kvjax.decoding import finite, loop
from kvjax.decoding.reader import prefill
from kvjax.evaluation import statistics
from kvjax.evaluation.tasks import haystack, needles
from kvjax.interface import CacheSpec, Method
from kvjax.methods.topk_completion import linear_attention
from kvjax.rope import Rope
from kvjax.stores import contiguous
from models import embedded

SEED = 40_000
CONTEXT = 4096
SHARES = (0.01, 0.02, 0.04)
FEATURES = {
    "selection": "lam=0",
    "anchor": "feature_map=anchor",
    "anchor, once a request": "feature_map=anchor,charge=request",
    "mean": "feature_map=mean",
    "learned": "feature_map={map}",
    "learned, once a request": "feature_map={map},charge=request",
}
# Whose perplexity and answers are measured too: those need the whole model.
ASKED = ("selection", "anchor", "mean", "learned")
SINKS, TAIL = 4, 16


class Recorded(NamedTuple):
    """Full attention's state, and what its decode steps saw and said."""

    store: contiguous.Contiguous
    k: jax.Array  # (B, Hkv, steps, D), un-rotated
    v: jax.Array
    q: jax.Array  # (B, Hq, steps, D)
    out: jax.Array
    entropy: jax.Array  # (B, Hq), of the middle's weights over log |M|; a sum
    count: jax.Array


def recording(full: Method) -> Method:
    def put(buffer, row, state):
        return jax.lax.dynamic_update_slice(buffer, row, (0, 0, state.count, 0))

    def append(state, k, v):
        store = full.append(state.store, k, v)
        held = {"k": put(state.k, k, state), "v": put(state.v, v, state)}
        return state._replace(store=store, **held)

    def inspect_step(state, q):
        weights = dense.weights(state.store, q)[:, :, 0]
        store, out, found = full.inspect_step(state.store, q)
        slots = jnp.arange(weights.shape[-1], dtype=jnp.int32)
        last = state.store.length[:, None, None] - state.count - 1 - TAIL
        inside = (slots >= SINKS) & (slots < last)
        p = jnp.where(inside, weights, 0.0)
        p = p / p.sum(-1, keepdims=True)
        logs = jnp.log(jnp.where(p > 0, p, 1.0))
        entropy = -(p * logs).sum(-1) / jnp.log(inside.sum(-1).astype(jnp.float32))
        new = Recorded(
            store,
            state.k,
            state.v,
            put(state.q, q, state),
            put(state.out, out, state),
            state.entropy + entropy,
            state.count + 1,
        )
        return new, out, found

    return full._replace(append=append, inspect_step=inspect_step)


def recorder(state, steps):
    spec = state.store.spec

    def zeros(heads):
        shape = (spec.batch, heads, steps, spec.head_dim)
        return jnp.zeros(shape, jnp.float32)

    kv, q = zeros(spec.num_kv_heads), zeros(spec.num_q_heads)
    entropy = jnp.zeros((spec.batch, spec.num_q_heads), jnp.float32)
    return Recorded(state.store, kv, kv, q, q, entropy, jnp.int32(0))


def judged(logits, index, memory, given):
    tokens = given[:, index]
    return tokens, memory, finite.likelihood(logits, tokens)


JUDGED = loop.Rule(judged)


@functools.partial(jax.jit, static_argnames=("decoder", "method"))
def forced(decoder, method, params, states, last, tokens):
    """Log-probability of each given token, whether it is likeliest, final states."""
    batch, steps = tokens.shape
    window, _, first = loop.choose_first(
        JUDGED,
        decoder,
        params,
        last,
        jnp.zeros((batch, method.rows), jnp.int32),
        None,
        tokens,
    )
    taken = loop.take_steps(
        JUDGED,
        decoder,
        method,
        steps,
        params,
        states,
        window,
        None,
        jnp.roll(tokens, -1, axis=1),
        jnp.int32(steps),
    )
    # What the last step says is of no token that is given.
    found = jax.tree.map(
        lambda x, rest: jnp.concatenate([x[None], rest[:-1]]).T, first, taken.kept[0]
    )
    return *found, taken.states


@functools.partial(jax.jit, static_argnames="method")
def output_errors(method, states, seen):
    """Relative L2 error of each head's output, mean over the recorded steps."""

    def step(state, inputs):
        q, k, v, expected = (x[:, :, None] for x in inputs)
        state, out = method.decode_step(method.append(state, k, v), q)
        gap = jnp.linalg.norm(out - expected, axis=-1)
        return state, (gap / jnp.linalg.norm(expected, axis=-1))[..., 0]

    def of_row(given):
        state, seen = given
        inputs = [jnp.moveaxis(x, 2, 0) for x in seen]
        return jax.lax.scan(step, state, inputs)[1].mean(0)

    given = tuple(x[:, None] for x in (seen.q, seen.k, seen.v, seen.out))
    return jax.lax.map(of_row, (states, given))[:, 0]


@functools.partial(jax.jit, static_argnames=("decoder", "method"))
def forced_alone(decoder, method, params, states, last, tokens):
    """Does as `forced`, each row a batch of one: what a map costs is not shared."""

    def of_row(given):
        return forced(decoder, method, params, *given)[:2]

    found = jax.lax.map(of_row, (states, last[:, None], tokens[:, None]))
    return tuple(x[:, 0] for x in found)


@functools.partial(jax.jit, static_argnames="finish")
def finished(finish, states):
    return jax.lax.map(finish, states)


def with_spec(state, **changes):
    spec = dataclasses.replace(state.store.spec, **changes)
    return state._replace(store=state.store._replace(spec=spec))


class Prompts:
    """A batch read once, and how every method goes on from there."""

    def __init__(self, model, methods, prompts, steps):
        self.model, self.methods, self.steps = model, methods, steps
        reader = next(m for (_, name), m in methods.items() if name == "anchor")
        reader = reader._replace(finish=lambda state: state)
        read = prefill(model, reader, prompts, max_new_tokens=steps, chunk_size=1024)
        self.layers, self.last = read.states, read.hidden

    def full(self, tokens):
        states = tuple(
            recorder(with_spec(state, layer=0), self.steps) for state in self.layers
        )
        method = RECORDING
        given = self.model.params, states, self.last, tokens
        return forced(self.model.decoder, method, *given)

    def begun(self, key):
        """Each layer's states at the prompt's end, a batch of one for every row."""
        method = self.methods[key]

        def of_layer(state):
            spec = dataclasses.replace(state.store.spec, batch=1)
            own = method.init(spec)  # a map's networks are the layer's
            rows = jax.tree.map(lambda x: x[:, None], (state.store, state.queries))
            of_map = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (len(self.last), *x.shape)),
                (own.weights, own.gain),
            )
            queries = None if own.queries is None else rows[1]
            state = type(own)(rows[0], queries, *of_map)
            return finished(method.finish, with_spec(state, batch=1, layer=0))

        return tuple(of_layer(state) for state in self.layers)

    def after(self, key, tokens):
        given = self.model.params, self.begun(key), self.last, tokens
        return forced_alone(self.model.decoder, self.methods[key], *given)

    def errors(self, key, seen):
        every = jax.tree.map(lambda *x: jnp.concatenate(x), *self.begun(key))
        return output_errors(self.methods[key], every, seen)


def methods_of(feature_map, spec):
    """Those that fit: the smallest budget may not hold a map's networks."""
    found = {}
    for share, (name, options) in itertools.product(SHARES, FEATURES.items()):
        budget = linear_attention.budget_tokens(CONTEXT, share)
        options = options.format(map=feature_map)
        method = registry.parse(f"topk_completion:budget={budget},{options}")
        try:
            jax.eval_shape(lambda method=method: method.init(spec))
        except ValueError as error:
            print(f"{name} at {share:.0%}: {error}", file=sys.stderr)
            continue
        found[share, name] = method
    return found


RECORDING = recording(registry.parse("full"))


def quality(args):
    model, text = (
        models.load(embedded.DEFAULT, dtype="float32"),
        embedded.heldout_text(),
    )
    start, layers = time.perf_counter(), model.decoder.num_layers
    spec = dataclasses.replace(
        model.decoder.cache_spec(1, CONTEXT), max_new_tokens=args.steps
    )
    methods = methods_of(args.map, spec)
    errors = {key: [] for key in methods}
    entropies, nats = [], {key: [] for key in (None, *methods)}
    windows = needles.windows(
        model.tokenizer, text, context=CONTEXT, n=args.windows, seed=SEED
    )
    for first in range(0, args.windows, args.batch):
        rows = windows[first : first + args.batch]
        ahead = np.array([row[CONTEXT - args.steps :] for row in rows], np.int32)
        prompts = [row[: CONTEXT - args.steps] for row in rows]
        read = Prompts(model, methods, prompts, args.steps)
        found, _, states = read.full(ahead)
        nats[None].append(np.asarray(found))
        seen = [jnp.concatenate(x) for x in zip(*(s[1:6] for s in states), strict=True)]
        seen = Recorded(None, *seen, None)
        entropies.append(np.asarray(seen.entropy).reshape(layers, len(rows), -1))
        for key in methods:
            error = np.asarray(read.errors(key, seen))
            errors[key].append(error.reshape(layers, len(rows), -1))
            if args.n and key[1] in ASKED:
                nats[key].append(np.asarray(read.after(key, ahead)[0]))
        log(f"windows {first + len(rows)}", start)
    entropy = np.concatenate(entropies, axis=1).mean(1) / args.steps  # (L, Hq)

    scores = {key: {} for key in nats}
    for task in (needles.passkey, needles.multikey) if args.n else ():
        room = CONTEXT - args.steps
        examples = task(model.tokenizer, text, context=room, n=args.n, seed=SEED)
        for first in range(0, args.n, args.batch):
            part = examples[first : first + args.batch]
            # Greedy decoding is right where every token of the answer is likeliest.
            whole = [haystack.whole(model.tokenizer, e) for e in part]
            answers = [w[len(e.prompt) :] for w, e in zip(whole, part, strict=True)]
            ahead = np.zeros((len(part), args.steps), np.int32)
            for row, answer in zip(ahead, answers, strict=True):
                row[: len(answer)] = answer
            read = Prompts(model, methods, [e.prompt for e in part], args.steps)
            for key in scores:
                if key is not None and key[1] not in ASKED:
                    continue
                found = read.full(ahead) if key is None else read.after(key, ahead)
                right = np.asarray(found[1])
                whole = [
                    bool(x[: len(a)].all()) for x, a in zip(right, answers, strict=True)
                ]
                scores[key].setdefault(task.__name__, []).extend(whole)
        log(task.__name__, start)

    def entry(key):
        about = {}
        if nats[key]:
            log_probs = np.concatenate(nats[key]).astype(np.float64).mean(1)
            exact = np.concatenate(nats[None]).astype(np.float64).mean(1)
            about["perplexity"] = statistics.perplexity(log_probs)._asdict()
            lost = statistics.paired_difference(exact, log_probs)
            about["nats_lost"] = lost._asdict()
        for name, found in scores[key].items():
            about[name] = statistics.wilson(int(sum(found)), len(found))._asdict()
        if key is not None:
            error = np.concatenate(errors[key], axis=1)  # (L, windows, Hq)
            by_window = error.mean((0, 2))
            alone = np.concatenate(errors[key[0], "selection"], axis=1).mean((0, 2))
            about |= {
                "share": key[0],
                "budget": linear_attention.budget_tokens(CONTEXT, key[0]),
                "name": key[1],
                "error": statistics.amount_interval(by_window)._asdict(),
                "error_saved": statistics.mean_interval(alone - by_window)._asdict(),
                "error_by_head": error.mean(1).tolist(),
            }
        return about

    yield {
        "part": "quality",
        "model": model.name,
        "map": args.map,
        "context": CONTEXT,
        "steps": args.steps,
        "windows": args.windows,
        "n": args.n,
        "entropy_by_head": entropy.tolist(),
        "full": entry(None),
        "methods": [entry(key) for key in methods],
        "seconds": round(time.perf_counter() - start, 1),
    }


def log(what, start):
    seconds = time.perf_counter() - start
    print(f"{what}, {seconds:.0f} s", file=sys.stderr, flush=True)


def overhead(args):
    """Seconds of a layer's decode step, the methods in turns."""
    length, steps = args.length, 64
    retrieved = linear_attention.budget_tokens(length, 0.01)
    rng = np.random.default_rng(0)
    for selector in ("oracle", "pages"):
        runs = {}
        for name, options in (("selection", "lam=0"), ("anchor", "feature_map=anchor")):
            method = registry.parse(
                f"topk_completion:budget={retrieved + 20},charge=none,"
                f"selector={selector},{options}"
            )
            spec = CacheSpec(1, 4, 2, 64, length + steps, "float32", Rope(64), steps)
            state = method.init(spec)

            def extended(*inputs, method=method):
                return method.prefill(*inputs)[0]  # XLA drops the attention

            read = jax.jit(extended, donate_argnums=0)
            for _ in range(length // 1024):
                q, k, v = (
                    jnp.asarray(rng.standard_normal((1, h, 1024, 64)), jnp.float32)
                    for h in (4, 2, 2)
                )
                state = read(state, q, k, v, jnp.full((1,), 1024, jnp.int32))
            state = jax.jit(method.finish, donate_argnums=0)(state)

            def step(state, x, method=method):
                return method.decode_step(method.append(state, x[:, :2], x[:, 2:4]), x)

            x = jnp.asarray(rng.standard_normal((1, 4, 1, 64)), jnp.float32)
            compiled = jax.jit(step, donate_argnums=0)
            traffic = method.traffic(spec, length)
            runs[name] = [compiled, jax.block_until_ready(compiled(state, x))[0], x, []]
            runs[name].append(traffic)
        for _ in range(args.repeats):
            for run in runs.values():
                begin = time.perf_counter()
                run[1], out = run[0](run[1], run[2])
                jax.block_until_ready(out)
                run[3].append(time.perf_counter() - begin)
                run[1] = run[1]._replace(store=reset(run[1].store, length))
        times = {name: plain.median(run[3]) for name, run in runs.items()}
        ratios = [
            b / a for a, b in zip(*(run[3] for run in runs.values()), strict=True)
        ]
        yield {
            "part": "overhead",
            "selector": selector,
            "length": length,
            "retrieved": retrieved,
            "repeats": args.repeats,
            "median_milliseconds": {n: 1e3 * t for n, t in times.items()},
            "least_milliseconds": {n: 1e3 * min(r[3]) for n, r in runs.items()},
            "median_ratio": plain.median(ratios),
            "ratio_of_least": min(runs["anchor"][3]) / min(runs["selection"][3]),
            "bytes": {n: run[4]._asdict() for n, run in runs.items()},
        }


def reset(store, length):
    """Back to the prompt's end, so that every step is the same."""
    return store._replace(length=jnp.full_like(store.length, length))


def figure(args):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    document = json.loads(args.json.read_text(encoding="utf-8"))
    found = [x for x in document["entries"] if x["part"] == "quality"][-1]
    entropy = np.array(found["entropy_by_head"])
    shares = sorted({method["share"] for method in found["methods"]})
    figure, axes = pyplot.subplots(1, len(shares), figsize=(10, 3.4), sharey=True)
    by_key = {(m["share"], m["name"]): m for m in found["methods"]}
    for share, axis in zip(shares, axes, strict=True):
        alone = np.array(by_key[share, "selection"]["error_by_head"])
        gain = alone - np.array(by_key[share, args.name]["error_by_head"])
        for layer in range(len(gain)):
            axis.scatter(entropy[layer], gain[layer], s=24, label=f"layer {layer}")
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_title(
            f"budget {share:.0%}: {by_key[share, args.name]['budget']} tokens"
        )
        axis.set_xlabel("entropy of the middle / log |M|")
        rank = statistics_of_ranks(entropy.ravel(), gain.ravel())
        axis.text(0.04, 0.92, f"rank correlation {rank:.2f}", transform=axis.transAxes)
    axes[0].set_ylabel("relative error saved by completion")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=150)
    yield {"part": "figure", "file": str(args.out)}


def statistics_of_ranks(a, b):
    """Spearman's correlation."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


PARTS = {"quality": quality, "overhead": overhead, "figure": figure}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--n",
        type=int,
        default=24,
        help="questions of each task; 0 measures errors alone",
    )
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=32768, help="of overhead")
    parser.add_argument("--repeats", type=int, default=200, help="of overhead")
    parser.add_argument(
        "--map", default=embedded.DEFAULT, help="the learned map: a name or a file"
    )
    parser.add_argument("--name", default="anchor", help="what the figure shows")
    parser.add_argument("--json", type=pathlib.Path, help="file to add to")
    parser.add_argument("--out", type=pathlib.Path, help="file of the figure")
    args = parser.parse_args(argv)
    for entry in PARTS[args.part](args):
        print(json.dumps(files.json_ready(entry)), flush=True)
        if args.json is not None and args.part != "figure":
            add(args.json, entry)


if __name__ == "__main__":
    main()
