"""Packed weights, against a quantizer in NumPy's float64 that shares no code."""

import json
from typing import Any

import checkpoints
import gguf_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tokenizers_made import write_byte_level

import models
from kvjax import registry
from kvjax.decoding import saved_prompt
from models.llama import packed

# Its output is not the embedding, and groups divide all of it.
CONFIG = checkpoints.CONFIGS["gqa"] | {"intermediate_size": 64}
PACKED = ("attention", "q"), ("attention", "k"), ("attention", "v"), ("attention", "o")
PACKED += ("mlp", "gate"), ("mlp", "up"), ("mlp", "down")


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "checkpoint"
    checkpoints.write(directory, CONFIG)
    write_byte_level(directory)
    return directory


def rounded(matrix: np.ndarray, weights: str) -> np.ndarray:
    """What the format holds of a matrix (in, out), one number after the other."""
    out = np.zeros(matrix.shape)
    inputs, outputs = matrix.shape
    for column in range(outputs):
        for start in range(0, inputs, 32):
            group = slice(start, start + 32)
            numbers = matrix[group, column].astype(np.float64)
            most = {"int8": 255, "int4": 15}[weights]
            least = float(numbers.min().astype(ml_dtypes.bfloat16))
            # In float32: which bfloat16 is nearest must not depend on the width.
            top, bottom = np.float32(numbers.max()), np.float32(least)
            wide = top / np.float32(most) - bottom / np.float32(most)
            step = float(wide.astype(ml_dtypes.bfloat16))
            counts = 0
            if step > 0:
                counts = np.clip(np.rint((numbers - least) / step), 0, most)
            out[group, column] = least + max(step, 0.0) * counts
    return out


def check(found: np.ndarray, matrix: np.ndarray, weights: str) -> None:
    """Numbers are the oracle's; but for ties a step of their group beside them."""
    wanted = rounded(matrix, weights)
    groups = matrix.astype(np.float64).reshape(-1, 32, matrix.shape[1])
    steps = np.ptp(groups, axis=1) / {"int8": 255, "int4": 15}[weights]
    error = np.abs(found - wanted) / np.maximum(np.repeat(steps, 32, 0), 1e-300)
    is_same = (error < 1e-3) | np.isclose(found, wanted, rtol=3e-6, atol=0)
    assert is_same.mean() > 0.998
    assert error[~is_same].max(initial=0) < 1.01


def unpacked(matrix) -> np.ndarray:
    """The floats, by the product with every unit vector."""
    return np.asarray(packed.times(jnp.eye(matrix.shape[0]), matrix))


def made(kind: str, shape=(64, 24)) -> np.ndarray:
    rng = np.random.default_rng(7)
    matrix = rng.standard_normal(shape)
    if kind == "zeros":
        matrix[:] = 0
    elif kind == "zero columns":
        matrix[:, ::3] = 0
    elif kind == "equal":
        matrix[:] = 0.7523  # bfloat16 has what is next above
    elif kind == "far":  # all above, or all below, the bfloat16 that is their lowest
        matrix = 5.02 + 0.05 * matrix
    elif kind == "outlier":
        matrix[5, 3] = 900
    elif kind == "tiny":
        matrix *= 1e-34
    elif kind == "huge":
        matrix *= 1.5e38 / np.abs(matrix).max()
    return matrix.astype(np.float32)


