"""The training loop: steps, logs, checks, checkpoints, and resuming bit for bit.

A folder holds a run: `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and
`model/` or, of frozen weights, `adapter/`, in whatever form the caller's `save` writes.
"""

import ast
import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from kvjax import files
from kvjax.files import arrays
from kvjax.interface import Params
from kvjax.training import (
    checkpoint,
    config_files,
    optim,
    pipeline,
    run_folder,
    sharding,
)
from kvjax.training import step as steps
from kvjax.training.config import METRICS, Config
from kvjax.training.data import Source
from kvjax.training.progress import Progress

Save = Callable[[Params, pathlib.Path], None]


class Result(NamedTuple):
    """The end of a run: steps done, the weights to use, and whether it is complete."""

    step: int
    weights: Params
    finished: bool


class Window(NamedTuple):
    """Sums since the last line of the log, and totals: what a resumed run goes on from.

    They are saved with the state, so that a checkpoint between two lines loses nothing.
    """

    sums: dict[str, Any]
    grad_norm: float
    steps: int
    tokens: int  # targets since the first step
    best: float | None  # of the metric named by `checkpoint.best`

    def add(self, metrics: Mapping[str, np.ndarray]) -> "Window":
        """With the metrics of one more step."""
        new = {k: v.astype(np.float64) for k, v in metrics.items() if v.ndim}
        return self._replace(
            sums={k: v + np.asarray(self.sums.get(k, 0.0)) for k, v in new.items()},
            grad_norm=self.grad_norm + float(metrics["grad_norm"]),
            steps=self.steps + 1,
            tokens=self.tokens + int(new["targets"].sum()),
        )

    def emptied(self) -> "Window":
        """After a line of the log."""
        return self._replace(sums={}, grad_norm=0.0, steps=0)

    def to_json(self) -> dict[str, Any]:
        """Plain floats: JSON keeps every bit of them."""
        sums = {key: np.asarray(value).tolist() for key, value in self.sums.items()}
        return self._replace(sums=sums)._asdict()


def train(
    decoder: steps.TrainableLM,
    config: Config,
    out: pathlib.Path,
    *,
    init: Callable[[Any], Params],
    sources: Mapping[str, Source],
    frozen: Callable[[Any], Params] | None = None,
    held_out: Mapping[str, Source] | None = None,
    save: Save | None = None,
    resume: bool = False,
    data_id: str = "",
) -> Result:
    """Trains `decoder` as `config` says, in the folder `out`.

    Args:
        init: `init(shardings) -> params`, the first weights, in the structure of
            `decoder.param_shapes()`; not called by a run that goes on.
        sources: by name, of training samples.
        frozen: `frozen(shardings) -> weights` of a :class:`steps.AdaptedLM`, in the
            structure of its `frozen_shapes()`; called by every run.
        held_out: by name, of the checks; None is `sources`, with seeds of their own.
        save: `save(weights, folder)` writes `folder`, which does not exist yet.
        resume: go on from the newest checkpoint in `out`; the rest is then bit for bit
            what it would have been without the interruption.
        data_id: identifies the data; a resumed run must be given the same.

    Returns:
        A :class:`Result`; `finished` is false after SIGINT or SIGTERM, when the state
        was saved and the run can be resumed.

    Raises:
        ValueError: before any work, if config, decoder, sources and `out` do not fit
            each other; :class:`checkpoint.NotFiniteError` when loss or gradient is not
            finite.
        OSError: if `out` cannot be written; the last complete checkpoint survives.
    """
    if config.longest > decoder.context:
        raise ValueError(
            f"rows of {config.longest} targets exceed the {decoder.context} tokens the "
            "model is made for: shorten stages.lengths and evaluate.checks, or raise "
            "max_position_embeddings."
        )
    mesh = sharding.make_mesh(config.mesh)
    batches = pipeline.Steps(config, sources)
    run_folder.check(out, resume=resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder.locked(out))
        run = _Run(decoder, config, out, mesh, save, data_id)
        stack.callback(run.checkpoints.close)
        position = run.begin(init, frozen, resume)
        run.prepare(
            batches, position, pipeline.check_batches(config, held_out or sources)
        )
        stack.callback(run.metrics.close)
        interrupt = stack.enter_context(run_folder.Interrupt())
        stack.enter_context(run.progress)
        _go(run, interrupt)
        run.finish()
    return Result(run.step, run.state.weights, run.step == config.steps)


def _go(run: "_Run", interrupt: run_folder.Interrupt) -> None:
    config, saved = run.config, time.monotonic()
    seconds = config.checkpoint.every_seconds or math.inf
    for step in range(run.step + 1, config.steps + 1):
        run.advance()
        last, stop = step == config.steps, interrupt.asked
        checked = bool(config.checks) and (last or step % config.evaluate.every == 0)
        value = None
        if last or checked or step % config.log.every == 0:
            value = run.log(checked)
        if (
            last
            or stop
            or run.is_best(value)
            or step % config.checkpoint.every_steps == 0
            or time.monotonic() - saved > seconds
        ):
            run.save(value)
            saved = time.monotonic()
        if stop:
            return


