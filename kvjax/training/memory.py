"""The memory that a step of training takes: what the compiler allots, before any of it.

The step is compiled for the devices that are here, from shapes alone. What the backward
pass keeps depends on the backend, on remat and on the dtype, and no estimate from
shapes came near enough (NOTES.md), so the compiler is asked.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from kvjax.training import optim, sharding
from kvjax.training import step as steps
from kvjax.training.batch import Batch
from kvjax.training.config import Config


class StepMemory(NamedTuple):
    """Bytes on one device while a step of one shape runs."""

    length: int  # targets a row
    rows: int  # of the batch, on all devices
    packed: bool  # several sequences a row
    state: int  # weights, their average, the optimizer's: held between steps
    frozen: int  # weights beside which others are trained
    batch: int
    temporaries: int  # gradients, activations, the output's buffers that are not reused

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.state + self.frozen + self.batch + self.temporaries


def step_memory(decoder: steps.TrainableLM, config: Config) -> list[StepMemory]:
    """Compiles a step of every shape that the stages have; nothing is allocated.

    Args:
        decoder: the model that is trained, its weights float32.
        config: of the run; its mesh must be of devices that are here.

    Returns:
        One a shape, by bytes from the most to the least. The first is the run's peak.

    Raises:
        ValueError: if there are too few devices.
        jax.errors.JaxRuntimeError: if a step exceeds the device's memory, where the
            backend's compiler refuses it; the message has both sizes.
    """
    mesh = sharding.make_mesh(config.mesh)
    tx = optim.optimizer(config, decoder.vocab_size)
    state = steps.state_shapes(decoder, tx, config, mesh)
    frozen = steps.frozen_shapes(decoder, config, mesh)
    step: Any = steps.make_train_step(decoder, tx, config, mesh)
    shapes = {
        (length, stage.rows(length), stage.shortest is not None)
        for stage in config.stages
        for length in stage.lengths
    }
    found = []
    for length, rows, packed in shapes:
        batch = _batch(rows, length, packed, mesh)
        memory = step.lower(state, batch, *frozen).compile().memory_analysis()
        held, still = _bytes_of_one(state), _bytes_of_one(frozen)
        # The new state takes the place of the old one: it is donated.
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        eaten = _bytes_of_one(batch)
        rest = total - held - still - eaten
        found.append(StepMemory(length, rows, packed, held, still, eaten, rest))
    return sorted(found, key=lambda one: one.peak, reverse=True)


def _batch(rows: int, length: int, packed: bool, mesh: jax.sharding.Mesh) -> Batch:
    """Returns the shapes of a batch as :mod:`kvjax.training.pipeline` makes it."""
    placed = sharding.of_batch(mesh)

    def leaf(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, length), np.dtype(dtype), sharding=placed)

    return Batch(
        tokens=leaf(np.int32),
        targets=leaf(np.int32),
        weights=leaf(np.float32),
        answers=leaf(bool),
        sources=leaf(np.int32),
        segments=leaf(np.int32) if packed else None,
        positions=leaf(np.int32) if packed else None,
    )


def _bytes_of_one(tree) -> int:
    """Returns the bytes of a tree's shapes on one of the devices they lie on."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
