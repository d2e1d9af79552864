"""LoRA adapters: PEFT's files are read and written, and merged is what is beside."""

import json
import math
import shutil

import checkpoints
import gguf_files
import jax
import jax.numpy as jnp
import make_adapters
import numpy as np
import oracles.llama
import pytest
import toys
from make_adapters import CONFIG, FOLDER
from safetensors.numpy import load_file
from tiny import byte_tokenizer

import models
from kvjax import files
from models import llama
from models.llama import adapters, merged, packed
from models.llama import tensors as tensor_files

TOLERANCE = 2e-5  # of logits in float32, whose deviation is 1
TOKENS = make_adapters.tokens()
PLAIN = checkpoints.weights(CONFIG)
DECODER = llama.load_decoder(CONFIG)


@jax.jit
def forward(params):
    """Logits of our model, weights merged or not."""
    attend = toys.attention(DECODER.rope)
    return DECODER.logits(params, DECODER.hidden(params, TOKENS[None], attend))[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("base"), CONFIG)


@pytest.fixture(scope="module")
def params(base):
    return llama.load(base, CONFIG)[1]


def merged_tensors(folder, adapter):
    found = merged.merge(tensor_files.from_safetensors(folder), adapter)
    return {name: found.read(name) for name in found.files}


def beside(**options):
    targets = adapters.Targets(
        options.pop("target_modules", adapters.ALL_LINEAR),
        options.pop("modules_to_save", ()),
    )
    options = {"rank": 2, "alpha": 3.0, **options, "targets": targets}
    return llama.AdaptedDecoder(DECODER, adapters.Options(**options))


def trained(decoder, params, seed=0):
    """Adapters in which every number counts."""
    return {
        name: value
        + 0.2 * checkpoints.uniform(seed + index, value.size).reshape(value.shape)
        for index, (name, value) in enumerate(decoder.init(0, params).items())
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, params):
    """An adapter of every matrix, and of a norm, as a run ends with it."""
    decoder = beside(modules_to_save=("input_layernorm",))
    folder = tmp_path_factory.mktemp("adapters") / "ours"
    decoder.save(trained(decoder, params), folder, made_for="tiny-llama")
    return folder


