r"""RefreshKV against eviction and full attention: long outputs, drift, bytes, time.

    python benchmarks/refreshkv.py outputs --task chain --n 30 --json F.json
    python benchmarks/refreshkv.py outputs --task extraction --context 1024
    python benchmarks/refreshkv.py drift --task extraction --rows 60 --json F.json
    python benchmarks/refreshkv.py text --context 1024 --model runs/control/model \
        --model embedded-refreshkv --json F.json
    python benchmarks/refreshkv.py seeds --context 1024 --n 16 --model runs/control-2 \
        --model runs/refreshkv-2 --model runs/control-3 --model runs/refreshkv-3
    python benchmarks/refreshkv.py bytes --json F.json
    python benchmarks/refreshkv.py time --json F.json

Each call adds its part to the file. Every method has the same budget, an eighth of the
context where none is given. Outputs: greedy decoding, scored; the stride is tokens by
full steps, mean over rows and layers. Drift: nats a token of the right output, fed, by
its place in the output. Text: nats of held-out text after a prompt, under full
attention and in RefreshKV's setting, the models paired by window. Seeds: controls and
models trained in the setting, in turn; nats a token of a text, a chain and a table
above the control's, the interval over the seeds. Bytes: what steps read, counted, by
what the method says it reads. Time: one layer of an 8B model, append and attend, in
turns, at a random cache.
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

import kvjax
import models
from kvjax import accounting, files, registry
from kvjax.decoding.feeding import CHOOSE, feed
from kvjax.decoding.reader import prefill
from kvjax.decoding.scoring import score
from kvjax.evaluation import compare, compare_inputs, continuations, statistics
from kvjax.evaluation.tasks import haystack, needles
from kvjax.evaluation.tasks.chain import chain_of_key
from kvjax.evaluation.tasks.extraction import extraction
from kvjax.interface import CacheSpec
from kvjax.methods.refreshkv.method import RefreshKVState
from kvjax.rope import Rope
from kvjax.stores import contiguous
from kvjax.text.stream import continuation
from models import embedded

SEED = 30_000
METHODS = (
    "full",
    "refreshkv:group_reduce=mean",
    "refreshkv:group_reduce=mean,kernel=13",
    "snapkv",
    "h2o",
    "streaming_llm",
)


@functools.cache
def load(name):
    return models.load(name, dtype="float32")


def strides(states):
    """Steps by full steps of every layer and row; nothing of other methods."""
    made = [s for s in states if isinstance(s, RefreshKVState)]
    return [s.steps / np.maximum(s.refreshes, 1) for s in made]


def examples(args, model):
    text = embedded.heldout_text()
    options = {"context": args.context, "n": args.n, "seed": SEED}
    if args.task == "chain":
        return chain_of_key(model.tokenizer, text, links=args.links, **options)
    return extraction(model.tokenizer, text, rows=args.rows, **options)


def answered(model, method, examples, batch, *, forced):
    """(tokens, log-probabilities, strides) of each example's answer, row by row."""
    longest = max(example.answer_tokens for example in examples)
    tokens, log_probs, found = [], [], []
    for first in range(0, len(examples), batch):
        group = examples[first : first + batch]
        group += [group[-1]] * (batch - len(group))
        prompts = [example.prompt for example in group]
        wanted = np.full((batch, longest), CHOOSE, np.int32)
        if forced:
            for row, example in enumerate(group):
                whole = haystack.whole(model.tokenizer, example)
                right = whole[len(example.prompt) :]
                wanted[row, : len(right)] = right
        start = prefill(model, method, prompts, max_new_tokens=longest)
        fed = feed(model, method, start, wanted)
        likely = np.where((wanted < 0) & forced, np.nan, fed.log_probs)
        kept = min(batch, len(examples) - first)
        tokens += fed.tokens[:kept].tolist()
        log_probs += list(likely[:kept])
        found += [x[:kept] for x in strides(fed.states)]
    return tokens, log_probs, found


