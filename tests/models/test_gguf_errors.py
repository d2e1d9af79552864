"""Files that cannot be read: one error that names the file, the fault and the fix."""

import contextlib
import math
import random
import struct
import sys

import checkpoints
import gguf
import gguf_files
import numpy as np
import pytest

import models
from models.gguf import header

GQA = checkpoints.CONFIGS["gqa"]
EMBEDDING = "token_embd.weight"


@pytest.fixture
def write(tmp_path):
    def write(kind="F32", name="tiny.gguf", config=GQA, **options):
        return gguf_files.write(tmp_path / name, config, kind, **options)

    return write


def refuse(path, message):
    """Loading fails so, in a file of ours, and the message is of one file."""
    with pytest.raises(ValueError, match=message) as error:
        models.load(path)
    assert "/models/" in str(error.traceback[-1].path)
    assert str(path) in str(error.value) or path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.gguf", "nowhere/none.GGUF"):
        for read in (models.load, models.load_decoder):
            with pytest.raises(FileNotFoundError, match=r"none\.\w+ is no file"):
                read(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", r"is not a GGUF file: it begins with b'', not with b'GGUF'"),
        (b"PK\x03\x04", "is not a GGUF file: it begins with b'PK"),
        (b"ggjt\x03\0\0\0", "begins with b'ggjt'"),
        (b"GGUF" + struct.pack("<I", 1), "is GGUF version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3), "is big-endian, .* `gguf-convert-endian"),
        (b"GGUF", "is GGUF version 0"),
        (b"GGUF" + struct.pack("<I", 3), "is cut short: it has 8 bytes of 24"),
    ],
)
def test_other_files(start, message, tmp_path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(start)
    refuse(path, message)


def test_a_big_endian_file(tmp_path):
    path = tmp_path / "big.gguf"
    out = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    refuse(path, "is big-endian")


def test_cut_short_anywhere(write):
    """Before any tensor is read, and with what the file has and would need."""
    path = write("Q8_0")
    whole = path.read_bytes()
    start = gguf.GGUFReader(path).data_offset
    for length in (*range(8, start, 97), start, start + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=f"has {length:,} bytes of [0-9,]+ or more"
        ):
            header.read(path)
    path.write_bytes(whole[:-1])
    refuse(path, f"has {len(whole) - 1:,} bytes of {len(whole):,} or more; download")


def test_damaged_anywhere(write):
    """Whatever a byte of the header becomes, it is an error of ours or a model."""
    path = write("Q8_0")
    whole = path.read_bytes()
    start = gguf.GGUFReader(path).data_offset
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            damaged[draw.randrange(8, start)] = draw.choice(
                (0, 1, 255, draw.getrandbits(8))
            )
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            models.load_decoder(path)
            refused -= 1
        refused += 1
    assert refused > 75


def test_nested_without_end(tmp_path):
    """Arrays in arrays, deeper than the reader can follow."""
    path = tmp_path / "deep.gguf"
    start = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    key = struct.pack("<Q1sI", 1, b"k", 9)
    path.write_bytes(start + key + struct.pack("<IQ", 9, 1) * 20_000)
    refuse(path, r"is damaged \(RecursionError")


def test_a_key_that_stands_twice(tmp_path):
    path = tmp_path / "twice.gguf"
    key = struct.pack("<Q1sIB", 1, b"k", 7, 1)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + key + key)
    # gguf 0.17 reads on, and there is no architecture.
    refuse(path, r"is damaged \(KeyError: 'Duplicate k|architecture '' is not")


def test_parts_of_a_file(write):
    split = {"split.count": 2, "split.no": 0}
    message = (
        "is one part of several; merge them first, with .*llama-gguf-split --merge"
    )
    refuse(write(change=split), message)
    refuse(write(name="model-00002-of-00003.gguf"), message)
    assert models.load_decoder(write(name="model-00001-of-00001.gguf"))


def test_a_type_that_the_package_does_not_know(write):
    """As Q4_0_4_4, type 31, which many files of 2024 have: not damaged, and no help in
    downloading them again."""
    path = write()
    known = EMBEDDING.encode() + struct.pack("<IQQI", 2, 32, 64, 0)
    assert known in path.read_bytes()
    unknown = known[:-4] + struct.pack("<I", 31)
    path.write_bytes(path.read_bytes().replace(known, unknown))
    refuse(path, "does not know .*31.*choose another quantization, or `pip install -U")


def test_a_pointer_of_git_lfs(write):
    path = write()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    refuse(path, "is a Git LFS pointer, not the file itself; run `git lfs pull`")


@pytest.mark.parametrize("name", ["gemma2", "phi3", "qwen2moe", "bert", "llama_phd"])
def test_other_architectures(name, write):
    path = write(change={"general.architecture": name})
    refuse(path, f"'{name}' is not supported; supported: llama, qwen2, qwen3")


def test_types_that_are_not_weights(write):
    counts = np.zeros((64, 32), np.int32)
    path = write(arrays={EMBEDDING: counts})
    refuse(path, r"1 tensors .* cannot turn into floats: token_embd\.weight \(I32\)")
    kind = gguf.GGMLQuantizationType.Q8_1
    blocks = np.zeros((64, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = write(arrays={EMBEDDING: (blocks, kind)})
    refuse(path, r"token_embd\.weight \(Q8_1\); choose another quantization")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_qkv.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.1.ffn_up_exps.weight",
        "blk.0.attn_norm_2.weight",
        "rope_factors_long.weight",
        "vision.weight",
        "blk.x.attn_q.weight",
        "token_embd.weight.scale",
    ],
)
def test_unknown_tensors(name, write):
    path = write(arrays={name: np.ones((32, 32), np.float32)})
    refuse(path, f"tensors of another architecture than llama: {name}")


def test_tensors_that_are_missing_or_too_many(write):
    refuse(
        write(arrays={"blk.1.ffn_up.weight": None}),
        r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight",
    )
    extra = np.ones(32, np.float32)
    refuse(
        write(arrays={"blk.2.attn_norm.weight": extra}),
        r"1 tensors are unknown: model\.layers\.2\.input_layernorm",
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.weight", (31, 32)),
        ("blk.0.attn_q.weight", (32, 32, 1)),
        ("blk.1.attn_k.weight", (32, 16)),
        ("output_norm.weight", (1,)),
        (EMBEDDING, (65, 32)),
    ],
)
def test_shapes_that_disagree_with_the_metadata(name, shape, write, monkeypatch):
    path = write(arrays={name: np.ones(shape, np.float32)})

    def untouched(data, kind):
        assert data.nbytes <= 64, "a tensor was read"

    monkeypatch.setattr(gguf, "dequantize", untouched)
    refuse(path, f"tensor {name} has shape .*, the metadata ask for")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, write):
    wrong = np.ones(32, np.float32)
    wrong[7] = value
    refuse(
        write(arrays={"output_norm.weight": wrong}), r"model\.norm\.weight holds NaN"
    )
    scale = np.zeros((64, 34), np.uint8)  # Q8_0: a float16 and 32 bytes
    scale[:, :2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    blocks = {EMBEDDING: (scale, gguf.GGMLQuantizationType.Q8_0)}
    refuse(write("Q8_0", arrays=blocks), r"embed_tokens\.weight holds NaN")


ROPE = "llama.rope.scaling"
LINEAR = {f"{ROPE}.type": "linear", f"{ROPE}.factor": 4.0}
YARN = {f"{ROPE}.type": "yarn", f"{ROPE}.factor": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.block_count": None}, "lack what config.json calls num_hidden_layers"),
        ({"llama.block_count": 0}, "lack what config.json calls num_hidden_layers"),
        (
            {"llama.attention.layer_norm_rms_epsilon": None},
            "lack what config.json calls rms_norm_eps",
        ),
        ({"llama.block_count": "2"}, "block_count='2' must be a whole number"),
        ({"llama.block_count": 2.0}, "block_count=2.0 must be a whole number"),
        (
            {"llama.feed_forward_length": [48, 48]},
            r"feed_forward_length=\[48, 48\] must be a whole number",
        ),
        ({"llama.block_count": 2**32 - 1}, "21 tensors are too few .*=4294967295;"),
        (
            {"llama.attention.layer_norm_rms_epsilon": math.nan},
            "epsilon=nan must be finite",
        ),
        ({"llama.rope.freq_base": -1.0}, "freq_base=-1.0 must be finite, at least 0"),
        ({"llama.rope.freq_base": True}, "freq_base=True must be a number"),
        ({"llama.attention.head_count_kv": 3}, "=4 must be a multiple of .*heads=3"),
        ({"llama.vocab_size": 63}, "vocab_size=63 is less than the 64 tokens"),
        ({"llama.foo": 3}, "llama.foo=3 is not known to this model"),
        ({"llama.attention.scale": 0.5}, "attention.scale=0.5 is not known"),
        ({"llama.expert_count": 8}, "expert_count=8 is not supported; only 0 is"),
        (
            {"llama.rope.dimension_count": 4},
            "rope.dimension_count=4 is not supported; it must be the head_dim, 8",
        ),
        ({"llama.attention.value_length": 4}, "value_length=4 is not supported"),
        ({"llama.rope.dimension_count": 7, "llama.attention.key_length": 7}, "even"),
        (
            {f"{ROPE}.type": "longrope", f"{ROPE}.factor": 4.0},
            "type='longrope' is not supported; supported: none, linear, yarn",
        ),
        (LINEAR | {f"{ROPE}.factor": 3.0}, "length=64 must be .*factor=3.0 times a"),
        (LINEAR | {f"{ROPE}.factor": 0.5}, "factor=0.5 must be at least 1"),
        (
            LINEAR | {f"{ROPE}.attn_factor": 1.5},
            "attn_factor=1.5 is supported with yarn only",
        ),
        (
            YARN
            | {f"{ROPE}.original_context_length": 16}
            | {f"{ROPE}.yarn_ext_factor": 0.5},
            "yarn_ext_factor=0.5 is not supported; only 1.0 is",
        ),
        ({f"{ROPE}.yarn_attn_factor": 1.2}, "yarn_attn_factor=1.2.* is not supported"),
        ({f"{ROPE}.alpha": 2.0}, "rope.scaling.alpha=2.0 is not known"),
    ],
)
def test_metadata(change, message, write):
    path = write(change=change)
    refuse(path, message)
    with pytest.raises(ValueError, match=message):
        models.load_decoder(path)