class _Run:
    """One run while it goes on. A step changes `state`, `window` and `step`."""

    def __init__(self, decoder, config: Config, out, mesh, save_model, data_id):
        best = config.checkpoint.best
        self.best_mode = METRICS[best.rpartition("/")[2]] if best else "min"
        self.decoder, self.config, self.out, self.mesh = decoder, config, out, mesh
        self.save_model, self.data_id = save_model, data_id
        self.tx = optim.optimizer(config, decoder.vocab_size)
        self.rate = optim.schedule(config)
        self.checkpoints = checkpoint.open_folder(
            out, keep=config.checkpoint.keep, best_mode=self.best_mode
        )
        self.frozen_id: str | None = None
        self.step, self.window = 0, Window({}, 0.0, 0, 0, None)
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []

    def begin(self, init, frozen, resume: bool) -> dict[str, Any] | None:
        """Makes or restores the state; returns the position in the data."""
        self.frozen = self._placed(frozen)
        shapes = steps.state_shapes(self.decoder, self.tx, self.config, self.mesh)
        restored = (
            checkpoint.newest(self.checkpoints, shapes, _notice) if resume else None
        )
        if restored is None:
            place = jax.jit(
                lambda params: steps.init_state(params, self.tx, self.config),
                out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
            )
            self.state = place(
                init(sharding.of_state(self.decoder.param_shapes(), self.mesh))
            )
            return None
        self._check_resume(restored.about, restored.step)
        self.state, self.step = restored.state, restored.step
        self.window = Window(**restored.about["window"])
        _notice(f"resuming at step {self.step} of {self.config.steps}.")
        return restored.about["data"]

    def _placed(self, frozen) -> tuple[Params, ...]:
        """Returns the frozen weights on their devices, if there are any."""
        shapes = steps.frozen_shapes(self.decoder, self.config, self.mesh)
        if not shapes:
            return ()
        if frozen is None:
            raise ValueError(
                f"{type(self.decoder).__name__} trains beside frozen weights, and "
                "frozen is None: give a function that returns them."
            )
        placed = sharding.of_state(shapes[0], self.mesh)
        weights = jax.tree.map(
            lambda leaf, like: leaf.astype(like.dtype), frozen(placed), shapes[0]
        )
        self.frozen_id = arrays.digest(weights)
        return (jax.device_put(weights, placed),)

    def _check_resume(self, about: Mapping[str, Any], step: int) -> None:
        old = config_files.parse(about["config"], "the saved config")
        done = np.arange(step)
        rates = np.asarray(optim.schedule(old)(done)), np.asarray(self.rate(done))
        config_files.check_resume(old, self.config, step, *rates)
        if "decoder" in about:  # older ones have none
            was, now = _fields(about["decoder"]), _fields(self._decoder())
            # What only one of two versions knows says nothing of the model.
            changed = [
                f"{name} was {was[name]} and is {now[name]}"
                for name in was
                if was[name] != now.get(name, was[name])
            ]
            if changed:
                raise ValueError(
                    f"the model is not that of this run: {', '.join(changed)}; restore "
                    "model.checkpoint, or start a new --out."
                )
        if about.get("frozen") != self.frozen_id:
            raise ValueError(
                "the weights beside which this run trains are not those it began with "
                f"({about.get('frozen')} then, {self.frozen_id} now): restore "
                "model.checkpoint, or start a new --out."
            )
        if about["data_id"] != self.data_id:
            raise ValueError(
                f"the data are not those this run began with (data_id "
                f"{about['data_id']!r} then, {self.data_id!r} now): restore corpus, "
                "tokenizer and data.held_out, or start a new --out."
            )

    def _decoder(self) -> str:
        """Describes what the model computes, but for its weights."""
        return repr(getattr(self.decoder, "config", self.decoder))

    def prepare(self, source, position, checks) -> None:
        """All else that steps need; from here on the folder is written to."""
        check, _, metric = (self.config.checkpoint.best or "").rpartition("/")
        if metric in ("accuracy", "whole") and not any(
            batch.answers.any() for batch in checks[check]
        ):
            raise ValueError(
                f"checkpoint.best={check}/{metric} cannot be measured: {check} has no "
                "answers; use its bits."
            )
        self.train_step = steps.make_train_step(
            self.decoder, self.tx, self.config, self.mesh
        )
        self.check_step = steps.make_check(self.decoder, self.config, self.mesh)
        self.batches = pipeline.iterate(source, position)
        self.checks = checks
        text = config_files.dump(self.config)
        files.write_text(self.out / run_folder.CONFIG, text)
        self.metrics = run_folder.Metrics(
            self.out, self.step, tensorboard=self.config.log.tensorboard
        )
        self.progress = Progress(self.config.steps, self.step)
        self.began = self.logged = time.monotonic()
        self.logged_tokens = self.window.tokens

    def advance(self) -> None:
        """One step; the host does not wait for it, only for the one before."""
        batch = sharding.place(next(self.batches), self.mesh)
        self.state, metrics = self.train_step(self.state, batch, *self.frozen)
        self.step += 1
        self.pending.append((self.step, metrics))
        self.settle(1)
        self.progress.step(self.step)

    def settle(self, in_flight: int = 0) -> None:
        """Takes in the metrics of all steps but the last `in_flight`."""
        while len(self.pending) > in_flight:
            step, metrics = self.pending.pop(0)
            metrics = jax.device_get(metrics)
            if not metrics["finite"]:
                with np.errstate(all="ignore"):
                    loss = metrics["loss"].sum() / metrics["weight"].sum()
                norm = metrics["grad_norm"]
                what = f"loss {loss:.4g}, norm of the gradient {norm:.4g}"
                raise self._not_finite(step, what)
            self.window = self.window.add(metrics)

    def _not_finite(self, step: int, what: str) -> checkpoint.NotFiniteError:
        dtype = self.config.precision.compute
        fix = "lower optimizer.lr, or look at the data"
        if dtype != "float32":
            fix = f"set precision.compute=float32, {fix}"
        return self.checkpoints.not_finite(step, dtype, what, fix)

    def log(self, checked: bool) -> float | None:
        """Writes a line of the log; returns `checkpoint.best` if it was measured."""
        self.settle()
        record: dict[str, Any] = {"step": self.step, "tokens": self.window.tokens}
        record |= steps.summary(self.window.sums, self.config.sources)
        record["grad_norm"] = self.window.grad_norm / self.window.steps
        record["lr"] = float(self.rate(self.step - 1))
        now, tokens = time.monotonic(), self.window.tokens
        speed = (tokens - self.logged_tokens) / (now - self.logged)
        if checked:
            record |= self._check()
        record |= {
            "tokens_per_s": round(speed, 1),
            "seconds": round(now - self.began, 2),
        }
        self.metrics.write(record)
        self.progress.show(record)
        self.window = self.window.emptied()
        self.logged, self.logged_tokens = time.monotonic(), tokens
        return record.get(f"held_out/{self.config.checkpoint.best}")

    def _check(self) -> dict[str, float]:
        record = {}
        for name, batches in self.checks.items():
            placed = (sharding.place(batch, self.mesh) for batch in batches)
            sums = [
                self.check_step(self.state.weights, batch, *self.frozen)
                for batch in placed
            ]
            total = jax.tree.map(
                lambda *parts: np.sum(parts, axis=0, dtype=np.float64),
                *jax.device_get(sums),
            )
            if not np.isfinite(total["nats"]).all():
                raise self._not_finite(self.step, f"the check {name} is not finite")
            for metric, value in steps.check_summary(total).items():
                record[f"held_out/{name}/{metric}"] = value
        return record

    def is_best(self, value: float | None) -> bool:
        """Says if `value` is better than every one before it."""
        if value is None or math.isnan(value):
            return False
        best = self.window.best
        return best is None or (
            value < best if self.best_mode == "min" else value > best
        )

    def save(self, value: float | None) -> None:
        """Saves the state, and exports the model before it if it is the best so far."""
        self.settle()
        if not steps.has_finite_weights(self.state):
            raise self._not_finite(self.step, "weights after it are not finite")
        if self.is_best(value):
            self.window = self.window._replace(best=value)
            # First: a crash in between repeats the export, and never skips it.
            self._export()
        self.metrics.flush()
        about = {
            "config": config_files.dump(self.config),
            "decoder": self._decoder(),
            "data": self.batches.get_state(),
            "data_id": self.data_id,
            "window": self.window.to_json(),
            "frozen": self.frozen_id,
        }
        self.checkpoints.save(self.step, self.state, about, value)

    def _export(self) -> None:
        if self.save_model is not None:
            run_folder.replace_model(
                self.out, self.state.weights, self.save_model, self._result
            )

    @property
    def _result(self) -> str:
        return run_folder.ADAPTER if self.frozen else run_folder.MODEL

    def finish(self) -> None:
        """Everything on disk, and the model exported if the run is complete."""
        self.settle()
        self.checkpoints.wait()
        if self.step < self.config.steps:
            _notice(run_folder.stopped(self.step, self.config.steps, self.out))
        elif self.window.best is None or not (self.out / self._result).exists():
            self._export()


def _fields(told: str) -> dict[str, str]:
    """Dotted names and values of a dataclass' repr; any other text is one value."""
    try:
        node = ast.parse(told, mode="eval").body
    except SyntaxError:
        return {"": told}
    return dict(_named(node))


def _named(node: ast.AST, place: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(node, ast.Call):
        yield place, ast.unparse(node)
        return
    for field in node.keywords:
        yield from _named(field.value, f"{place}.{field.arg}".removeprefix("."))


def _notice(line: str) -> None:
    print(line, file=sys.stderr)