def changed(folder, to, **changes):
    """A copy with other keys in its config."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    path = to / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))
    return to


def test_peft_logits(base):
    """Dropout, rsLoRA, patterns, layers, expressions and norms, as PEFT reads them."""
    with np.load(FOLDER / make_adapters.LOGITS) as arrays:
        expected = dict(arrays)
    assert expected.keys() == make_adapters.CASES.keys()
    plain = oracles.llama.logits(PLAIN, CONFIG, TOKENS)
    for case, logits in expected.items():
        adapter = adapters.read(FOLDER / case)
        assert np.abs(logits - plain).max() > 0.1
        sums = merged_tensors(base, adapter)
        exact = oracles.llama.logits(sums, CONFIG, TOKENS)
        np.testing.assert_allclose(exact, logits, atol=1e-5, rtol=0, err_msg=case)
        _, params = llama.load(base, CONFIG, adapters=(adapter,))
        np.testing.assert_allclose(
            forward(params), logits, atol=TOLERANCE, rtol=0, err_msg=case
        )


def test_merged_is_beside_in_float64(base, params, saved):
    """W + scale B A is summed once; the oracle never sums it; training neither."""
    adapter = adapters.read(saved)
    sums = merged_tensors(base, adapter)
    norms = {f"{name}.weight": array for name, array in adapter.replaced.items()}
    apart = oracles.llama.logits(PLAIN | norms, CONFIG, TOKENS, adapter.factors)
    np.testing.assert_allclose(
        oracles.llama.logits(sums, CONFIG, TOKENS), apart, atol=1e-10, rtol=0
    )
    decoder = beside(modules_to_save=("input_layernorm",))
    joined = decoder.join(params, trained(decoder, params))
    assert len(adapter.factors) == 14
    for logits in (
        forward(llama.load(base, CONFIG, adapters=(adapter,))[1]),
        forward(joined),
    ):
        np.testing.assert_allclose(logits, apart, atol=TOLERANCE, rtol=0)


def test_before_training_it_is_the_model_bit_for_bit(base, params, tmp_path):
    decoder = beside(modules_to_save=("norm",))
    first = decoder.init(5, params)
    np.testing.assert_array_equal(forward(decoder.join(params, first)), forward(params))
    downs = [np.asarray(x) * x.shape[1] ** 0.5 for n, x in first.items() if "_A" in n]
    edges = [np.abs(x).max() for x in downs]
    assert 0.8 < min(edges) <= max(edges) <= 1
    assert len({x.tobytes() for x in downs}) == len(downs) == 14
    decoder.save(first, tmp_path / "zero", made_for="tiny-llama")
    _, same = llama.load(base, CONFIG, adapters=(adapters.read(tmp_path / "zero"),))
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_gradient_is_of_adapters_alone(params):
    """No product has the size of a matrix: 7 tokens, 32 and 48 wide, rank 2."""
    decoder = beside()
    first = decoder.init(0, params)

    def loss(adapted, frozen):
        attend = toys.attention(DECODER.rope)
        hidden = decoder.hidden(decoder.join(frozen, adapted), TOKENS[None, :7], attend)
        return decoder.logits(frozen, hidden).sum()

    def products(argument):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argument))(first, params)
        text = str(jaxpr)
        return [line for line in text.splitlines() if "dot_general" in line]

    shapes = [f"f32[{a},{b}]" for a in (32, 48, 16) for b in (32, 48, 16)]
    assert not any(shape in line for line in products(0) for shape in shapes)
    assert any(shape in line for line in products(1) for shape in shapes)


def test_written_as_peft_writes(params, tmp_path):
    """Names, shapes, dtypes and config of the same settings."""
    decoder = beside(use_rslora=True, modules_to_save=("input_layernorm",))
    decoder.save(trained(decoder, params), tmp_path / "a", made_for="tiny-llama")
    theirs, ours = (
        {n: (x.shape, x.dtype) for n, x in load_file(f / adapters.TENSORS).items()}
        for f in (FOLDER / "linear", tmp_path / "a")
    )
    assert ours == theirs
    theirs, ours = (
        json.loads((f / adapters.CONFIG).read_text("utf-8"))
        for f in (FOLDER / "linear", tmp_path / "a")
    )
    modules = {name.rpartition(".")[2] for name in theirs.pop("target_modules")}
    assert set(ours.pop("target_modules")) == modules
    assert ours == {key: theirs[key] for key in ours}
    assert not (tmp_path / "a" / adapters.OWN).exists()
    folder = tmp_path / "b"
    decoder.save(trained(decoder, params), folder, made_for="x", dtype="bfloat16")
    half = load_file(folder / adapters.TENSORS)
    assert {x.dtype.name for x in half.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=[3] is not supp"),
        ({"something_new": {"a": 1}}, "something_new={'a': 1} is not supported"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be above 0"),
        ({"r": "two"}, "r='two' must be of type int"),
        ({"r": 3}, "has rank 2, adapter_config.json says 3; one of"),
        ({"target_modules": "(q"}, "'(q' is no regular expression of modules"),
        ({"target_modules": [3]}, "target_modules=[3] must hold strs"),
        ({"rank_pattern": {"q_proj": "x"}}, "must hold numbers above 0"),
        ({"modules_to_save": ["norm"]}, "has nothing for model.layers.0.post_att"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(base, saved, tmp_path, changes, message):
    folder = changed(saved, tmp_path / "copy", **changes)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        merged_tensors(base, adapters.read(folder))
    assert message in str(error.value)


def test_dropout_and_beginnings_change_nothing(base, saved, tmp_path):
    changes = {"lora_dropout": 0.9, "init_lora_weights": "gaussian", "use_dora": False}
    copy = adapters.read(changed(saved, tmp_path / "copy", **changes))
    original = adapters.read(saved)
    for name, factors in original.factors.items():
        for one, other in zip(factors, copy.factors[name], strict=True):
            np.testing.assert_array_equal(one, other)
    norsl = adapters.read(changed(saved, tmp_path / "rs", use_rslora=True))
    assert {x.scale for x in norsl.factors.values()} == {3 / math.sqrt(2)}
    assert {x.scale for x in original.factors.values()} == {1.5}


def test_tensors_that_are_not_supported_are_named(saved, tmp_path):
    folder = changed(saved, tmp_path / "copy")
    arrays = load_file(saved / adapters.TENSORS)
    beginning = "base_model.model.model.layers.0.self_attn.q_proj"
    spoilt = {
        "layers.0.self_attn.q_proj.lora_magnitude_vector is not supported": {
            f"{beginning}.lora_magnitude_vector": np.ones(3, np.float32)
        },
        "embed_tokens.weight is not supported": {
            "base_model.model.model.embed_tokens.weight": np.ones((3, 2), np.float32)
        },
        "do not fit each other": {f"{beginning}.lora_B.weight": np.ones((32, 3))},
        "holds integers, NaN or infinite": {
            f"{beginning}.lora_B.weight": np.full((32, 2), np.nan)
        },
    }
    for message, change in spoilt.items():
        files.save_tensors(folder / adapters.TENSORS, arrays | change)
        with pytest.raises(ValueError, match=message):
            adapters.read(folder)
    del arrays[f"{beginning}.lora_B.weight"]
    files.save_tensors(folder / adapters.TENSORS, arrays)
    with pytest.raises(ValueError, match="only one of lora_A and lora_B of mo"):
        adapters.read(folder)
    (folder / adapters.TENSORS).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no adapter_model\.safetensors; an"
    ):
        adapters.read(folder)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json: give the"):
        adapters.read(tmp_path)


def test_an_adapter_of_another_model_is_one_line_with_both(saved, tmp_path):
    adapter = adapters.read(saved)
    others = {
        "sizes": (
            CONFIG | {"intermediate_size": 64},
            r"tiny-llama, in which model\.layers\.0\.mlp\.down_proj\.weight is "
            r"\(32, 48\): that of .*sizes is \(32, 64\)",
        ),
        "fewer": (
            CONFIG | {"num_hidden_layers": 1},
            r"ours was made for tiny-llama: .*fewer has no model\.layers\.1\.input_lay",
        ),
        "more": (
            CONFIG | {"num_hidden_layers": 3},
            r"ours was made for tiny-llama: it has nothing for model\.layers\.2\..*, "
            r"model\..* and 4 more of .*more, which its adapter_config\.json asks",
        ),
    }
    for name, (config, message) in others.items():
        folder = checkpoints.write(tmp_path / name, config)
        with pytest.raises(ValueError, match=message):
            llama.load(folder, config, adapters=(adapter,))


def test_merged_before_it_is_packed(tmp_path):
    """And a GGUF file's matrices, whose rows lie in another order, are merged too."""
    config = CONFIG | {"intermediate_size": 32, "num_hidden_layers": 1}
    folder = checkpoints.write(tmp_path / "base", config)
    decoder, params = llama.load(folder, config)
    lora = llama.AdaptedDecoder(decoder, adapters.Options(2, 3.0))
    lora.save(trained(lora, params), tmp_path / "a", made_for="tiny")
    adapter = adapters.read(tmp_path / "a")
    _, floats = llama.load(folder, config, adapters=(adapter,))
    _, integers = llama.load(folder, config, packing="int4", adapters=(adapter,))
    pack = jax.jit(packed.pack, static_argnums=1)
    for name in "qk":
        kernel = floats["layers"][0]["attention"][name]["kernel"]
        found = integers["layers"][0]["attention"][name]["kernel"]
        same = jax.tree.map(np.array_equal, found, pack(kernel, "int4"))
        assert all(jax.tree.leaves(same))
        changed = kernel - params["layers"][0]["attention"][name]["kernel"]
        assert np.abs(changed).min(0).max() > 0

    path = gguf_files.write(tmp_path / "model.gguf", config)
    model = models.load(path, adapter=tmp_path / "a")
    assert model.name == f"{path}+{tmp_path / 'a'}"
    jax.tree.map(np.testing.assert_array_equal, model.params, floats)
    named = models.load(model.name)
    assert named.name == model.name == files.located(model.name)
    jax.tree.map(np.testing.assert_array_equal, named.params, floats)
    with pytest.raises(ValueError, match=r"'stored' keeps the integers of .*a changes"):
        models.load(path, weights="stored", adapter=tmp_path / "a")
    # A second one is merged after the first.
    twice = models.load(model.name, adapter=tmp_path / "a")
    assert twice.name == f"{model.name}+{tmp_path / 'a'}" == files.located(twice.name)
    for name in "qk":
        three, two, one = (
            tree["layers"][0]["attention"][name]["kernel"]
            for tree in (twice.params, floats, params)
        )
        np.testing.assert_allclose(three - two, two - one, atol=1e-6)