def outputs(args):
    for path in args.model:
        model = load(path)
        made = examples(args, model)
        for name in args.method:
            start = time.perf_counter()
            method = registry.parse(name, budget=args.budget)
            said, _, found = answered(model, method, made, args.batch, forced=False)
            decode = model.tokenizer.decode
            texts = [
                continuation(decode, example.prompt, row)
                for example, row in zip(made, said, strict=True)
            ]
            scores = [e.score(text) for e, text in zip(made, texts, strict=True)]
            yield {
                "part": "outputs",
                "task": args.task,
                "model": path,
                "method": name,
                "budget": args.budget,
                "context": args.context,
                "output_tokens": max(example.answer_tokens for example in made),
                "score": statistics.share_interval(scores)._asdict(),
                "stride": float(np.mean(found)) if found else None,
                "seconds": round(time.perf_counter() - start, 1),
            }


def drift(args):
    for path in args.model:
        model = load(path)
        made = examples(args, model)
        for name in args.method:
            method = registry.parse(name, budget=args.budget)
            _, found, _ = answered(model, method, made, args.batch, forced=True)
            nats = -np.stack(found)
            edges = np.arange(0, nats.shape[1], args.bucket)
            yield {
                "part": "drift",
                "task": args.task,
                "model": path,
                "method": name,
                "budget": args.budget,
                "context": args.context,
                "bucket": args.bucket,
                "nats_by_place": [
                    float(np.nanmean(nats[:, i : i + args.bucket])) for i in edges
                ],
            }


def text_nats(args, model, method):
    """Nats a token of each window of held-out text, after a prompt."""
    text = embedded.heldout_text()
    windows = needles.windows(
        model.tokenizer, text, context=args.context, n=args.n, seed=SEED
    )
    asked = args.context - args.decoded
    parts = []
    for first in range(0, args.n, args.batch):
        rows = windows[first : first + args.batch]
        found = score(model, method, rows, prefill=asked, prompt_scores=False)
        parts.append(-found.log_probs[:, asked:])
    return np.concatenate(parts).astype(np.float64).mean(1)


def setting(args):
    return f"refreshkv:group_reduce=mean,stride={args.stride}"


def text(args):
    for name in ("full", setting(args)):
        method = registry.parse(name, budget=args.budget)
        expected = None
        for path in args.model:
            nats = text_nats(args, load(path), method)
            expected = nats if expected is None else expected
            above = statistics.paired_difference(nats, expected)
            yield {
                "part": "text",
                "model": path,
                "method": name,
                "budget": args.budget,
                "context": args.context,
                "decoded": args.decoded,
                "perplexity": statistics.perplexity(-nats)._asdict(),
                "nats_above_the_first_model": above._asdict(),
            }


def seeds(args):
    pairs = list(zip(args.model[::2], args.model[1::2], strict=True))
    for source in ("text", "chain", "extraction"):
        args.task = source
        for name in ("full", setting(args)):
            method = registry.parse(name, budget=args.budget)
            rows = []
            for path in args.model:
                model = load(path)
                if source == "text":
                    rows.append(float(text_nats(args, model, method).mean()))
                    continue
                made = examples(args, model)
                _, found, _ = answered(model, method, made, args.batch, forced=True)
                rows.append(float(-np.mean([np.nanmean(row) for row in found])))
            above = statistics.paired_difference(rows[1::2], rows[::2])
            yield {
                "part": "seeds",
                "source": source,
                "training": args.training,
                "method": name,
                "budget": args.budget,
                "context": args.context,
                "n": args.n,
                "models": pairs,
                "control_nats": rows[::2],
                "trained_nats": rows[1::2],
                "nats_above_control": above._asdict(),
            }


def counted(args):
    model = load(args.model[0])
    settings = compare_inputs.Settings(
        context=args.context, new_tokens=args.decoded, windows=args.n, batch=args.n
    )
    windows = needles.windows(
        model.tokenizer,
        embedded.heldout_text(),
        context=args.context,
        n=args.n,
        seed=SEED,
    )
    for stride in (5, 10):
        options = f"schedule=fixed,stride={stride}"
        method = registry.parse(f"refreshkv:{options}", budget=args.budget)
        layers = continuations.layer_fidelity(
            model,
            kvjax.full(),
            method,
            windows,
            new_tokens=args.decoded,
            batch=args.n,
            chunk_size=512,
        )
        read = compare.measured_bytes(model, method, layers, settings)
        said = accounting.bytes_read(method, model.decoder, args.context, args.decoded)
        yield {
            "part": "bytes",
            "method": f"refreshkv:{options}",
            "budget": args.budget,
            "context": args.context,
            "counted": read,
            "stated": said,
            "ratio": read / said,
        }


