r"""Trains the embedded models on any Python installation, on a CPU.

    python -m models.embedded.train --out runs/embedded --steps 8000
    python -m models.embedded.train --out runs/embedded --steps 8500 --decay 500 \
        --resume

The learning rate is constant after its warm-up, so a run may be stopped or extended at
any time; `--decay` anneals it over the last steps. Batch i depends on the seed and i
only, so a resumed run sees what an uninterrupted one would have seen.
"""

import argparse
import functools
import json
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from kvjax.interface import Params
from kvjax.rope import Rope
from models.embedded import data, tokenizer
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder

CONFIG = LlamaConfig(
    vocab_size=1024,
    width=64,
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_width=192,
    context=4096,
    rope=Rope(head_dim=32),
    tied_embeddings=True,
)

TASKS = ("text", "repeat", "recall", "passkey", "keys", "far_passkey", "far_keys")


class Stage(NamedTuple):
    """Until step `until`: batches of one length, drawn with these chances.

    lengths: {tokens per row: chance}; tasks: {name in TASKS: share of the rows};
    alphabet: token ids below it make up the rows of random tokens.
    """

    until: int
    alphabet: int
    lengths: dict[int, float]
    tasks: dict[str, float]


# Induction forms on short rows full of questions; text and distance come after it.
RECIPE = (
    Stage(
        1500,
        100,  # the printable ASCII characters, digits among them
        {64: 1.0},
        {"text": 0.15, "repeat": 0.3, "recall": 0.25, "passkey": 0.1, "keys": 0.2},
    ),
    Stage(
        2350,
        100,
        {64: 0.2, 128: 0.4, 256: 0.4},
        {"text": 0.3, "repeat": 0.1, "recall": 0.1, "passkey": 0.2, "keys": 0.3},
    ),
    Stage(
        2750,
        300,
        {128: 0.2, 256: 0.4, 512: 0.4},
        {
            "text": 0.3,
            "repeat": 0.05,
            "recall": 0.05,
            "passkey": 0.05,
            "keys": 0.3,
            "far_passkey": 0.1,
            "far_keys": 0.15,
        },
    ),
    Stage(
        10**9,
        100,
        {256: 0.35, 512: 0.3, 1024: 0.35},
        {
            "text": 0.35,
            "repeat": 0.05,
            "keys": 0.25,
            "far_passkey": 0.15,
            "far_keys": 0.2,
        },
    ),
)


class Batch(NamedTuple):
    """Rows of :class:`models.embedded.data.Row`, stacked; task (B,) indexes `TASKS`."""

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    task: np.ndarray


class TrainState(NamedTuple):
    """Everything a resumed run needs; `average` is what is evaluated and exported."""

    params: Params
    average: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


def make_row(
    rng: np.random.Generator,
    corpus: data.Corpus,
    task: str,
    length: int,
    alphabet: int = CONFIG.vocab_size,
) -> data.Row:
    """One row of `task` with `length` targets."""
    match task:
        case "text":
            return data.text_row(rng, corpus, length)
        case "repeat":
            return data.repeat_row(rng, alphabet, length)
        case "recall":
            return data.recall_row(rng, alphabet, length)
    kind = task.removeprefix("far_")
    return data.fact_row(
        rng, corpus, length, passkey=kind == "passkey", dense=kind == task
    )