def test_fused_matrices_are_merged_as_they_lie_there(tmp_path):
    """Phi-3's adapter is of qkv_proj; one of ours could not be read there again."""
    twin = checkpoints.FAMILIES["phi3"]
    folder = checkpoints.write_family(tmp_path / "phi3", "phi3")
    stored = load_file(folder / "model.safetensors")
    modules = [name for name in stored if name.endswith("qkv_proj.weight")]
    arrays = {}
    for index, name in enumerate(modules):
        outputs, inputs = stored[name].shape
        module = name.removesuffix(".weight")
        down, up = (
            checkpoints.uniform(index + n, 2 * s)
            for n, s in ((0, inputs), (9, outputs))
        )
        arrays[f"{module}.lora_A.weight"] = down.reshape(2, inputs)
        arrays[f"{module}.lora_B.weight"] = up.reshape(outputs, 2)
    options = adapters.Options(2, 3.0, targets=adapters.Targets(("qkv_proj",)))
    adapters.write(tmp_path / "a", arrays, options, made_for="phi3")
    _, params = llama.load(
        folder, twin.config, adapters=(adapters.read(tmp_path / "a"),)
    )
    first = modules[0].removesuffix(".weight")
    whole = stored[modules[0]] + 1.5 * (
        arrays[f"{first}.lora_B.weight"] @ arrays[f"{first}.lora_A.weight"]
    )
    attention = params["layers"][0]["attention"]
    kernels = [np.asarray(attention[part]["kernel"]).T for part in "qkv"]
    np.testing.assert_allclose(np.concatenate(kernels), whole, atol=1e-5)
    with pytest.raises(ValueError, match="model_type='phi3' has its matrices f"):
        models.check_adaptable(folder)