KINDS = ["normal", "zeros", "zero columns", "equal", "far", "outlier", "tiny", "huge"]


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_the_nearest_that_the_format_holds(weights, kind):
    matrix = made(kind)
    kept = packed.pack(jnp.asarray(matrix), weights)
    found = unpacked(kept)
    check(found, matrix, weights)
    assert (kept.scales >= 0).all()
    if kind == "zeros":
        assert not found.any()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_an_outlier_widens_the_steps_of_its_own_group_alone(weights):
    plain, outlier = (
        unpacked(packed.pack(jnp.asarray(made(kind)), weights))
        for kind in ("normal", "outlier")
    )
    differ = np.zeros((64, 24), bool)
    differ[:32, 3] = True
    np.testing.assert_array_equal(plain[~differ], outlier[~differ])
    assert (plain[differ] != outlier[differ]).sum() > 16


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [24, 600])
def test_products_are_those_of_the_floats(weights, rows, dtype, outputs, monkeypatch):
    monkeypatch.setattr(packed, "_CHUNK", 300)  # 24 is one, 600 are two
    rng = np.random.default_rng(3)
    matrix = packed.pack(jnp.asarray(made("normal", (160, outputs))), weights)
    x = jnp.asarray(rng.standard_normal((rows, 160)), dtype)
    found = packed.times(x, matrix)
    wanted = np.asarray(x, np.float64) @ unpacked(matrix)
    assert found.dtype == jnp.float32
    norm = np.linalg.norm(wanted, axis=1, keepdims=True)
    # Many rows in bfloat16 meet matrices in bfloat16.
    tolerance = 4e-3 if dtype == "bfloat16" and rows == 40 else 2e-6
    assert (np.abs(found - wanted) / norm).max() < tolerance


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_matrices_are_packed_and_nothing_else(checkpoint, weights):
    floats = models.load(checkpoint)
    model = models.load(checkpoint, weights=weights)

    def same(node, other):
        if isinstance(node, packed.Packed):
            assert node.values.dtype == jnp.uint8
            check(unpacked(node), np.asarray(other), weights)
            return "packed"
        np.testing.assert_array_equal(node, other)
        return "float"

    is_leaf = lambda node: isinstance(node, packed.Packed)  # noqa: E731
    found = jax.tree.map(same, model.params, floats.params, is_leaf=is_leaf)
    for layer in found["layers"].values():
        for module, part in PACKED:
            assert layer[module][part] == {"kernel": "packed"}
        assert layer["attention_norm"] == layer["mlp_norm"] == {"weight": "float"}
    assert found["output"] == {"kernel": "packed"}
    assert found["embedding"] == "float"
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), model.params)
    shapes = llama_shapes(model.decoder, weights)
    assert wanted == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(floats.params))
    assert f"{count:,} parameters (float32, {weights})" in repr(model)


