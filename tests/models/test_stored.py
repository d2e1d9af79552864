"""A GGUF file's own codes and scales, kept: `gguf`'s floats of them are the oracle."""

import re
import tracemalloc
from typing import Any

import checkpoints
import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2_reference as reference

import models
from kvjax import registry
from kvjax.decoding import saved_prompt
from models.gguf import blocks
from models.llama import packed

KINDS = list(blocks.FORMATS)
# Sizes that the types' blocks divide: 32 inputs, and 256 of the K types.
CONFIG = checkpoints.CONFIGS["gqa"] | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}
WIDE = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
PER_WEIGHT = {  # bits, scales and minima counted
    "Q8_0": 8.5,
    "Q5_0": 8.5,
    "Q5_1": 9,
    "Q5_K": 10,
    "Q4_0": 4.5,
    "Q4_1": 5,
    "Q4_K": 6,
}


def rows_of(kind: str, outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Random blocks: every code and six-bit scale, of scales that are about 0.01."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (outputs, inputs // size, num_bytes), np.uint8)
    halves = 1 if kind in ("Q8_0", "Q5_0", "Q4_0") else 2  # a scale, and a minimum
    deviation = 3e-4 if kind.endswith("K") else 0.01
    scales = rng.normal(0, deviation, (*made.shape[:2], halves)).astype(np.float16)
    if outputs > 2:
        scales[0], scales[1] = 0, np.float16(6e-8)  # nothing, and a subnormal
    if kind in ("Q3_K", "Q6_K"):  # the scale comes last
        made[..., -2:] = scales[..., :1].view(np.uint8)
    else:
        made[..., : 2 * halves] = scales.view(np.uint8)
    return made.reshape(outputs, -1)


def floats_of(rows: np.ndarray, kind: str) -> np.ndarray:
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])


def write(path, config, kind, kinds=None, **options):
    """A file whose matrices are random blocks; `kinds` are of names that differ."""
    arrays: dict[str, Any] = {}
    for number, (name, array) in enumerate(gguf_files.tensors(config).items()):
        own = (kinds or {}).get(name, kind)
        if array.ndim == 2 and name != "token_embd.weight" and own != "F32":
            rows = rows_of(own, *array.shape, seed=number)
            arrays[name] = rows, gguf.GGMLQuantizationType[own]
    return gguf_files.write(path, config, arrays=arrays, **options)


def unpacked(matrix) -> np.ndarray:
    return np.asarray(packed.times(jnp.eye(matrix.shape[0]), matrix))


def same_bits(found, wanted) -> None:
    found, wanted = np.asarray(found) + 0.0, np.asarray(wanted) + 0.0  # no -0
    assert found.dtype == wanted.dtype
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_floats_of_gguf_bit_for_bit(kind):
    rows = rows_of(kind, 24, 512)
    found = blocks.read(rows, kind)
    wanted = floats_of(rows, kind)
    assert found.shape == wanted.shape == (24, 512)
    own = blocks.FORMATS[kind]
    assert found.values.dtype == own.codes
    assert found.scales.dtype == own.scales
    assert (found.lowest is not None) == own.has_lowest
    # One product and one sum in float32, as there.
    codes = found.values
    if own.bits == 4:
        halves = codes.reshape(24, -1, 16)
        codes = np.concatenate([halves & 15, halves >> 4], -1)
        codes = codes.reshape(24, -1).astype(np.int32)
        codes -= 0 if found.lowest is not None else 8
    plain = found.scales.astype("f4")[..., None] * codes.reshape(24, -1, 32)
    plain = plain.astype("f4")  # products are exact
    if found.lowest is not None:
        plain += found.lowest.astype("f4")[..., None]
    same_bits(plain.reshape(24, 512), wanted)
    # And so does a product with every unit vector.
    matrix = packed.keep(jax.tree.map(jnp.asarray, found))
    same_bits(unpacked(matrix).T, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("outputs", [24, 600])
def test_products_are_those_of_the_floats(kind, rows, outputs):
    stored = rows_of(kind, outputs, 512)
    matrix = packed.keep(jax.tree.map(jnp.asarray, blocks.read(stored, kind)))
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((rows, 512)), jnp.float32)
    wanted = np.asarray(x, np.float64) @ floats_of(stored, kind).T.astype(np.float64)
    found = packed.times(x, matrix)
    norm = np.linalg.norm(wanted, axis=1, keepdims=True)
    assert (np.abs(found - wanted) / norm).max() < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gqa", "qwen2", "qwen3"])