def make_batch(
    corpus: data.Corpus,
    seed: int,
    step: int,
    tokens_per_step: int,
    recipe: tuple[Stage, ...] = RECIPE,
) -> Batch:
    """The batch of one step, a function of its arguments alone."""
    rng = np.random.default_rng([seed, step])
    stage = next(stage for stage in recipe if step < stage.until)
    length = int(rng.choice(list(stage.lengths), p=list(stage.lengths.values())))
    num_rows = max(1, tokens_per_step // length)
    shares = np.array([stage.tasks.get(task, 0.0) for task in TASKS])
    tasks = _apportion(rng, shares / shares.sum(), num_rows)
    rows = [
        make_row(rng, corpus, TASKS[task], length, stage.alphabet) for task in tasks
    ]
    return Batch(*map(np.stack, zip(*rows, strict=True)), np.array(tasks, np.int32))


def _apportion(rng, shares, num_rows) -> list[int]:
    # Systematic sampling: every batch has each task's share, give or take one row.
    points = (np.arange(num_rows) + rng.random()) / num_rows
    return [int(task) for task in np.searchsorted(np.cumsum(shares)[:-1], points)]


def causal_attention(rope: Rope, num_rows: int, block: int = 256) -> Callable:
    """Causal softmax attention `attention(layer, q, k, v)` for rows laid end to end.

    q, k, v are `(1, H, num_rows * T, D)`: with the rows folded into one, every matrix
    of the forward and backward pass is two-dimensional, and a training step on XLA's
    CPU backend takes about half the time. Queries go in blocks that see only the keys
    up to their own end, which skips nearly half of the scores of a long row.
    """

    def attention(layer, q, k, v):
        del layer
        num_q_heads, head_dim = q.shape[1], q.shape[-1]
        num_kv_heads = k.shape[1]
        length = q.shape[2] // num_rows

        def unfold(x):
            return x.reshape(num_kv_heads, -1, num_rows, length, head_dim)

        def rotate(x):
            positions = jnp.arange(length)[None]
            return rope(x.reshape(1, -1, length, head_dim), positions)

        q, k = unfold(rotate(q * head_dim**-0.5)), unfold(rotate(k))
        k, v = k[:, 0], unfold(v)[:, 0]
        outs = []
        for start in range(0, length, block):
            end = min(start + block, length)
            part = q[..., start:end, :]
            scores = jnp.einsum("kgbtd,kbsd->kgbts", part, k[:, :, :end])
            seen = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
            outs.append(jnp.einsum("kgbts,kbsd->kgbtd", weights, v[:, :, :end]))
        out = jnp.concatenate(outs, axis=3)
        return out.reshape(1, num_q_heads, num_rows * length, head_dim)

    return attention


def init_params(decoder: LlamaDecoder, seed: int) -> Params:
    """The decoder's random parameters with deviations for a width this small.

    `LlamaDecoder.init` draws everything at 0.02, right for widths in the thousands.
    """

    def scale(path, x):
        name = jax.tree_util.keystr(path)
        if x.ndim < 2 or "embedding" in name:
            return x
        gain = 1.0
        if "'o'" in name or "'down'" in name:
            gain = (2 * decoder.num_layers) ** -0.5
        return x * (gain * x.shape[0] ** -0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(scale, decoder.init(seed))


def token_losses(
    decoder: LlamaDecoder, params: Params, tokens: Int[Array, "B T1"]
) -> tuple[Float[Array, "B T"], Array]:
    """Cross-entropy in nats of every target, and whether it was the likeliest token."""
    num_rows, length = tokens.shape[0], tokens.shape[1] - 1
    attention = causal_attention(decoder.config.rope, num_rows)
    hidden = decoder.hidden(params, tokens[:, :-1].reshape(1, -1), attention)
    logits = decoder.logits(params, hidden[0])
    targets = tokens[:, 1:].reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = jnp.argmax(logits, -1) == targets
    return losses.reshape(num_rows, length), right.reshape(num_rows, length)


def optimizer(
    lr: float, *, warmup: int, steps: int = 0, decay: int = 0
) -> optax.GradientTransformation:
    """AdamW with clipping; warm-up, plateau, linear decay over the last of `steps`."""

    def schedule(count):
        rate = lr * jnp.minimum(1.0, (count + 1) / warmup)
        if decay:
            rate = rate * jnp.clip((steps - count) / decay, 0.02, 1.0)
        return rate

    def decayed(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.05, mask=decayed),
    )


def new_state(
    decoder: LlamaDecoder, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step."""
    params = init_params(decoder, seed)
    state = TrainState(params, params, tx.init(params), jnp.zeros((), jnp.int32))
    return jax.tree.map(jnp.array, state)  # donation needs separate buffers


def make_train_step(decoder: LlamaDecoder, tx: optax.GradientTransformation):
    """`step(state, batch) -> (state, metrics)`; compiled once per row length."""

    def loss_fn(params, batch):
        losses, right = token_losses(decoder, params, batch.tokens)
        row_loss = jnp.sum(losses * batch.weights, -1)
        one_hot = jax.nn.one_hot(batch.task, len(TASKS))
        answered = jnp.sum(batch.answers, -1).astype(jnp.float32)
        row_right = jnp.sum(right & batch.answers, -1).astype(jnp.float32)
        metrics = {
            "rows": one_hot.sum(0),
            "loss": row_loss @ one_hot,
            "answers": answered @ one_hot,
            "right": row_right @ one_hot,
        }
        return jnp.mean(row_loss), metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A plateau's iterates are noisy; their running mean is the model to keep.
        rate = jnp.minimum(0.995, (state.step + 1) / (state.step + 10))
        average = jax.tree.map(
            lambda old, new: rate * old + (1 - rate) * new, state.average, params
        )
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(params, average, opt_state, state.step + 1), metrics

    return step


def make_evaluate(decoder: LlamaDecoder):
    """`evaluate(params, batch) -> (bits per target, answers right, rows right)`."""

    @jax.jit
    def evaluate(params, batch: Batch):
        losses, right = token_losses(decoder, params, batch.tokens)
        answers = jnp.sum(batch.answers)
        accuracy = jnp.sum(right & batch.answers) / jnp.maximum(answers, 1)
        bits = jnp.sum(losses * batch.weights) / jnp.sum(batch.weights) / jnp.log(2.0)
        return bits, accuracy, jnp.mean(jnp.all(right | ~batch.answers, -1))

    return evaluate


def checks(held_out: data.Corpus, seed: int) -> dict[str, Batch]:
    """The batches of the log's accuracies: held-out text and seeds."""
    batches = {}
    for name, length, num_rows in (
        ("text", 256, 32),
        ("repeat", 128, 16),
        ("recall", 256, 16),
        ("keys", 256, 16),
        ("far_passkey", 256, 32),
        ("far_passkey", 1024, 8),
        ("far_keys", 256, 32),
    ):
        rng = np.random.default_rng([seed, 2**31, length])
        rows = [make_row(rng, held_out, name, length) for _ in range(num_rows)]
        task = np.full(num_rows, TASKS.index(name), np.int32)
        batches[f"{name}@{length}"] = Batch(
            *map(np.stack, zip(*rows, strict=True)), task
        )
    return batches


def save_checkpoint(folder: pathlib.Path, state: TrainState) -> None:
    """Writes `state.safetensors` so that a crash leaves the old or the new one."""
    leaves = jax.tree.leaves(state)
    arrays = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    partial = folder / "state.safetensors.partial"
    save_file(arrays, partial)
    os.replace(partial, folder / "state.safetensors")


def load_checkpoint(folder: pathlib.Path, like: TrainState) -> TrainState:
    """The state saved in `folder`, in the structure of `like`."""
    arrays = load_file(folder / "state.safetensors")
    leaves = [jnp.asarray(arrays[name]) for name in sorted(arrays)]
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    if [leaf.shape for leaf in leaves] != shapes:
        raise ValueError(
            f"{folder / 'state.safetensors'} holds {len(leaves)} arrays of other "
            f"shapes than this configuration's {len(shapes)}; start a new --out."
        )
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_average(folder: pathlib.Path, decoder: LlamaDecoder) -> Params:
    """The averaged parameters saved in `folder`: the model to use."""
    shapes = decoder.param_shapes()
    count = len(jax.tree.leaves(shapes))
    arrays = load_file(folder / "state.safetensors")
    # Leaves are in the order of TrainState: params, average, and so on.
    leaves = [arrays[name] for name in sorted(arrays)[count : 2 * count]]
    wanted = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    if [leaf.shape for leaf in leaves] != wanted:
        raise ValueError(
            f"{folder / 'state.safetensors'} is of another configuration: its shapes "
            f"are not the {count} of {decoder.config}."
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def prefetch(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """`make(start) .. make(stop - 1)`, the next few prepared by another thread."""
    ready: queue.Queue = queue.Queue(maxsize=4)

    def work():
        for step in range(start, stop):
            ready.put(make(step))

    threading.Thread(target=work, daemon=True).start()
    for _ in range(start, stop):
        yield ready.get()


def prepare(folder: pathlib.Path) -> tuple[Tokenizer, data.Corpus]:
    """The tokenizer in `folder`, trained now if it is not there, and the text."""
    texts = data.read(data.training_files())
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(
            tokenizer.train(texts, CONFIG.vocab_size), folder, CONFIG.context
        )
    trained = Tokenizer.from_file(str(path))
    return trained, data.make_corpus(texts, trained)


def run(args: argparse.Namespace) -> None:
    """Trains from the start or from the checkpoint in `args.out` to `args.steps`."""
    decoder = LlamaDecoder(CONFIG)
    trained, corpus = prepare(args.out)
    held_out = data.make_corpus(data.read([data.HELD_OUT_FILE]), trained)
    tx = optimizer(args.lr, warmup=args.warmup, steps=args.steps, decay=args.decay)
    state = new_state(decoder, tx, args.seed)
    if args.resume:
        state = load_checkpoint(args.out, state)
    train_step, evaluate = make_train_step(decoder, tx), make_evaluate(decoder)
    held_out_checks = checks(held_out, args.seed)

    start = int(state.step)
    make = functools.partial(
        make_batch, corpus, args.seed, tokens_per_step=args.tokens_per_step
    )
    batches = prefetch(lambda step: make(step=step), start, args.steps)
    log = (args.out / "log.jsonl").open("a", encoding="utf-8")
    sums, seen, clock, saved = [], 0, time.monotonic(), time.monotonic()
    for step, batch in enumerate(batches, start + 1):
        state, metrics = train_step(state, batch)
        sums.append(metrics)
        seen += batch.weights.size
        if step % args.log_every == 0 or step == args.steps:
            record = {"step": step, "tokens": step * args.tokens_per_step}
            record |= _summary(jax.device_get(sums))
            if step % args.eval_every == 0 or step == args.steps:
                for name, check in held_out_checks.items():
                    bits, accuracy, whole = evaluate(state.average, check)
                    record[f"held_out/{name}"] = (
                        round(float(bits), 3)
                        if name.startswith("text")
                        else [round(float(accuracy), 3), round(float(whole), 3)]
                    )
            now = time.monotonic()
            record["tokens_per_s"] = round(seen / (now - clock))
            sums, seen, clock = [], 0, now
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), flush=True)
        if time.monotonic() - saved > args.save_every or step == args.steps:
            save_checkpoint(args.out, state)
            saved = time.monotonic()
    log.close()


def _summary(sums: list[dict]) -> dict:
    total = jax.tree.map(lambda *xs: np.sum(xs, axis=0), *sums)
    record = {"grad_norm": round(float(total["grad_norm"]) / len(sums), 3)}
    for index, task in enumerate(TASKS):
        if total["rows"][index]:
            loss = float(total["loss"][index] / total["rows"][index])
            record[f"loss/{task}"] = round(loss, 4)
        if total["answers"][index]:
            accuracy = float(total["right"][index] / total["answers"][index])
            record[f"accuracy/{task}"] = round(accuracy, 4)
    return record


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.embedded.train")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--decay", type=int, default=0, help="steps, the last ones")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--save-every", type=float, default=300, help="seconds")
    parser.add_argument("--eval-every", type=int, default=200)
    args = parser.parse_args(argv)
    run(args)


if __name__ == "__main__":
    main()