def llama_shapes(decoder, weights):
    return models.llama.weights.packed_shapes(decoder.config, weights)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_model_runs_as_with_the_rounded_floats(checkpoint, weights):
    packed_model = models.load(checkpoint, weights=weights)
    params = jax.tree.map(
        lambda leaf: (
            jnp.asarray(unpacked(leaf)) if isinstance(leaf, packed.Packed) else leaf
        ),
        packed_model.params,
        is_leaf=lambda node: isinstance(node, packed.Packed),
    )
    decoder: Any = packed_model.decoder
    tokens = jnp.arange(6)[None]

    def attention(layer, q, k, v):
        return q + jnp.repeat(k + v, q.shape[1] // k.shape[1], 1)

    def logits(params):
        hidden = decoder.hidden(params, tokens, attention)
        return decoder.logits(params, hidden)

    found, wanted = jax.jit(logits)(packed_model.params), logits(params)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    x = decoder.embed(params, tokens)
    layers = [decoder.layer_params(p)[1] for p in (packed_model.params, params)]
    outs = [decoder.run_layer(p, x, lambda q, k, v: q) for p in layers]
    np.testing.assert_allclose(*outs, atol=2e-5 * np.abs(outs[1]).max())


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf_is_packed_from_its_floats(tmp_path, kind):
    file = gguf_files.write(tmp_path / "tiny.gguf", CONFIG, kind)
    floats, found = models.load(file), models.load(file, weights="int4")
    kernel = floats.params["layers"][0]["mlp"]["down"]["kernel"]
    down = found.params["layers"][0]["mlp"]["down"]["kernel"]
    check(unpacked(down), np.asarray(kernel), "int4")


def test_a_saved_prefix_goes_on_under_its_own_weights_alone(checkpoint, tmp_path):
    """Bit for bit in a model that was packed anew; and quantised, with a residual."""
    spec = "quantize:residual=3+full"
    method, prompts = registry.parse(spec), [list(range(3, 24)), [5, 7]]
    model, again, *others = (
        models.load(checkpoint, weights=weights)
        for weights in ("int4", "int4", "int8", None)
    )
    read = saved_prompt.read(model, method, prompts, room=6)
    read = saved_prompt.finish(model, method, read)
    saved_prompt.save(tmp_path / "a", model, read, method_name=spec)
    found = saved_prompt.restore(tmp_path / "a", again, method, method_name=spec)
    bits, expected = (
        [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x)]
        for x in (found, read)
    )
    assert bits == expected
    options = {"max_new_tokens": 6, "eos_ids": ()}
    said = saved_prompt.generate(model, method, read, **options)
    assert saved_prompt.generate(again, method, found, **options) == said
    for other in others:
        with pytest.raises(ValueError, match="their weights differ"):
            saved_prompt.restore(tmp_path / "a", other, method, method_name=spec)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_shardings_are_those_of_the_floats(checkpoint, weights):
    mesh = jax.make_mesh((2,), ("tensor",))
    whole = jax.NamedSharding(mesh, jax.P())
    split = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    reference = models.load(checkpoint, weights=weights)
    decoder: Any = reference.decoder
    shapes = decoder.param_shapes()
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: split if path[-1].key == "kernel" else whole, shapes
    )
    found = models.load(checkpoint, weights=weights, device=shardings)
    jax.tree.map(np.testing.assert_array_equal, found.params, reference.params)
    up = found.params["layers"][0]["mlp"]["up"]["kernel"]
    for array in up:
        assert array.addressable_shards[0].data.shape[-1] == up.shape[1] // 2
    second = jax.devices()[1]
    placed = models.load(checkpoint, weights=weights, device=second)
    assert all(leaf.devices() == {second} for leaf in jax.tree.leaves(placed.params))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_footprint_counts_what_is_loaded(checkpoint, weights):
    model = models.load(checkpoint, weights=weights)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    footprint = models.footprint(model.decoder, weights)
    assert footprint.held == held
    assert footprint.read == held - model.params["embedding"].nbytes


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_inputs_that_groups_do_not_divide(tmp_path, weights):
    directory = tmp_path / "odd"
    checkpoints.write(directory, CONFIG | {"intermediate_size": 72})
    write_byte_level(directory)
    message = (
        r"mlp\.down_proj\.weight has 72 inputs, which groups of 32 do not divide: "
        f"leave weights='{weights}' out"
    )
    with pytest.raises(ValueError, match=message):
        models.load(directory, weights=weights)
    with pytest.raises(ValueError, match=message):
        models.footprint(models.load_decoder(directory), weights)


def test_other_formats_are_refused(checkpoint):
    message = "weights='int2' must be 'int8', 'int4', 'stored', or None"
    with pytest.raises(ValueError, match=message):
        models.load(checkpoint, weights="int2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=message):
        models.footprint(models.load_decoder(checkpoint), "int2")  # pyright: ignore[reportArgumentType]


def test_packed_weights_are_not_saved(checkpoint, tmp_path):
    model = models.load(checkpoint, weights="int8")
    message = "weights='int8' cannot be saved: load the model with weights=None"
    with pytest.raises(ValueError, match=message):
        models.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_damaged_weights_are_named_before_they_are_packed(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    arrays = checkpoints.weights(config)
    name = "model.layers.0.self_attn.q_proj.weight"
    arrays[name][3, 4] = np.nan
    models.llama.weights.files.save_tensors(
        checkpoint / "model.safetensors", arrays, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"tensor {name} holds NaN or infinite"):
        models.load(checkpoint, weights="int4")
