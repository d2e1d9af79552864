"""Batches of any step, made from seeds alone, with grain.

Element i is the whole batch of step i, a function of the config and i: nothing is read
in order, so a resumed run, more threads or more processes see the same batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from kvjax.training.batch import Batch, Sample
from kvjax.training.config import Config, Stage
from kvjax.training.data import Source

_AHEAD = 4  # batches prepared per thread
# First of every seed, so that no two uses share one: numpy pads seeds with zeros.
_PLAN, _SAMPLE, _CHECK = 1, 2, 3


class Slot(NamedTuple):
    """A place for one sequence: at most `length` targets, from `source`."""

    length: int
    source: int


class Steps:
    """A grain data source: batch i of a config, or this process's rows of it.

    Args:
        sources: every source the config names; others are ignored.
        process, num_processes: rows are split evenly, in order.

    Raises:
        ValueError: if a source that the config names is missing.
    """

    def __init__(
        self,
        config: Config,
        sources: Mapping[str, Source],
        process: int = 0,
        num_processes: int = 1,
    ):
        missing = [name for name in config.sources if name not in sources]
        if missing:
            raise ValueError(
                f"there is no source {missing[0]!r}; sources are "
                f"{', '.join(sorted(sources))}."
            )
        self.config, self.sources = config, sources
        self.process, self.num_processes = process, num_processes

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, index: int) -> Batch:
        config, step = self.config, int(index)
        stage = config.stage(step)
        rng = np.random.default_rng([_PLAN, config.data.seed, step])
        shares = np.array(list(stage.lengths.values()))
        length = int(rng.choice(list(stage.lengths), p=shares / shares.sum()))
        plan = layout(rng, stage, length, config.sources)
        each = len(plan) // self.num_processes
        rows = []
        for row in range(self.process * each, (self.process + 1) * each):
            samples = []
            for place, slot in enumerate(plan[row]):
                seed = [_SAMPLE, config.data.seed, step, row, place]
                source = self.sources[config.sources[slot.source]]
                sample = source.draw(np.random.default_rng(seed), slot.length)
                samples.append((sample, slot.source))
            rows.append(pack(samples, length))
        return stack(rows, packed=stage.shortest is not None)


def layout(
    rng: np.random.Generator, stage: Stage, length: int, names: Sequence[str]
) -> list[list[Slot]]:
    """The sequences that make up each row of a batch.

    Sources are sampled systematically: laid end to end in random order, the sequences
    of each source take its share of the batch's tokens, give or take one sequence.
    """
    lengths = [_lengths(rng, length, stage.shortest) for _ in range(stage.rows(length))]
    flat = np.array([n for row in lengths for n in row])
    shares = np.array([stage.mixture.get(name, 0.0) for name in names])
    ends = np.cumsum(shares / shares.sum())
    order = rng.permutation(len(flat))
    middle = np.cumsum(flat[order]) - flat[order] / 2
    points = (middle / flat.sum() + rng.random()) % 1.0
    chosen = np.empty(len(flat), np.int64)
    # A share of nothing is an empty interval, also where rounding leaves ends[-1] < 1.
    last = np.flatnonzero(shares)[-1]
    chosen[order] = np.minimum(np.searchsorted(ends, points, side="right"), last)
    picks = iter(chosen)
    return [[Slot(n, int(next(picks))) for n in row] for row in lengths]


def _lengths(rng, length, shortest) -> list[int]:
    if shortest is None:
        return [length]
    lengths, left = [], length
    while left:
        size = int(np.exp(rng.uniform(np.log(shortest), np.log(length + 1))))
        size = min(size, left)
        if left - size < shortest:  # no room for another
            size = left
        lengths.append(size)
        left -= size
    return lengths


def pack(samples: Sequence[tuple[Sample, int]], length: int) -> Batch:
    """One row of `length` targets: samples end to end, then padding.

    Args:
        samples: with the index of the source of each.

    Raises:
        ValueError: if they do not fit, or a sample's parts do not.
    """
    row: dict[str, Any] = {
        "tokens": np.zeros(length, np.int32),
        "targets": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
        "answers": np.zeros(length, bool),
        "sources": np.full(length, samples[0][1], np.int32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }
    start = 0
    for number, (sample, source) in enumerate(samples, 1):
        n = len(sample.tokens) - 1
        end = start + n
        if not len(sample.weights) == len(sample.answers) == n or end > length:
            raise ValueError(
                f"a sample of {n} targets with {len(sample.weights)} weights and "
                f"{len(sample.answers)} answers does not fit a row of {length} that "
                f"holds {start} already."
            )
        row["tokens"][start:end] = sample.tokens[:-1]
        row["targets"][start:end] = sample.tokens[1:]
        row["weights"][start:end] = sample.weights
        row["answers"][start:end] = sample.answers
        row["sources"][start:end] = source
        row["segments"][start:end] = number
        row["positions"][start:end] = np.arange(n)
        start = end
    return Batch(**row)


def stack(rows: Sequence[Batch], *, packed: bool) -> Batch:
    """Rows as one batch; without segments and positions unless they are `packed`."""
    arrays: list[Any] = [np.stack(parts) for parts in zip(*rows, strict=True)]
    batch = Batch(*arrays)
    return batch if packed else batch._replace(segments=None, positions=None)


def check_batches(
    config: Config, sources: Mapping[str, Source]
) -> dict[str, list[Batch]]:
    """The batches of every check, by `source@length`; the same at every step.

    Each check has about the tokens of `evaluate.tokens`, in batches of whole rows per
    device and of no more tokens than the largest step has.
    """
    most = max(stage.tokens for stage in config.stages)
    devices, checks = config.mesh.size, {}
    for name, length in config.checks:
        wanted = max(1, round(config.evaluate.tokens / length))
        each = max(1, min(most // length, wanted) // devices) * devices
        batches = []
        for start in range(0, wanted, each):
            rows = []
            for row in range(start, start + each):
                seed = [_CHECK, config.data.seed, length, row]
                sample = sources[name].draw(np.random.default_rng(seed), length)
                rows.append(pack([(sample, 0)], length))
            batches.append(stack(rows, packed=False))
        checks[f"{name}@{length}"] = batches
    return checks


def iterate(steps: Steps, state: Mapping[str, Any] | None = None) -> Any:
    """A grain iterator over the batches, prepared ahead by threads.

    Args:
        state: what `get_state()` of an earlier iterator gave; None is the beginning.
    """
    threads = steps.config.data.threads
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=threads * _AHEAD
    )
    batches = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
    if state is not None:
        batches.set_state(dict(state))
    return batches
