r"""Attention over quantised caches, and decoding with packed weights, on this CPU.

    python benchmarks/quantized.py attention --json F
    python benchmarks/quantized.py weights --model smollm2 --json F

Each call adds its part to the file. Attention: one decode step of one layer over a
contiguous cache, and Quest's read of listed pages of it. Weights: the decode step of a
whole model. All cases of a call take turns in one process, so that what else the
machine does slows all of them: the ratios of a round are what counts, and their
spread says how busy it was. Processor seconds are those of all threads.
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from entries import add

import models
from kvjax import registry
from kvjax.decoding.reader import prefill
from kvjax.stores import buffers
from models import gguf, published
from models.family import Packing
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_attention import page_attention
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Format, Layout

KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
PAGE, PART = 16, 8192  # tokens of a page; tokens that are quantised at once
FORMATS = {
    "float32": None,
    "int8": Format(HEAD_DIM, 8, HEAD_DIM, True),
    "int4": Format(HEAD_DIM, 4, 32, True),
}


def timed(run):
    start = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - start[0], time.process_time() - start[1]


def in_turns(cases, rounds):
    """Seconds of every case, and of processors; the first round, of compiling, not."""
    found = {name: [] for name in cases}
    for index in range(rounds + 1):
        for name, run in cases.items():
            seconds = timed(run)
            if index:
                found[name].append(seconds)
    return found


def compared(found, baseline):
    """Median seconds, and how many times as fast as the baseline of the same round."""
    told = {}
    for name, rounds in found.items():
        told[name] = {}
        for index, what in enumerate(("seconds", "processor seconds")):
            own, theirs = ([x[index] for x in one] for one in (rounds, found[baseline]))
            ratios = [a / b for a, b in zip(theirs, own, strict=True)]
            low, *_, high = statistics.quantiles(ratios, n=4)
            told[name] |= {
                what: statistics.median(own),
                f"{what}, times as fast": statistics.median(ratios),
                f"{what}, middle half": [low, high],
            }
    return told


def drawn(slots, part, seed):
    """Rows `(1, Hkv, S, D)`, quantised by parts where there is a format."""
    rng = np.random.default_rng(seed)
    shape = (1, KV_HEADS, slots, HEAD_DIM)
    rows = jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    if part is None:
        return rows
    layout = Layout((part,), "float32")
    encode = jax.jit(functools.partial(quantized.encode, layout))
    parts = [encode(rows[:, :, i : i + PART]) for i in range(0, slots, PART)]
    return buffers.joined(parts, axis=2)


def attention(args):
    q = jnp.asarray(
        np.random.default_rng(2).standard_normal((1, QUERY_HEADS, 1, HEAD_DIM)),
        jnp.float32,
    )
    at = jnp.full((1, 1), args.context - 1, jnp.int32)
    ids = np.random.default_rng(3).permutation(args.context // PAGE)
    ids = np.stack(
        [np.roll(ids, 7 * h)[: args.budget // PAGE] for h in range(KV_HEADS)]
    )
    ids = jnp.asarray(ids[None], jnp.int32)

    @jax.jit
    def whole(k, v):
        return decode_attention(q, k, v, at, sm_scale=HEAD_DIM**-0.5)[0]

    @jax.jit
    def listed(pages):
        return page_attention(q, pages, ids, at, sm_scale=HEAD_DIM**-0.5)[0]

    def paged(k, v):
        both = jnp.concatenate([k, v], -1)
        return both.reshape(1, KV_HEADS, -1, PAGE, both.shape[-1])

    def pages_of(k, v):
        if not isinstance(k, quantized.Quantized):
            return paged(k, v)
        parts = k.layout.parts + v.layout.parts
        codes, scales = paged(k.codes, v.codes), paged(k.scales, v.scales)
        return quantized.Quantized(codes, scales, Layout(parts, "float32"))

    cases, pages, read = {}, {}, {}
    for name, part in FORMATS.items():
        k, v = (drawn(args.context, part, seed) for seed in (0, 1))
        cases[name] = functools.partial(whole, k, v)
        pages[name] = functools.partial(listed, pages_of(k, v))
        read[name] = buffers.num_bytes((k, v))
    for part, runs, share in (
        ("contiguous", cases, 1),
        ("pages", pages, args.budget / args.context),
    ):
        told = compared(in_turns(runs, args.rounds), "float32")
        for name, entry in told.items():
            entry["bytes read"] = int(read[name] * share)
            entry["GB/s"] = entry["bytes read"] / entry["seconds"] / 1e9
        yield {
            "part": part,
            "context": args.context,
            "budget": args.budget if part == "pages" else None,
            "heads": [QUERY_HEADS, KV_HEADS, HEAD_DIM],
            "rounds": args.rounds,
            "formats": told,
        }


def weights(args):
    cases, held = {}, {}
    method = registry.parse("full")
    names: dict[str, Packing] = {"float32": None, "int8": "int8", "int4": "int4"}
    if args.model in published.MODELS or gguf.is_gguf(args.model):
        names["stored"] = "stored"
    for name, packing in names.items():
        try:
            model = models.load(args.model, dtype="float32", weights=packing)
        except ValueError as error:  # a file without codes to keep
            if packing != "stored":
                raise
            print(error)
            continue
        prompt = [model.tokenizer.encode("The benchmark decodes what comes now.")]
        read = prefill(model, method, prompt, max_new_tokens=args.steps + 1)
        cases[name] = functools.partial(
            decode, model.decoder, method, args.steps, model.params, read.states
        )
        held[name] = sum(x.nbytes for x in jax.tree.leaves(model.params))
    told = compared(in_turns(cases, args.rounds), "float32")
    for name, entry in told.items():
        for what, of in (("seconds", ""), ("processor seconds", " of processor time")):
            entry[f"tokens/s{of}"] = args.steps / entry[what]
        entry["bytes of weights"] = held[name]
    yield {
        "part": "weights",
        "model": args.model,
        "steps": args.steps,
        "rounds": args.rounds,
        "formats": told,
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def decode(decoder, method, steps, params, states):
    """Greedy tokens, each fed back."""

    def step(carry, _):
        states, token = carry
        states, hidden = decoder.decode_step(params, states, token, method)
        token = decoder.logits(params, hidden).argmax(-1).astype(jnp.int32)
        return (states, token), token

    carry = states, jnp.zeros((1, 1), jnp.int32)
    return jax.lax.scan(step, carry, None, steps)[1]


PARTS = {"attention": attention, "weights": weights}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--budget", type=int, default=4096, help="of Quest's pages")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=16, help="tokens a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    for entry in PARTS[args.part](args):
        for name, told in entry["formats"].items():
            print(entry["part"], name, told, flush=True)
        if args.json:
            add(args.json, entry)


if __name__ == "__main__":
    main()
