"""The memory that is planned for a step is what a step of that shape takes."""

import jax
import numpy as np
import pytest
from tiny import tiny_model

from kvjax.training import memory, optim, sharding, step
from kvjax.training.config import Config

MODEL = tiny_model(num_layers=2, context=512)
BASE = {
    "model": {"checkpoint": "any"},
    "stages": [{"steps": 1, "tokens": 256, "lengths": {64: 1}, "mixture": {"text": 1}}],
    "optimizer": {"name": "adamw"},
    "evaluate": {"every": 0},
}


def config(**changes):
    stage = BASE["stages"][0] | changes.pop("stage", {})
    return Config.model_validate(BASE | {"stages": [stage]} | changes)


def test_the_state_is_weights_and_two_moments_and_the_average():
    num_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(MODEL.params))
    (plain,) = memory.step_memory(MODEL.decoder, config())
    # Two scalars of ours, and the counters of optax: a few dozen bytes.
    assert 3 * num_bytes < plain.state < 3 * num_bytes + 100
    averaged = config(optimizer={"average": 0.9})
    (more,) = memory.step_memory(MODEL.decoder, averaged)
    assert more.state - plain.state == num_bytes
    assert (plain.rows, plain.length, plain.packed) == (4, 64, False)
    # Five fields of a target: four of 4 bytes, one boolean.
    assert plain.batch == 4 * 64 * (4 * 4 + 1)


def test_what_is_planned_is_what_the_compiled_step_is_given():
    settings = config()
    (planned,) = memory.step_memory(MODEL.decoder, settings)
    mesh = sharding.make_mesh(settings.mesh)
    tx = optim.optimizer(settings, MODEL.decoder.vocab_size)
    state = step.init_state(MODEL.params, tx, settings)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert planned.state == held
    train = step.make_train_step(MODEL.decoder, tx, settings, mesh)
    rows = np.zeros((4, 64), np.int32)
    batch = memory.Batch(
        rows, rows, rows.astype(np.float32), rows.astype(bool), rows, None, None
    )
    assert planned.batch == sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    compiled = train.lower(state, batch).compile().memory_analysis()
    # One program: the same number of bytes of its own, and a gradient at the least.
    assert planned.temporaries >= compiled.temp_size_in_bytes > held / 3


def test_more_rows_take_more_and_parts_take_less():
    (one,) = memory.step_memory(MODEL.decoder, config())
    (four,) = memory.step_memory(MODEL.decoder, config(stage={"tokens": 1024}))
    assert four.batch == 4 * one.batch
    assert four.temporaries > 2.5 * one.temporaries
    parts = config(stage={"tokens": 1024}, optimizer={"accumulate": 4})
    (split,) = memory.step_memory(MODEL.decoder, parts)
    assert split.temporaries < 0.6 * four.temporaries


def test_every_shape_of_every_stage_is_there_the_largest_first():
    common = {"steps": 1, "mixture": {"text": 1}}
    stages = [
        common | {"tokens": 256, "lengths": {64: 1, 32: 1}},
        common | {"tokens": 512, "lengths": {128: 1}, "shortest": 16},
    ]
    settings = Config.model_validate(BASE | {"stages": stages})
    found = memory.step_memory(MODEL.decoder, settings)
    assert {(one.rows, one.length, one.packed) for one in found} == {
        *((4, 64, False), (8, 32, False), (4, 128, True)),
    }
    assert [one.peak for one in found] == sorted((x.peak for x in found), reverse=True)
    assert found[0].length == 128
    assert found[0].batch == 4 * 128 * (6 * 4 + 1)


def test_a_mesh_of_devices_that_are_not_here_is_refused():
    with pytest.raises(ValueError, match=r"mesh\.data=5 \* mesh\.fsdp=1 needs 5"):
        memory.step_memory(
            MODEL.decoder, config(mesh={"data": 5}, stage={"tokens": 320})
        )