def test_matrices_of_a_model_are_the_files(tmp_path, kind, name):
    """Rotated rows of a llama too, which stand in another order in the file."""
    sizes = WIDE if kind.endswith("K") else CONFIG
    config = checkpoints.CONFIGS[name] | {
        key: sizes[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    }
    file = write(tmp_path / "tiny.gguf", config, kind)
    floats = models.load(file)
    model = models.load(file, weights="stored")
    is_leaf = lambda node: isinstance(node, packed.Packed)  # noqa: E731

    def same(node, other):
        if not is_leaf(node):
            same_bits(node, other)
            return 0
        assert node.is_stored
        assert node.bits == blocks.FORMATS[kind].bits
        same_bits(unpacked(node), other)
        return 1

    counts = jax.tree.map(same, model.params, floats.params, is_leaf=is_leaf)
    assert sum(jax.tree.leaves(counts)) == 2 * 7 + 1
    assert f"float32, stored int{blocks.FORMATS[kind].bits})" in repr(model)
    assert models.notes(model.decoder, model.params) == ()
    # Bytes, as the file has them but for codes of 5 bits and scales of K types.
    matrices = [x for x in jax.tree.leaves(model.params, is_leaf=is_leaf) if is_leaf(x)]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(matrices))
    assert 8 * held == PER_WEIGHT[kind] * sum(matrix.size for matrix in matrices)
    footprint = models.footprint(model.decoder, "stored", file)
    rest = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert footprint.held == rest
    assert footprint.read == rest - model.params["embedding"].nbytes