def random_state(method, spec, length, key):
    """After a prompt of `length` tokens whose keys, values and query are random."""
    state = method.init(spec)
    store = state if isinstance(state, contiguous.Contiguous) else state.store

    def drawn(x):
        block = jax.random.normal(key, (*x.shape[:2], 1, x.shape[3]), x.dtype)
        ramp = 1 + jnp.arange(x.shape[2], dtype=x.dtype)[:, None] / x.shape[2]
        return block * ramp

    store = store._replace(
        k=drawn(store.k), v=drawn(store.v), length=jnp.full_like(store.length, length)
    )
    if isinstance(state, contiguous.Contiguous):
        return method.finish(store)
    return method.finish(state._replace(store=store, query=drawn(state.query)))


def timed(args):
    length, steps = args.length, 2 * args.stride
    spec = CacheSpec(
        batch=1,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        capacity=length + (args.repeats + 2) * steps,
        dtype="float32",
        rope=Rope(head_dim=128, theta=500_000.0),
        max_new_tokens=(args.repeats + 2) * steps,
    )
    ours = f"refreshkv:schedule=fixed,stride={args.stride},budget={length // 8}"
    key = jax.random.key(0)
    runs, seconds, states = {}, {}, {}
    for name in ("full", ours):
        method = registry.parse(name)

        @functools.partial(jax.jit, donate_argnums=0)
        def run(state, key, method=method):
            def step(state, key):
                q = jax.random.normal(key, (1, 32, 1, 128))
                k = jax.random.normal(key, (1, 8, 1, 128))
                state, out = method.decode_step(method.append(state, k, k), q)
                return state, out.sum()

            return jax.lax.scan(step, state, jax.random.split(key, steps))

        states[name] = jax.jit(random_state, static_argnums=(0, 1, 2))(
            method, spec, length, key
        )
        runs[name], seconds[name] = run, []
    for turn in range(args.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(run(states[name], key))
            if turn:  # the first compiles
                seconds[name].append((time.perf_counter() - start) / steps)
    full = np.array(seconds["full"])
    for name, found in seconds.items():
        method = registry.parse(name)
        yield {
            "part": "time",
            "method": name,
            "length": length,
            "seconds_a_step": float(np.median(found)),
            "times_as_fast_as_full": float(np.median(full / np.array(found))),
            "bytes_a_step": method.traffic(spec, length).total,
        }


PARTS = {
    "outputs": outputs,
    "drift": drift,
    "text": text,
    "seeds": seeds,
    "bytes": counted,
    "time": timed,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", action="append", help="may be repeated")
    parser.add_argument("--method", action="append", help="may be repeated")
    parser.add_argument("--task", choices=("chain", "extraction"), default="chain")
    parser.add_argument("--links", type=int, default=5, help="of a chain")
    parser.add_argument("--rows", type=int, default=12, help="of a table")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budget", type=int, help="an eighth of the context")
    parser.add_argument("--decoded", type=int, default=256, help="tokens after a text")
    parser.add_argument("--stride", type=int, default=5)
    parser.add_argument("--bucket", type=int, default=25, help="of drift, in tokens")
    parser.add_argument("--length", type=int, default=131_072, help="of a timed cache")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument(
        "--training",
        default="the preset's mixture",
        help="what the models of `seeds` were trained on, for the record",
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to add to")
    args = parser.parse_args(argv)
    args.model = args.model or ["embedded-refreshkv"]
    args.method = args.method or METHODS
    args.budget = args.budget or args.context // 8
    for entry in PARTS[args.part](args):
        print(json.dumps(files.json_ready(entry)), flush=True)
        if args.json is not None:
            add(args.json, entry)


if __name__ == "__main__":
    main()