@pytest.mark.parametrize(
    ("factors", "change", "message"),
    [
        (np.full(4, 2, np.float32), LINEAR, "rope_freqs.weight and llama.rope.scal"),
        (np.full(4, 2, np.float16), {}, "rope_freqs.weight is F16 of shape"),
        (np.full(3, 2, np.float32), {}, r"of shape \(3,\); it must be .* \(4,\)"),
        (np.zeros(4, np.float32), {}, "every rope factor must be finite and above 0"),
        (np.full(4, np.nan, np.float32), {}, "must be finite and above 0"),
    ],
)
def test_rope_factors(factors, change, message, write):
    refuse(write(arrays={"rope_freqs.weight": factors}, change=change), message)


def test_a_bias_that_the_family_does_not_have(write):
    mistral = {"llama.attention.sliding_window": 32}
    path = write(config=checkpoints.CONFIGS["biases"], change=mistral)
    refuse(path, "attention_bias=True is not supported for mistral")


def test_text_that_is_not_utf8(write):
    path = write(change={"llama.unknown": "gpt-2"})
    path.write_bytes(path.read_bytes().replace(b"gpt-2", b"gpt\xff2"))
    refuse(path, "llama.unknown is not UTF-8")
    path = write()
    path.write_bytes(path.read_bytes().replace(b"gpt-2", b"gpt\xff2"))
    refuse(path, "tokenizer.ggml.pre is not UTF-8")


def test_no_tokenizer(write):
    path = write(tokenizer=None, change={"llama.vocab_size": 64})
    refuse(path, "has no tokenizer")
    assert models.load_decoder(path).vocab_size == 64
    refuse(write(tokenizer=None), "lack what config.json calls vocab_size")


def test_without_the_package(write, monkeypatch):
    path = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'kvjax\[gguf\]'"):
        models.load(path)
