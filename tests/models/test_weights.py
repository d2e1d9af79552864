"""Checkpoint directories in and out: bit-equal round trips, and clear errors."""

import json
import subprocess
import sys

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from make_goldens import GOLDENS
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers_made import write_byte_level

import models
from kvjax.files import save_tensors
from models import llama

GENERATION = {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """A complete directory in one file; call it with changes to the configuration."""

    def write(name="gqa", dtype=np.float32, **extra):
        directory = tmp_path / "checkpoint"
        checkpoints.write(directory, checkpoints.CONFIGS[name], dtype=dtype, **extra)
        write_byte_level(directory)
        (directory / "generation_config.json").write_text(json.dumps(GENERATION))
        return directory

    return write


def edit(directory, change):
    """Applies `change` to the tensors of a checkpoint in one file."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_tensors(directory / WEIGHTS, tensors, {"format": "pt"})


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_layout_is_ours(checkpoint):
    directory = checkpoint("biases")
    stored = load_file(directory / WEIGHTS)
    params = models.load(directory).params
    layer = params["layers"][1]
    np.testing.assert_array_equal(
        params["embedding"], stored["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(
        params["output"]["kernel"], stored["lm_head.weight"].T
    )
    name = "model.layers.1.self_attn.{}_proj.{}"
    for part in ("q", "k", "v", "o"):
        kernel = layer["attention"][part]["kernel"]  # (in, out): heads folded in
        np.testing.assert_array_equal(kernel, stored[name.format(part, "weight")].T)
    np.testing.assert_array_equal(
        layer["attention"]["q"]["bias"], stored[name.format("q", "bias")]
    )


@pytest.mark.parametrize("name", ["gqa", "tied", "biases", "qwen2", "qwen3", "yarn"])
@pytest.mark.parametrize(
    ("dtype", "shard"), [("float32", 20_000), ("bfloat16", 5_000_000_000)]
)
def test_round_trip_is_bit_equal(checkpoint, tmp_path, name, dtype, shard):
    first = models.load(checkpoint(name), dtype=dtype)
    saved = tmp_path / "deeper" / "saved"
    models.save_pretrained(first, saved, max_shard_bytes=shard)
    second = models.load(saved)
    same_bits(first.params, second.params)
    assert second.decoder == first.decoder
    assert second.eos_ids == first.eos_ids == (1, 2)
    assert second.generation["temperature"] == first.generation["temperature"] == 0.6
    assert second.tokenizer.encode("hé") == first.tokenizer.encode("hé")
    assert second.tokenizer.chat_templates == first.tokenizer.chat_templates
    assert second.tokenizer.bos_id == first.tokenizer.bos_id == 0
    assert (saved / INDEX).exists() == (shard == 20_000)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_shards_keep_their_limit(checkpoint, tmp_path):
    directory = checkpoint("biases")
    stored = load_file(directory / WEIGHTS)
    models.save_pretrained(
        models.load(directory), tmp_path / "saved", max_shard_bytes=9_000
    )
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored.values())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        with safe_open(tmp_path / "saved" / file, framework="np") as shard:
            assert shard.metadata() == {"format": "pt"}
        inside = load_file(tmp_path / "saved" / file)
        size = sum(array.nbytes for array in inside.values())
        assert size <= 9_000 or len(inside) == 1
        found |= inside
    assert {n: a.tobytes() for n, a in found.items()} == {
        n: a.tobytes() for n, a in stored.items()
    }


def test_a_tensor_in_two_shards_is_where_the_index_says(checkpoint, tmp_path):
    model = models.load(checkpoint())
    saved = tmp_path / "saved"
    models.save_pretrained(model, saved, max_shard_bytes=20_000)
    where = json.loads((saved / INDEX).read_text())["weight_map"]
    files = sorted(set(where.values()))
    assert len(files) > 2
    for file in files:  # a copy of another content in every other shard
        copied = load_file(saved / file)
        if where[Q0] != file:
            copied[Q0] = np.full_like(load_file(saved / where[Q0])[Q0], 7)
            save_tensors(saved / file, copied, {"format": "pt"})
    again = models.load(saved)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_saved_files_may_be_read_by_whom_the_umask_lets(checkpoint, tmp_path):
    models.save_pretrained(models.load(checkpoint()), tmp_path / "saved")
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    modes = {file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
    assert modes == {wanted}


@pytest.mark.parametrize("name", ["gqa", "tied", "dynamic", "qwen2_window", "qwen3"])
def test_transformers_opens_what_is_saved(checkpoint, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = models.load(checkpoint(name))
    models.save_pretrained(model, tmp_path / "saved", max_shard_bytes=20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved"
    ).eval()
    assert theirs.dtype == torch.float32
    tokens = checkpoints.tokens(checkpoints.CONFIGS[name])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    with np.load(GOLDENS) as goldens:
        np.testing.assert_allclose(
            logits, goldens[f"{name}/prefill"], atol=2e-5, rtol=0
        )
    assert theirs.generation_config.eos_token_id == [1, 2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("hé there").input_ids == model.tokenizer.encode("hé there")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == model.tokenizer.apply_chat_template(messages, tokenize=False)


def test_dtype_is_the_checkpoints_unless_given(checkpoint):
    directory = checkpoint(dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16")
    kept = models.load(directory)
    assert kept.decoder.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(kept.params)} == {
        jnp.dtype("bfloat16")
    }
    wide = models.load(directory, dtype="float32")
    assert wide.decoder.config.dtype == "float32"
    same_bits(wide.params, jax.tree.map(lambda x: x.astype(jnp.float32), kept.params))


def test_device_and_shardings(checkpoint):
    directory = checkpoint()
    reference = models.load(directory)
    second = jax.devices()[1]
    placed = models.load(directory, device=second)
    assert all(leaf.devices() == {second} for leaf in jax.tree.leaves(placed.params))
    same_bits(reference.params, placed.params)

    mesh = jax.make_mesh((2,), ("tensor",))
    whole = jax.NamedSharding(mesh, jax.P())
    shardings = jax.tree.map(lambda _: whole, reference.params)
    shardings["embedding"] = jax.NamedSharding(mesh, jax.P("tensor"))
    split = models.load(directory, device=shardings)
    same_bits(reference.params, split.params)
    shards = split.params["embedding"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(32, 32)}
    with pytest.raises(ValueError, match="shardings in the structure of"):
        models.load(directory, device={"embedding": whole})


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 3}, (1, 2)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0,)),
        ({}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({}, {}, (1,)),  # the tokenizer's
    ],
)
def test_eos_ids(checkpoint, generation, config, expected):
    directory = checkpoint(**config)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    assert models.load(directory).eos_ids == expected


def test_old_rotary_buffers_and_tied_outputs_are_accepted(checkpoint):
    directory = checkpoint("tied")
    before = models.load(directory)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(4, np.float32)

    edit(directory, change)
    same_bits(before.params, models.load(directory).params)
    edit(directory, lambda t: t["lm_head.weight"].__imul__(2))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model"):
        models.load(directory)


def _drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def _set(name, array):
    return lambda tensors: tensors.__setitem__(name, array)


def _poison(tensors):
    tensors[Q0][3, 4] = np.nan


MANY = [f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("up", "down")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(Q0), f"1 tensors are missing: {Q0}. The weights do not fit"),
        (_set("foo", np.ones(2, np.float32)), "1 tensors are unknown: foo"),
        (
            _drop(*MANY, "model.norm.weight", Q0),
            r"6 tensors are missing: .*down_proj.weight, .* and 2 more",
        ),
        (
            _set(Q0, np.ones((32, 31), np.float32)),
            rf"tensor {Q0} has shape \(32, 31\), config.json asks for \(32, 32\)",
        ),
        (_poison, f"tensor {Q0} holds NaN or infinite values as float32"),
        (
            _set(Q0, np.ones((32, 32), np.int8)),
            f"tensor {Q0} is I8, which is not a plain float",
        ),
    ],
)
def test_wrong_tensors(checkpoint, change, message):
    directory = checkpoint()
    edit(directory, change)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(directory)
    assert "\n" not in str(caught.value)


def test_overflow_of_a_narrow_dtype(checkpoint):
    directory = checkpoint()
    edit(directory, _set(Q0, np.full((32, 32), 1e6, np.float32)))
    models.load(directory)
    with pytest.raises(ValueError, match="infinite values as float16"):
        models.load(directory, dtype="float16")


@pytest.fixture
def sharded(checkpoint, tmp_path):
    directory = tmp_path / "sharded"
    models.save_pretrained(models.load(checkpoint()), directory, max_shard_bytes=20_000)
    return directory


def _truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def _shift_index(directory):
    index = json.loads((directory / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q0] = files[-1]
    (directory / INDEX).write_text(json.dumps(index))


def _escape(directory):
    (directory / INDEX).write_text(json.dumps({"weight_map": {Q0: "../x.safetensors"}}))


def _first(directory):
    return min(directory.glob("model-00001-of-*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            lambda d: (d / "config.json").unlink(),
            FileNotFoundError,
            "has no config.json",
        ),
        (
            lambda d: _first(d).unlink(),
            FileNotFoundError,
            "lacks 1 of . shards: model-",
        ),
        (lambda d: _truncate(_first(d), -9), ValueError, "damaged or truncated"),
        (lambda d: _truncate(_first(d), 40), ValueError, "damaged or truncated"),
        (lambda d: _truncate(_first(d), 0), ValueError, r"\(0 bytes\) is damaged"),
        (lambda d: _truncate(d / INDEX, 50), ValueError, "index.json is damaged"),
        (lambda d: (d / INDEX).write_text("{}"), ValueError, "index.json is damaged"),
        (lambda d: (d / INDEX).write_text("[]"), ValueError, "index.json is damaged"),
        (_escape, ValueError, "index.json is damaged"),
        (_shift_index, ValueError, f"lacks tensors its index names: {Q0}"),
        (lambda d: (d / INDEX).unlink(), FileNotFoundError, "has no weights: neither"),
        (
            lambda d: _truncate(d / "config.json", 9),
            ValueError,
            "config.json is damaged",
        ),
        (
            lambda d: (d / "tokenizer.json").unlink(),
            FileNotFoundError,
            "has no tokenizer.json",
        ),
        (
            lambda d: _truncate(d / "tokenizer.json", 30),
            ValueError,
            "tokenizer.json is damaged",
        ),
    ],
)
def test_damaged_directories(sharded, damage, kind, message):
    damage(sharded)
    with pytest.raises(kind, match=message) as caught:
        models.load(sharded)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(sharded):
    for path in sharded.glob("model*"):
        path.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="convert it to safetensors"):
        models.load(sharded)


def test_unknown_family(sharded):
    (sharded / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type='gpt2' is not supported"):
        models.load(sharded)


@pytest.mark.parametrize("name", ["no/such/dir", "nowhere", "a b/c"])
def test_what_is_no_directory_and_no_hub_id(name):
    with pytest.raises(FileNotFoundError, match="is no directory, and no hub id"):
        models.load(name)


@pytest.mark.parametrize("name", ["/no/dir", "./a"])
def test_what_is_a_path_and_not_there(name):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist: give the fol"):
        models.load(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("not a model")
    with pytest.raises(ValueError, match=r"notes\.txt is a file that does not end in"):
        models.load(tmp_path / "notes.txt")


def test_hub_ids_are_downloaded(checkpoint, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    directory, asked = checkpoint(), []

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision))
        assert "*.safetensors" in allow_patterns
        assert "original/*" in ignore_patterns
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert models.load("owner/model").name == "owner/model"
    models.load("owner/model@v1.0")
    assert asked == [("owner/model", None), ("owner/model", "v1.0")]

    def offline(*args, **kwargs):
        raise OSError("no route\nmore")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"\(OSError: no route\); download it"):
        models.load("owner/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="`pip install huggingface_hub`"):
        models.load("owner/model")


def test_nothing_is_left_half_written(checkpoint, tmp_path, monkeypatch):
    model = models.load(checkpoint())
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(FileExistsError, match="exists; remove it or choose another"):
        models.save_pretrained(model, taken)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(llama.weights, "save", fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        models.save_pretrained(model, tmp_path / "saved")
    assert sorted(tmp_path.rglob("*")) == before


def test_parameters_that_do_not_fit(checkpoint, tmp_path):
    model = models.load(checkpoint())
    wrong = model.params | {"embedding": jnp.ones((3, 32))}
    with pytest.raises(ValueError, match=r"embedding has shape \(3, 32\), the config"):
        models.save_pretrained(model._replace(params=wrong), tmp_path / "a")
    extra = model.params | {"foo": jnp.ones(3)}
    with pytest.raises(ValueError, match="has no parameters foo"):
        models.save_pretrained(model._replace(params=extra), tmp_path / "b")
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
        models.save_pretrained(model, tmp_path / "c", max_shard_bytes=0)


PEAK = """
import json, pathlib, resource, sys, threading, time
from models import llama
import jax, jax.numpy as jnp
jnp.ones((2048, 512)).block_until_ready()
directory = pathlib.Path(sys.argv[1])
def load(directory):
    config = llama.from_hf(json.loads((directory / "config.json").read_text()))
    return llama.weights.load(llama.tensors.from_safetensors(directory), config)
load(pathlib.Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = load(directory)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in bytes elsewhere")
def test_loading_holds_one_tensor_more_than_the_model(checkpoint, tmp_path):
    wide = checkpoints.BASE | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "vocab_size": 2048,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    directory = checkpoints.write(tmp_path / "wide", wide)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(directory), str(checkpoint())],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, model = map(int, result.stdout.split())
    largest = 2048 * 512 * 4
    assert model > 80e6
    # The tensor is on the host, on the device, and there once more in our layout, and
    # what XLA needs to compile the conversions. Reading it whole would add 90 MB.
    assert grown < model + 3 * largest + 30e6