def test_an_adapter_may_bring_its_attention(params, tmp_path):
    """What PEFT has no word for lies beside its files; what is saved merged has it."""
    checkpoints.write(tmp_path / "base", CONFIG)
    llama.tokenizer.save(byte_tokenizer(), tmp_path / "base")
    lora = beside(target_modules=("q_proj",))
    lora.save(trained(lora, params), tmp_path / "a", made_for="b", attention_alpha=1.5)
    merged_model = models.load(tmp_path / "base", adapter=tmp_path / "a")
    assert merged_model.decoder.alpha == 1.5
    assert models.load_decoder(merged_model.name) == merged_model.decoder
    assert models.load_decoder(tmp_path / "base").alpha == 1
    models.save_pretrained(merged_model, tmp_path / "merged")
    again = models.load(tmp_path / "merged")
    assert again.decoder == merged_model.decoder
    jax.tree.map(np.testing.assert_array_equal, again.params, merged_model.params)
    (tmp_path / "a" / adapters.OWN).write_text('{"attention_alpha": 0.5}')
    with pytest.raises(ValueError, match=r"attention_alpha=0\.5 must be at least 1"):
        models.load_decoder(tmp_path / "base", adapter=tmp_path / "a")


def test_targets_that_mean_nothing_are_refused():
    known = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=f"target_modules=qproj is no matrix.*{known}"):
        beside(target_modules=("q_proj", "qproj"))
    with pytest.raises(ValueError, match="target_modules=proj is no matrix of the mod"):
        beside(target_modules=("proj",))  # parts of a name are whole
    with pytest.raises(ValueError, match="target_modules=q_proj is no matrix of the"):
        beside(target_modules="q_proj")  # an expression of whole names
    with pytest.raises(ValueError, match="modules_to_save=last_norm is no norm of the"):
        beside(modules_to_save=("last_norm",))
    assert (
        len(beside(target_modules=("self_attn.q_proj", "lm_head")).param_shapes()) == 6
    )
    assert jnp.float32 == beside().param_shapes().popitem()[1].dtype
