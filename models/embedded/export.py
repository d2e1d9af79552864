"""Writes a trained model in the Hugging Face layout and measures what it can do.

python -m models.embedded.export --run runs/embedded --to models/embedded/softmax
"""

import argparse
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import models
from kvjax.interface import LanguageModel, Params
from models import embedded
from models.embedded import data, train
from models.llama import tokenizer as hf_tokenizer
from models.llama.model import LlamaDecoder


def export(run: pathlib.Path, to: pathlib.Path) -> None:
    """Writes the averaged weights of `run` to the folder `to`, replacing what is there.

    A reader of `to` finds the old checkpoint or the new one, complete.
    """
    decoder = LlamaDecoder(train.CONFIG)
    new = to.with_name(f".{to.name}.new")
    old = to.with_name(f".{to.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model = LanguageModel(
        decoder=decoder,
        params=train.load_average(run, decoder),
        tokenizer=hf_tokenizer.load(run),
        eos_ids=(data.EOS,),
    )
    models.save_pretrained(model, new)
    if to.exists():
        to.rename(old)
    new.rename(to)
    shutil.rmtree(old, ignore_errors=True)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion."""
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def retrieval(
    decoder: LlamaDecoder,
    params: Params,
    corpus: data.Corpus,
    *,
    length: int,
    n: int,
    passkey: bool,
    seed: int = 0,
) -> int:
    """How many of `n` values hidden in held-out text come back, all digits right.

    A row is right if every digit is the likeliest token after the true ones before it,
    which is when greedy decoding gives the value.
    """
    rng = np.random.default_rng([seed, 2**32, length, passkey])
    rows: list[data.Row] = []
    while len(rows) < n:
        row = data.fact_row(
            rng, corpus, length, passkey=passkey, dense=False, variants=0
        )
        if row.answers.any():  # else the value was cut off with the front
            rows.append(row)
    size = max(1, 8192 // length)
    losses = jax.jit(lambda params, tokens: train.token_losses(decoder, params, tokens))
    right = 0
    for start in range(0, n, size):
        part = rows[start : start + size]
        tokens = jnp.asarray(np.stack([row.tokens for row in part]))
        answers = np.stack([row.answers for row in part])
        hits = np.asarray(losses(params, tokens)[1])
        right += int((hits | ~answers).all(-1).sum())
    return right


def bits_per_byte(
    decoder: LlamaDecoder, params: Params, text: str, backend: Tokenizer, length: int
) -> float:
    """Cross-entropy of `text` in windows of `length` tokens, each after a BOS."""
    ids = backend.encode(text, add_special_tokens=False).ids
    num_windows = len(ids) // length
    windows = np.array(ids[: num_windows * length], np.int32).reshape(-1, length)
    rows = np.pad(windows, ((0, 0), (1, 0)), constant_values=data.BOS)
    losses = jax.jit(lambda params, tokens: train.token_losses(decoder, params, tokens))
    total, size = 0.0, max(1, 8192 // length)
    for start in range(0, num_windows - num_windows % size, size):
        total += float(losses(params, jnp.asarray(rows[start : start + size]))[0].sum())
    used = windows[: num_windows - num_windows % size].ravel()
    return total / math.log(2) / len(backend.decode(used.tolist()).encode())


def report(folder: pathlib.Path, n: int, lengths: list[int]) -> None:
    """Prints bits per byte and retrieval of a checkpoint, as JSON lines."""
    model = models.load(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = embedded.heldout_text()
    for length in lengths:
        bits = bits_per_byte(model.decoder, model.params, text, backend, length)
        line = {"held-out text": length, "bits per byte": round(bits, 3)}
        print(json.dumps(line), flush=True)
    corpus = data.make_corpus([text], backend)
    for passkey in (True, False):
        for length in lengths:
            right = retrieval(
                model.decoder,
                model.params,
                corpus,
                length=length,
                n=n,
                passkey=passkey,
            )
            low, high = wilson(right, n)
            line = {
                "task": "passkey" if passkey else "keys",
                "length": length,
                "right": right,
                "n": n,
                "interval": [round(low, 3), round(high, 3)],
            }
            print(json.dumps(line), flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.embedded.export")
    parser.add_argument("--run", type=pathlib.Path, help="folder of train.py's --out")
    parser.add_argument(
        "--to",
        type=pathlib.Path,
        default=pathlib.Path(embedded.__file__).parent / "softmax",
    )
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048]
    )
    args = parser.parse_args(argv)
    if args.run is not None:
        export(args.run, args.to)
    report(args.to, args.n, args.lengths)


if __name__ == "__main__":
    main()
