"""EntmaxKV's gains and losses on the embedded entmax model, at long context.

Windows of held-out text, their last tokens fed one by one: output error, dropped mass,
support kept, bytes read and heads proved exact, with Quest and the best possible choice
on the softmax model beside them at the same budgets. Then pass keys, under the same
prompts and budgets. A prompt is read once for all methods of a model, which start from
copies of its cache; entmax over everything is EntmaxKV with room for everything.

    python benchmarks/entmaxkv.py --json entmaxkv.json
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
import models
from kvjax import dense, files
from kvjax.attention import selection
from kvjax.decoding.feeding import CHOOSE, feed
from kvjax.decoding.reader import prefill
from kvjax.evaluation import compare, compare_inputs, compare_rows, fidelity
from kvjax.evaluation.tasks import needles
from kvjax.stores import contiguous
from kvjax.stores import paged as stores_paged
from kvjax.text.stream import continuation
from models import embedded
from pallas_kernels.decode_attention import decode_logits
from pallas_kernels.entmax import entmax
from pallas_kernels.topk import top_k

SEED = 20_000
PAGE = 16


def entmax_methods(context, budget):
    """By label; all share one state, that of the Gaussian selector."""
    entmaxkv = functools.partial(kvjax.entmaxkv, page_size=PAGE)
    every = (-(-context // PAGE) + 4) * PAGE
    found = {"dense": entmaxkv(budget=every)}
    for size in (budget // 2, budget, 2 * budget):
        found[f"topk {size}"] = entmaxkv(budget=size)
    found[f"topk {budget} mean"] = entmaxkv(budget=budget, group_reduce="mean")
    found[f"topk {budget} per query"] = entmaxkv(budget=budget, per="query")
    gaussian = functools.partial(entmaxkv, selector="gaussian")
    for size in (None, budget):
        found[f"gaussian {size}"] = gaussian(budget=size)
    found[f"gaussian {budget} per query"] = gaussian(budget=budget, per="query")
    found["gaussian None quantile 0.5"] = gaussian(budget=None, max_quantile=0.5)
    found[f"certified {budget}"] = entmaxkv(budget=budget, certified=True)
    return found


def best_choice(budget, page_size=1):
    """Entmax over the pages that have most weight: no choice of pages drops less."""
    plain = dense.method()

    def inspect_step(state, q):
        spec = state.spec
        true = dense.weights(state, q)[:, :, 0]
        per_list = selection.reduce_group(true, spec.num_kv_heads, "mean")
        padding = (0, 0), (0, 0), (0, -spec.capacity % page_size)
        paged = jnp.pad(per_list, padding).reshape(*per_list.shape[:2], -1, page_size)
        pages = top_k(paged.sum(-1), budget // page_size)[1]
        kept = stores_paged.tokens_of(pages, page_size, state.length)
        seen = selection.is_listed(kept, spec.capacity)
        seen = jnp.repeat(seen, spec.group, axis=1)[:, :, None]
        rotated, positions = contiguous.rotate_queries(spec, q, state.length)
        logits = decode_logits(rotated, state.k, positions, sm_scale=spec.sm_scale)
        weights = entmax(logits, alpha=spec.alpha, where=seen)
        values = jnp.repeat(state.v, spec.group, axis=1)
        out = jnp.einsum("bhts,bhsd->bhtd", weights, values)
        _, _, diagnostics = plain.inspect_step(state, q)
        exact = jnp.zeros_like(diagnostics.exact)
        return state, out, diagnostics._replace(attended=kept, exact=exact)

    return plain._replace(inspect_step=inspect_step)


def adapted(method, state):
    """The shared state as the method's own: a counter a list, moments if it has any."""
    own = jax.eval_shape(method.init, state.store.spec)
    overflow = jnp.zeros(own.overflow.shape, jnp.int32)
    moments = None if own.moments is None else state.moments
    return state._replace(overflow=overflow, moments=moments)


def whole(state):
    """Every token in one store, whatever the pages."""
    if isinstance(state, contiguous.Contiguous):
        return state
    store = getattr(state, "store", state)
    k, v = stores_paged.views(store)
    size = store.spec.capacity
    return contiguous.Contiguous(
        store.spec, k[:, :, :size], v[:, :, :size], store.length
    )


def side_by_side(model, method, states, tokens):
    """`LayerFidelity` of a method that starts from its own copy of `states`."""
    both = fidelity.side_by_side(kvjax.full(), method)
    fresh = jax.eval_shape(both.init, whole(states[0]).spec)
    started = []
    for state in states:
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), fresh[2:])
        candidate = adapted(method, state) if hasattr(state, "overflow") else state
        started.append(fidelity.SideBySideState(whole(state), candidate, *sums))
    started = jax.tree.map(jnp.copy, tuple(started))
    ended = fidelity.teacher_forced(
        model.decoder, both, model.params, started, jnp.asarray(tokens)
    )
    return fidelity.layers(ended)


