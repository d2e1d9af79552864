r"""Many questions on one document under Squeezed Attention, and what clustering costs.

    python benchmarks/squeezed.py questions --context 2048
    python benchmarks/squeezed.py clustering --keys 32768
    python benchmarks/squeezed.py steps --keys 32768 --rounds 15

Questions: a document with a value for each of 24 keys is read and ended once, saved and
restored, and then asked for every value, one question after the other: what a question
costs alone, with the reading in it, and amortised. Answers and the tokens that steps
read are counted in another pass. Clustering: of one layer, beside the attention of a
prompt of as many tokens. Steps: of one layer, beside full attention's. Cases of a call
take turns in one process: ratios count, seconds do not.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from entries import add

import models
from kvjax import accounting, registry
from kvjax.attention import clustering
from kvjax.decoding import asking, feeding, reader, saved_prompt
from kvjax.evaluation.tasks import haystack, needles
from kvjax.interface import CacheSpec
from kvjax.rope import Rope
from kvjax.text import encoding
from models import embedded

METHODS = (
    "full",
    "squeezed:sparsity=0.7,budget={0.25},tail=32",
    "squeezed:sparsity=0.9,budget={0.15},tail=32",
    "squeezed:sparsity=0.9,coarse=0.01,budget={0.15},tail=32",
    "quest:budget={0.3}",
)
QUESTIONS = 24


class Counted(NamedTuple):
    """A state, and how many tokens its steps listed, a KV head."""

    state: Any
    read: jax.Array


def counting(method, heads):
    """The method, which counts what its steps attend to."""

    def inspect_step(state, q):
        inner, out, found = method.inspect_step(state.state, q)
        read = (found.attended >= 0).sum((1, 2)) / heads
        return Counted(inner, read.astype(jnp.float32)), out, found

    def finish(state):
        inner = method.finish(state)
        return Counted(inner, jnp.zeros_like(rows_of(inner), jnp.float32))

    def append(state, k, v):
        return state._replace(state=method.append(state.state, k, v))

    return method._replace(inspect_step=inspect_step, finish=finish, append=append)


def rows_of(state):
    """The clock of a state, wherever it is."""
    return getattr(state, "store", state).length


def tokens_read(before, after):
    del before
    return jnp.stack([state.read for state in after])


def document(tokenizer, context, seed):
    """Tokens of a text with a value for each key, and the questions and answers."""
    rng = np.random.default_rng(seed)
    source = haystack.source(tokenizer, embedded.heldout_text(), lambda line: False)
    lines = haystack.cut(source, rng, context)
    keys = rng.permutation(needles.KEYS)[:QUESTIONS].tolist()
    numbers = haystack.new_numbers(rng, "".join(lines), QUESTIONS)
    facts = [
        f"key {key} has value {number}.\n"
        for key, number in zip(keys, numbers, strict=True)
    ]
    places = ((np.arange(QUESTIONS) + 0.5) / QUESTIONS).tolist()
    while True:
        sizes = [source.sizes[line] for line in lines]
        hidden = haystack.Needles(facts, places, "", "")
        text = haystack.insert(lines, sizes, hidden)
        ids = encoding.begin(tokenizer.encode, text)
        if len(ids) <= context:
            break
        lines.pop()
    asked = [
        haystack.ask(tokenizer, f"{text}\nkey {key} has value ", number, context=text)
        for key, number in zip(keys, numbers, strict=True)
    ]
    begin = min(one.asked_at for one in asked)
    return ids[:begin], asked


def timed(run):
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def one_method(model, spec, ids, asked):
    """Seconds to read, to end, to restore, and of every question, in turn."""
    method, name = registry.parse(spec), registry.canonical(spec)
    reading, read = timed(lambda: saved_prompt.read(model, method, [ids], room=64))
    ending, ended = timed(lambda: saved_prompt.finish(model, method, read))
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "document"
        saved_prompt.save(place, model, ended, method_name=name)
        restoring, ended = timed(
            lambda: saved_prompt.restore(place, model, method, method_name=name)
        )
    seconds = []
    for one in asked:
        question = [list(one.prompt[len(ids) :])]
        options = {"max_new_tokens": one.answer_tokens}
        spent, _ = timed(
            lambda q=question, o=options: saved_prompt.ask(model, method, ended, q, **o)
        )
        seconds.append(spent)
    return reading, ending, restoring, seconds


def answers(model, method, ids, asked):
    """The share of right answers, and the tokens that a step of a layer reads."""
    spec = model.decoder.cache_spec(1, 1)
    counted = counting(method, spec.num_kv_heads)
    prefilled = reader.prefill(model, counted, [list(ids)], max_new_tokens=64)
    right, read = [], []
    for one in asked:
        question = list(one.prompt[len(ids) :])
        wanted = [*question, *[feeding.CHOOSE] * one.answer_tokens]
        row = asking.taken(counted, prefilled, [0])
        fed = feeding.feed(
            model, counted, row, np.array([wanted], np.int32), watch=tokens_read
        )
        said = fed.tokens[0, len(question) :].tolist()
        before = list(one.prompt)
        whole = model.tokenizer.decode([*before, *said])
        text = whole[len(model.tokenizer.decode(before)) :]
        right.append(text.strip().startswith(one.answer.strip()))
        read.append(fed.watched.mean())
    return float(np.mean(right)), float(np.mean(read))


def filled(spec, context):
    """The spec with shares of the context in braces as tokens, of whole pages."""
    head, *parts = spec.split("{")
    for part in parts:
        share, rest = part.split("}")
        head += f"{round(float(share) * context / 16) * 16}{rest}"
    return head


def questions(options):
    model = models.load(options.model)
    ids, asked = document(model.tokenizer, options.context, options.seed)
    specs = [filled(spec, len(ids)) for spec in METHODS]
    methods = {spec: registry.parse(spec) for spec in specs}
    full_bytes = None
    rows = {}
    for spec, method in methods.items():
        correct, read = answers(model, method, ids, asked)
        traffic = accounting.traffic(method, model.decoder, len(ids) + 16, 16)
        one = model.decoder.cache_spec(1, 1)
        token = 2 * one.num_kv_heads * one.head_dim * jnp.dtype(one.dtype).itemsize
        listed = read * token * model.decoder.num_layers + traffic.metadata
        full_bytes = full_bytes or traffic.total
        rows[spec] = {
            "right": correct,
            "tokens read": read,
            "bytes a step, listed": listed / full_bytes,
            "bytes a step, at most": traffic.total / full_bytes,
        }
        print(spec, json.dumps(rows[spec]), flush=True)
    for spec in methods:
        one_method(model, spec, ids, asked[:1])  # compiles
        reading, ending, restoring, seconds = one_method(model, spec, ids, asked)
        each = statistics.median(seconds)
        rows[spec] |= {
            "seconds to read": reading,
            "seconds to end": ending,
            "seconds to restore": restoring,
            "seconds a question": each,
            "alone": reading + ending + each,
            "amortised": (reading + ending) / len(asked) + each,
        }
        print(spec, json.dumps(rows[spec]), flush=True)
    return {"model": options.model, "context": len(ids), "rows": rows}


def clustering_cost(options):
    """Seconds to cluster a layer's keys, beside those of a prompt's attention."""
    heads, group, size, keys = options.heads, options.group, 64, options.keys
    spec = CacheSpec(1, heads * group, heads, size, keys, "float32", Rope(size))
    full, chunk = registry.parse("full"), 512
    rng = np.random.default_rng(0)

    def drawn(number, tokens):
        shape = (1, number, tokens, size)
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

    q, k, v = (drawn(n, chunk) for n in (heads * group, heads, heads))
    prefill = jax.jit(full.prefill, donate_argnums=0)
    lengths = jnp.full((1,), chunk, jnp.int32)

    def attend():
        state = full.init(spec)
        for _ in range(0, keys, chunk):
            state, out = prefill(state, q, k, v, lengths)
        return out

    every = drawn(heads, keys)
    count = jnp.full((1, heads), keys, jnp.int32)
    most = keys // 20
    run = jax.jit(clustering.kmeans, static_argnums=(3, 4))

    def cluster():
        return run(every, count, count // 20, most, 10)

    cases = {"attention": attend, "clustering": cluster}
    found = {name: [] for name in cases}
    jax.block_until_ready(cluster())
    for _ in range(options.rounds):
        for name, case in cases.items():
            found[name].append(timed(case)[0])
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    about = {"keys": keys, "heads": heads, "group": group, "seconds": found}
    return about | {"clustering by attention": ratios}


def filled_state(method, spec, keys, rng):
    """The state behind a prompt of random keys, values and last queries."""
    state = method.init(spec)
    store = getattr(state, "store", state)

    def drawn(array):
        return jnp.asarray(rng.standard_normal(array.shape, dtype=np.float32))

    length = jnp.full((1,), keys, jnp.int32)
    store = store._replace(k=drawn(store.k), v=drawn(store.v), length=length)
    if hasattr(state, "queries"):
        store = state._replace(store=store, queries=drawn(state.queries))
    return jax.jit(method.finish)(store)


def step_times(options):
    """Full attention's seconds of a step over squeezed's, a ratio a round.

    Processor time where it is a CPU's: wall clock is also of what else runs there.
    """
    is_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    heads, group, size, keys = options.heads, options.group, 64, options.keys
    more = CacheSpec(
        1, heads * group, heads, size, keys + 64, "float32", Rope(size), 64
    )
    budget = round(0.15 * keys)
    spec = f"squeezed:sparsity=0.9,budget={budget}"
    rng, states = np.random.default_rng(0), {}
    q = jnp.asarray(rng.standard_normal((1, heads * group, 1, size), dtype=np.float32))
    for name in ("full", spec):
        method = registry.parse(name)
        step = jax.jit(lambda state, q, m=method: m.inspect_step(state, q)[1])
        states[name] = step, filled_state(method, more, keys, rng)
        jax.block_until_ready(step(states[name][1], q))
    found = {name: [] for name in states}
    for _ in range(options.rounds):
        for name, (step, state) in states.items():
            begin = clock()
            jax.block_until_ready(step(state, q))
            found[name].append(clock() - begin)
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    about = {"keys": keys, "heads": heads, "group": group, "method": spec}
    return about | {"seconds": found, "times_as_fast_as_full": ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--model", default="embedded-softmax")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--group", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    found = {"part": options.part, **PARTS[options.part](options)}
    print(json.dumps(found, indent=2))
    if options.json:
        add(options.json, found)


PARTS = {"questions": questions, "clustering": clustering_cost, "steps": step_times}


if __name__ == "__main__":
    main()
