"""LoRA: adapters alone are trained, saved and resumed beside weights that stay."""

import json
import pathlib
import shutil

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import models
from kvjax.training import checkpoint, memory, optim, sharding, step
from kvjax.training.batch import Batch
from models import llama
from models.llama import adapters

OPTIONS = adapters.Options(2, 4.0, targets=adapters.Targets(modules_to_save=("norm",)))
BASE = toys.decoder()
BESIDE = llama.AdaptedDecoder(BASE, OPTIONS)
SECTIONS = {
    "model": {"checkpoint": "any"},
    "lora": {"rank": 2, "alpha": 4.0, "modules_to_save": ["norm"]},
    "stages": [{"steps": 6, "tokens": 64, "lengths": {16: 1}, "mixture": {"count": 1}}],
    "optimizer": {"lr": 1e-2, "warmup": 1, "schedule": "constant", "accumulate": 2},
    "evaluate": {"every": 3, "tokens": 64},
    "checkpoint": {"every_steps": 3, "keep": 9},
    "log": {"every": 1, "tensorboard": False},
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run compiles the same few programs."""
    with compiling.cache(tmp_path_factory.mktemp("xla")):
        yield


@pytest.fixture(scope="module")
def weights():
    return jax.jit(lambda: BASE.init(0))()


def train(out, weights, *changes, resume=False, decoder=BESIDE, **sections):
    settings = toys.config(*changes, **(SECTIONS | sections))
    return toys.train(
        out,
        settings,
        decoder=decoder,
        init=lambda shardings: decoder.init(0, weights),
        frozen=lambda shardings: weights,
        resume=resume,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvjax.training.step.causal_attention", toys.attention)
        return out, train(out, weights)


def size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_only_adapters_are_trained_and_saved(whole, weights):
    out, result = whole
    shapes = jax.eval_shape(lambda: BESIDE.init(0, weights))
    assert jax.tree.structure(result.weights) == jax.tree.structure(shapes)
    first = BESIDE.init(0, weights)
    for name, value in result.weights.items():
        assert (value != first[name]).any(), name
    saved = checkpoint.open_folder(out, keep=9)
    mesh = sharding.make_mesh(toys.config(**SECTIONS).mesh)
    settings = toys.config(**SECTIONS)
    tx = optim.optimizer(settings, BESIDE.vocab_size)
    like = step.state_shapes(BESIDE, tx, settings, mesh)
    state = checkpoint.restore(saved, 6, like).state
    saved.close()
    assert state.params.keys() == shapes.keys()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Adapters and two moments of each, and a few numbers.
    assert held < 3.1 * sum(4 * leaf.size for leaf in shapes.values())
    leaves = [
        np.asarray(value).tobytes() for _, value in sorted(result.weights.items())
    ]
    assert (out / "adapter" / "weights").read_bytes() == b"".join(leaves)
    assert not (out / "model").exists()


def test_resumed_it_ends_with_the_same_bits(whole, weights, tmp_path):
    out, _ = whole
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "6")
    shutil.rmtree(again / "adapter")
    train(again, weights, resume=True)
    written = [(o / "adapter" / "weights").read_bytes() for o in (out, again)]
    assert written[0] == written[1]
    assert losses(again) == losses(out)

    other = jax.tree.map(lambda leaf: leaf, weights)
    other["norm"] = {"weight": other["norm"]["weight"].at[3].add(1e-3)}
    with pytest.raises(ValueError, match=r"the weights beside which this run trains"):
        train(again, other, "stages.0.steps=7", resume=True)
    with pytest.raises(ValueError, match=r"may not change lora\.alpha \(4\.0 was"):
        train(again, weights, "lora.alpha=5", resume=True)


def test_embedded_softmax_learns_to_count(tmp_path):
    """The planted task: the published weights beside it do not count so far."""
    model = models.load("embedded-softmax", dtype="float32")
    targets = adapters.Targets(("q_proj", "v_proj", "up_proj"))
    options = adapters.Options(4, 16.0, targets=targets)
    decoder = llama.AdaptedDecoder(model.decoder, options)
    stages = [SECTIONS["stages"][0] | {"steps": 12, "tokens": 256, "lengths": {32: 1}}]
    changes = {"stages": stages, "evaluate": {"every": 0}}
    changes |= {"optimizer": SECTIONS["optimizer"] | {"lr": 2e-2, "accumulate": 1}}
    changes |= {"checkpoint": {"every_steps": 12}}
    before = jax.tree.map(np.asarray, model.params)
    result = train(tmp_path / "run", model.params, decoder=decoder, **changes)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 1
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    small = sum(4 * leaf.size for leaf in result.weights.values())
    large = sum(leaf.nbytes for leaf in jax.tree.leaves(before))
    # Names and indices of arrays take some too.
    assert size(tmp_path / "run" / "checkpoints") < 3 * small + 200_000 < large / 5


def batch(rows=4, length=16):
    tokens = (
        np.arange(rows * length).reshape(rows, length).astype(np.int32) % toys.VOCAB
    )
    return Batch(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(tokens + 1) % toys.VOCAB,
        weights=jnp.ones((rows, length)),
        answers=jnp.zeros((rows, length), bool),
        sources=jnp.zeros((rows, length), jnp.int32),
        segments=None,
        positions=None,
    )


def test_memory_is_planned_with_the_frozen_weights(weights):
    settings = toys.config(**SECTIONS)
    (planned,) = memory.step_memory(BESIDE, settings)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    trained = sum(4 * leaf.size for leaf in jax.tree.leaves(BESIDE.param_shapes()))
    assert planned.frozen == held
    assert 3 * trained < planned.state < 3 * trained + 100
    assert planned.peak == planned.state + held + planned.batch + planned.temporaries
    half = toys.config("precision.compute=bfloat16", **SECTIONS)
    (shapes,) = step.frozen_shapes(BESIDE, half, sharding.make_mesh(half.mesh))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}


def test_half_precision_computes_as_the_whole_model_in_it(weights):
    """The frozen weights are kept in what they would be cast to."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    joined = BESIDE.join(half, BESIDE.init(0, weights))
    one, other = (
        jax.jit(step.token_losses, static_argnums=0, static_argnames="compute")(
            decoder, params, batch(), compute="bfloat16"
        )[0]
        for decoder, params in ((BESIDE, joined), (BASE, weights))
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model={config: {model_type: llama}, tokenizer: train}"],
         "lora is trained beside the weights of a model, and model.checkpoint is not"),
        (["lora.bias=all"], "lora.bias='all': Input should be 'none'"),
        (["lora.modules_to_save=[lm_head]"], "'lm_head' is no norm: matrices are trai"),
        (["lora.rank=0"], "lora.rank=0: Input should be greater than or equal to 1"),
        (["lora.dropout=0.1"], "unknown key lora.dropout"),
        (["lora.target_modules="], "lora.target_modules"),
    ],
)  # fmt: skip
def test_mistakes_in_the_section_are_named(changes, message):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        toys.config(*changes, **SECTIONS)
    assert message in str(error.value)