def logits(model, tokens):
    """Of attention that only mixes what the projections give."""

    def attention(layer, q, k, v):
        return q + jnp.repeat(k + v, q.shape[1] // k.shape[1], 1)

    @jax.jit
    def run(params):
        hidden = model.decoder.hidden(params, tokens, attention)
        return model.decoder.logits(params, hidden)

    return np.asarray(run(model.params))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_file(tmp_path, kind):
    config = WIDE if kind.endswith("K") else CONFIG
    file = write(tmp_path / "tiny.gguf", config, kind)
    tokens = jnp.arange(6)[None]
    wanted = logits(models.load(file), tokens)
    found = logits(models.load(file, weights="stored"), tokens)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    anew = logits(models.load(file, weights="int4"), tokens)
    assert np.abs(anew - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_other_types_are_rounded_anew_or_stay_floats_and_it_is_said(tmp_path):
    kinds = {"blk.0.ffn_up.weight": "Q6_K", "blk.1.attn_q.weight": "Q3_K"}
    kinds["blk.1.ffn_down.weight"] = "F32"
    file = write(tmp_path / "tiny.gguf", WIDE, "Q4_K", kinds)
    floats, anew, model = (
        models.load(file, weights=weights) for weights in (None, "int8", "stored")
    )
    first, second = (model.params["layers"][layer] for layer in (0, 1))
    for matrix, wanted in (
        (first["mlp"]["up"], anew.params["layers"][0]["mlp"]["up"]),
        (second["attention"]["q"], anew.params["layers"][1]["attention"]["q"]),
    ):
        assert matrix["kernel"].dtype == "int8"
        jax.tree.map(np.testing.assert_array_equal, matrix, wanted)
    same_bits(
        second["mlp"]["down"]["kernel"],
        floats.params["layers"][1]["mlp"]["down"]["kernel"],
    )
    (note,) = models.notes(model.decoder, model.params)
    assert note.startswith("2 of 14 matrices in integers are rounded anew to int8")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert models.footprint(model.decoder, "stored", file).held == held
    assert models.notes(floats.decoder, floats.params) == ()


def test_what_has_no_such_integers(tmp_path):
    file = write(tmp_path / "tiny.gguf", WIDE, "Q6_K")
    message = (
        r"tiny\.gguf: weights='stored' keeps codes with scales of 32 inputs, and there "
        "are none: give 'int8' or 'int4', or None"
    )
    decoder = models.load_decoder(file)
    for fail in (
        lambda: models.load(file, weights="stored"),
        lambda: models.footprint(decoder, "stored", file),
    ):
        with pytest.raises(ValueError, match=message):
            fail()
    # Before anything is looked for, and fetched from a hub.
    for name in ("embedded-softmax", tmp_path, "owner/model", None):
        message = f"integers of a GGUF file, and name={name!r} is none: give 'int8'"
        with pytest.raises(ValueError, match=re.escape(message)):
            models.footprint(decoder, "stored", name)
        if name is not None:
            with pytest.raises(ValueError, match=re.escape(message)):
                models.load(name, weights="stored")


def test_scales_that_are_not_finite_are_named(tmp_path):
    rows = rows_of("Q8_0", 96, 64)
    rows[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
    arrays = {"blk.0.ffn_up.weight": (rows, gguf.GGMLQuantizationType.Q8_0)}
    file = gguf_files.write(tmp_path / "tiny.gguf", CONFIG, "Q8_0", arrays=arrays)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight holds NaN or infinite"):
        models.load(file, weights="stored")


def test_one_matrix_is_read_at_a_time(tmp_path):
    """NumPy's memory while a file is read: of two matrices, as bytes and as codes.

    JAX lets go of the one before as late as when it is called for the next.
    """
    config = WIDE | {"num_hidden_layers": 8, "intermediate_size": 2048}
    file = write(tmp_path / "tiny.gguf", config, "Q8_0")
    largest, layers = 2048 * 256 * 34 // 32, 24 * 2048 * 256
    models.load(file, weights="stored")  # once for what stays
    tracemalloc.start()
    models.load(file, weights="stored")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * largest < layers / 5


def test_shardings_are_those_of_the_floats(tmp_path):
    mesh = jax.make_mesh((2,), ("tensor",))
    whole = jax.NamedSharding(mesh, jax.P())
    split = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    file = write(tmp_path / "tiny.gguf", CONFIG, "Q4_0")
    reference_model = models.load(file, weights="stored")
    decoder: Any = reference_model.decoder
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: split if path[-1].key == "kernel" else whole,
        decoder.param_shapes(),
    )
    found = models.load(file, weights="stored", device=shardings)
    jax.tree.map(np.testing.assert_array_equal, found.params, reference_model.params)
    up = found.params["layers"][0]["mlp"]["up"]["kernel"]
    assert up.values.addressable_shards[0].data.shape[-1] == up.shape[1] // 2


def test_they_are_neither_saved_nor_confused_with_others(tmp_path):
    file = write(tmp_path / "tiny.gguf", CONFIG, "Q4_1")
    model = models.load(file, weights="stored")
    message = "weights='stored' cannot be saved: load the model with weights=None"
    with pytest.raises(ValueError, match=message):
        models.save_pretrained(model, tmp_path / "saved")
    method = registry.parse("full")
    read = saved_prompt.read(model, method, [list(range(3, 24))], room=6)
    read = saved_prompt.finish(model, method, read)
    saved_prompt.save(tmp_path / "a", model, read, method_name="full")
    again = models.load(file, weights="stored")
    found = saved_prompt.restore(tmp_path / "a", again, method, method_name="full")
    options: Any = {"max_new_tokens": 6, "eos_ids": ()}
    said = saved_prompt.generate(model, method, read, **options)
    assert saved_prompt.generate(again, method, found, **options) == said
    for weights in ("int4", "int8", None):
        other = models.load(file, weights=weights)
        with pytest.raises(ValueError, match="their weights differ"):
            saved_prompt.restore(tmp_path / "a", other, method, method_name="full")


def test_a_published_model_says_the_same(smollm2):
    """SmolLM2's file, Q4_1: log-probabilities of a text, to float32 rounding."""
    with np.load(reference.GOLDENS) as arrays:
        tokens = jnp.asarray(arrays["tokens"][:96])
    method = registry.parse("full")
    assert smollm2.is_file()
    found = []
    for weights in (None, "stored"):
        model = models.load("smollm2", dtype="float32", weights=weights)
        spec = model.decoder.cache_spec(1, len(tokens))
        lengths = jnp.full((1,), len(tokens), jnp.int32)

        @jax.jit
        def run(params, decoder=model.decoder, spec=spec, lengths=lengths):
            def attention(layer, q, k, v):
                return method.prefill(method.init(spec), q, k, v, lengths)[1]

            hidden: Any = decoder
            hidden = hidden.hidden(params, tokens[None], attention)
            return jax.nn.log_softmax(decoder.logits(params, hidden[0]))

        found.append(np.asarray(run(model.params)))
    assert np.abs(found[0] - found[1]).max() < 2e-4
    decoder = models.load_decoder("smollm2", dtype="float32")
    footprint = models.footprint(decoder, "stored", "smollm2")
    matrices = footprint.held - decoder.vocab_size * decoder.width * 4
    norms = 4 * decoder.width * (2 * decoder.num_layers + 1)
    layer = 2 * 576 * (576 + 192) + 3 * 576 * 1536
    assert matrices - norms == 30 * layer * 5 // 8