def measure_windows(model, groups, args, say, save):
    """`groups`: the method that reads the prompt, and those that go on from there."""
    windows = needles.windows(
        model.tokenizer,
        embedded.heldout_text(),
        context=args.context,
        n=args.windows,
        seed=SEED,
    )
    before = args.context - args.new_tokens
    tokens = np.array([window[before:-1] for window in windows], np.int32)
    settings = compare_inputs.Settings(context=args.context, new_tokens=args.new_tokens)
    entries = []
    for reader, methods in groups:
        if args.only and not set(args.only) & set(methods):
            continue
        prompts = [window[:before] for window in windows]
        states = prefill(
            model, reader, prompts, max_new_tokens=args.new_tokens, chunk_size=512
        ).states
        for label, method in methods.items():
            if args.only and label not in args.only:
                continue
            start = time.perf_counter()
            found = side_by_side(model, method, states, tokens)
            per_layer = {"error": found.error, "dropped": found.dropped}
            entry = {
                "method": label,
                "bytes_measured": compare.measured_bytes(
                    model, method, found, settings
                ),
                "tokens_per_list": float(found.read.mean()),
            }
            for name in ("error", "dropped", "support", "exact"):
                entry[name] = compare_rows.of_windows(found, name)._asdict()
            for name, values in per_layer.items():
                entry[f"{name}_by_layer"] = values.mean((1, 2)).tolist()
            entry["seconds"] = round(time.perf_counter() - start, 1)
            entries.append(entry)
            save(entries)
            say(
                f"{model.name:<18}{label:<30}"
                f"{entry['bytes_measured'] / 1024:>8.0f} KiB  error "
                f"{entry['error']['mean']:.2e}  "
                f"dropped {entry['dropped']['mean']:.2e}  "
                f"support {entry['support']['mean']:.4f}  "
                f"exact {entry['exact']['mean']:.3f}"
            )
    return entries


def measure_keys(model, methods, args, say, save):
    """Pass keys, `batch` at a time, until `n` or out of time."""
    examples = needles.passkey(
        model.tokenizer,
        embedded.heldout_text(),
        context=args.context,
        n=args.n,
        seed=SEED,
    )
    steps = max(example.answer_tokens for example in examples) + 2
    scores = {label: [] for label in methods}
    started = time.perf_counter()
    for first in range(0, len(examples), args.batch):
        group = examples[first : first + args.batch]
        if len(group) < args.batch:
            break
        read = prefill(
            model,
            kvjax.entmaxkv(budget=None, page_size=PAGE, selector="gaussian"),
            [example.prompt for example in group],
            max_new_tokens=steps,
            chunk_size=512,
        )
        for label, method in methods.items():
            states = tuple(adapted(method, state) for state in read.states)
            own = read._replace(states=jax.tree.map(jnp.copy, states))
            wanted = np.full((args.batch, steps), CHOOSE, np.int32)
            tokens = feed(model, method, own, wanted).tokens
            for example, row in zip(group, tokens.tolist(), strict=True):
                row = row[: example.answer_tokens + 2]
                answer = continuation(model.tokenizer.decode, example.prompt, row)
                scores[label].append(example.score(answer))
        minutes = (time.perf_counter() - started) / 60
        counts = {label: int(sum(found)) for label, found in scores.items()}
        say(f"{first + args.batch} pass keys, {minutes:.1f} min: {counts}")
        save(
            {
                label: statistics.proportion(found)._asdict() | {"scores": found}
                for label, found in scores.items()
            }
        )
        if minutes > args.minutes:
            break


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=512, help="tokens of a list")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--n", type=int, default=100, help="pass keys")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=60.0, help="of pass keys")
    parser.add_argument("--parts", nargs="+", default=["windows", "keys"])
    parser.add_argument("--only", nargs="+", help="labels, as they are printed")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    document = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "jax": jax.__version__,
        "device": f"{device.device_kind} ({device.platform})",
        "page_size": PAGE,
        "windows": {},
        "passkey": {},
    }

    def say(line):
        print(line, flush=True)

    def save(**parts):
        document.update(parts)
        text = json.dumps(files.json_ready(document), indent=2) + "\n"
        files.write_text(args.json, text)

    sparse = models.load("embedded-entmax", dtype="float32")
    softmax = models.load("embedded-softmax", dtype="float32")
    # The entmax model's weights under softmax: what its attention would be without
    # zeros.
    config = dataclasses.replace(sparse.decoder.config, attention_alpha=1.0)
    same = sparse._replace(
        decoder=dataclasses.replace(sparse.decoder, config=config),
        name="entmax as softmax",
    )
    methods = entmax_methods(args.context, args.budget)
    reader = kvjax.entmaxkv(budget=None, page_size=PAGE, selector="gaussian")
    sizes = (args.budget // 2, args.budget, 2 * args.budget)
    whole_choice = {
        f"best tokens {args.budget}": best_choice(args.budget),
        f"best pages {args.budget}": best_choice(args.budget, PAGE),
    }
    quest = {f"quest {n}": kvjax.quest(budget=n, page_size=PAGE) for n in sizes[1:]}
    best = {f"oracle_topk {n}": kvjax.oracle_topk(budget=n) for n in sizes[1:2]}
    groups = (
        (sparse, [(reader, methods), (kvjax.full(), whole_choice)]),
        (softmax, [(next(iter(quest.values())), quest), (kvjax.full(), best)]),
        (same, [(next(iter(quest.values())), quest)]),
    )
    windows = {}
    for model, parts in groups if "windows" in args.parts else ():

        def keep(entries, name=model.name):
            save(windows=windows | {name: entries})

        windows[model.name] = measure_windows(model, parts, args, say, keep)
        save(windows=windows)
    if "keys" not in args.parts:
        return
    asked = args.only or (
        "dense",
        f"topk {args.budget}",
        f"gaussian {args.budget}",
        "gaussian None",
        f"certified {args.budget}",
    )
    chosen = {label: methods[label] for label in asked}
    measure_keys(sparse, chosen, args, say, lambda found: save(passkey=found))


if __name__ == "__main__":
    main()
