"""Four devices: the losses of one, weights really split, checkpoints of any mesh."""

import json
import os
import pathlib
import subprocess
import sys

import compiling
import pytest
import toys

ROOT = pathlib.Path(toys.__file__).parents[1]

PROGRAM = """
import json, pathlib, sys
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)
import jax.numpy as jnp
import numpy as np
import toys
from kvjax.training import checkpoint, optim, pipeline, sharding
from kvjax.training import step as steps

decoder = toys.decoder()
params = jax.jit(lambda: decoder.init(0))()
folder = pathlib.Path(sys.argv[1])
compiled = {}


def run(data, fsdp, *, save=False, restore=False):
    config = toys.config(
        f"mesh.data={data}", f"mesh.fsdp={fsdp}", "optimizer.accumulate=2",
        "stages.1.tokens=256", "stages.0.tokens=128", "stages.0.steps=1",
    )
    mesh = sharding.make_mesh(config.mesh)
    tx = optim.optimizer(config, decoder.vocab_size)
    shapes = steps.state_shapes(decoder, tx, config, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.device_put(steps.init_state(params, tx, config), placed)
    checkpoints = checkpoint.open_folder(folder, keep=9)
    source, first = pipeline.Steps(config, toys.SOURCES), 1
    if restore:
        state = checkpoint.newest(checkpoints, shapes, print).state
        first = 3
    if (data, fsdp) not in compiled:
        compiled[data, fsdp] = steps.make_train_step(decoder, tx, config, mesh)
    step = compiled[data, fsdp]
    losses = []
    for i in range(first, 5):
        state, metrics = step(state, sharding.place(source[i], mesh))
        losses.append(float(metrics["loss"].sum() / metrics["weight"].sum()))
        if save and i == 2:
            checkpoints.save(i, state, {})
            checkpoints.wait()
    checkpoints.close()

    def share(tree):
        leaves = jax.tree.leaves(tree)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        return held / sum(leaf.nbytes for leaf in leaves)

    up = state.params["layers"][0]["mlp"]["up"]["kernel"]
    tokens = sharding.place(source[1], mesh).tokens
    return {
        "losses": losses,
        "norm": float(metrics["grad_norm"]),
        "params": share(state.params),
        "average": share(state.average),
        "moments": share(state.opt_state),
        "up": [list(up.shape), list(up.addressable_shards[0].data.shape)],
        "rows": [len(tokens), len(tokens.addressable_shards[0].data)],
    }


found = {f"{d}x{f}": run(d, f, save=(d, f) == (2, 2)) for d, f in
         [(1, 1), (4, 1), (1, 4), (2, 2)]}
found["restored on 1x4"] = run(1, 4, restore=True)
found["restored on 1x1"] = run(1, 1, restore=True)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    environment = os.environ | {
        "XLA_FLAGS": " ".join(
            ["--xla_force_host_platform_device_count=4", *compiling.FLAGS]
        ),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    folder = str(tmp_path_factory.mktemp("sharded"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", ["4x1", "1x4", "2x2"])
def test_losses_are_those_of_one_device(found, mesh):
    assert found[mesh]["losses"] == pytest.approx(found["1x1"]["losses"], rel=1e-4)
    assert found[mesh]["norm"] == pytest.approx(found["1x1"]["norm"], rel=1e-3)
    assert len({round(loss, 3) for loss in found["1x1"]["losses"]}) == 4


@pytest.mark.parametrize(
    ("mesh", "parts"), [("1x1", 1), ("4x1", 1), ("1x4", 4), ("2x2", 2)]
)
def test_weights_mean_and_moments_are_split_over_fsdp(found, mesh, parts):
    for name in ("params", "average", "moments"):
        # All axes of this model but the steps counted are multiples of four.
        assert found[mesh][name] == pytest.approx(1 / parts, rel=0.01)
    # The largest axis: 16 inputs, 24 outputs.
    assert found[mesh]["up"] == [[16, 24], [16, 24 // parts]]


@pytest.mark.parametrize(
    ("mesh", "devices"), [("1x1", 1), ("4x1", 4), ("1x4", 4), ("2x2", 4)]
)
def test_rows_are_split_over_both_axes(found, mesh, devices):
    rows, own = found[mesh]["rows"]
    assert rows == 8
    assert own == rows // devices


@pytest.mark.parametrize("mesh", ["1x4", "1x1"])
def test_a_checkpoint_goes_on_over_another_mesh(found, mesh):
    expected = found["1x1"]["losses"][2:]
    assert found[f"restored on {mesh}"]["losses"] == pytest.approx(expected, rel=1e-4)
