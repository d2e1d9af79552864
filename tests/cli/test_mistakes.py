"""Mistakes on the command line: one line that names what is wrong, exit code 2."""

import json
import os
import re
import shutil
import struct

import numpy as np
import pytest

import models
from kvjax import cli, registry
from kvjax.cli.methods import check_room


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench kernels --dtype fp16", "dtype='fp16' must be float32, bfloat16 or"),
        ("bench kernels --dtype int8", "dtype='int8' must be float32, bfloat16 or"),
        ("frobnicate", "No such command 'frobnicate'"),
        ("compare --bugdet 3", "--bugdet"),
        ("compare --n many", "Invalid value for '--n'"),
        ("cite quset", "unknown method 'quset'; did you mean 'quest'?"),
        ("generate --prompt x --method qest", "did you mean 'quest'?"),
        ("generate --prompt x --method quest:bugdet=3", "did you mean 'budget'?"),
        ("generate --prompt x --method quest:budget=many", "'many'"),
        ("generate --prompt x --method quest:budget=0", "budget=0"),
        ("generate --prompt x --method dense_layers", "transform"),
        ("generate --prompt x --method streaming_llm:budget=4", "budget=4"),
        (
            "generate --prompt x --method snapkv:budget=32",
            "budget=32 must exceed window=32",
        ),
        ("generate --prompt x --temperature -1", "temperature=-1.0 must be"),
        ("generate --prompt x --top-p 0.5", "--top-p 0.5 changes nothing where"),
        ("generate --prompt x --temperature 0 --top-k 3", "give --temperature above 0"),
        ("generate --prompt x --method QUEST:budget=64", "did you mean 'quest'?"),
        ("generate --prompt-file .", ". is a folder: give a UTF-8 file"),
        ("generate --resume nowhere", "nowhere does not exist: make a prefix"),
        ("generate --prompt x --chat", "no chat model: leave --chat out, or take"),
        ("stream --text . --temperature 1", "give --new-tokens too"),
        ("generate --prompt x --top-p 0", "top_p=0.0 must be in (0, 1]"),
        ("generate --prompt x --seed -1", "Invalid value for '--seed'"),
        ("eval --task passkey --seed 4294967296", "Invalid value for '--seed'"),
        ("generate", "--prompt or --prompt-file"),
        ("generate --prompt x --prompt-file y", "only one of them"),
        ("generate --prompt-file nowhere.txt", "nowhere.txt"),
        ("score --text nowhere.txt", "nowhere.txt"),
        ("eval --task needle", "unknown task='needle': choose one of passkey,"),
        ("eval --task passkey --n -3", "n=-3 must be at least 1"),
        ("eval --task passkey --context 0", "context=0 must be at least 1"),
        ("eval --task passkey --question late", "must be one of seen, after"),
        ("eval --task fidelity --question after", "asks nothing: leave --question out"),
        ("compare --n -3", "error: n=-3 must be at least 1"),
        ("compare --budget 0", "budget=0 must be at least 1"),
        ("compare --budget 16", "snapkv: budget=16 must exceed window=32"),
        (
            "compare --budget 2048",
            "--budget 2048 must be below --context 512: otherwise",
        ),
        ("compare --windows 0", "error: windows=0 must be at least 1"),
        ("generate --prompt x --method=", "unknown method ''; known: cascade, "),
        ("generate --prompt x --chat --save s --method=", "unknown method ''"),
        ("score --text . --method=", "unknown method ''"),
        ("stream --text . --method=", "unknown method ''"),
        ("prefill --prompt x --save s --method=", "unknown method ''"),
        ("eval --task passkey --method=", "unknown method ''"),
        ("compare --method=", "unknown method ''"),
        ("calibrate --method=", "unknown method ''"),
        ("plan --method=", "unknown method ''"),
        ("bench decode --method=", "unknown method ''"),
        ("eval --task=", "unknown task=''"),
        ("generate --prompt x --model=", "--model is empty: name a model, or leave"),
        ("generate --prompt x --weights int2", "--weights int2 must be int8, int4 or"),
        ("stream --text .", "error: . is a folder: give a UTF-8 file"),
        ("stream --text nowhere", "nowhere does not exist: give a UTF-8 file"),
        ("score --text nowhere", "nowhere does not exist: give a UTF-8 file"),
        ("eval --tasks nowhere", "nowhere does not exist: give a UTF-8 file"),
        ("plan --model a/none.json", "a/none.json does not exist: give the folder of"),
        ("plan --model ./none", "./none does not exist: give the folder of"),
        ("prefill --prompt x --save s --room 8192", "--room 8192 exceeds what the mod"),
        (
            "plan --method head_budgets:alpha=2+snapkv",
            "head_budgets: alpha=2.0 must be",
        ),
        (
            "train --config toy --out r --set stages=3",
            "stages=3: must be a list of stag",
        ),
        (
            "train --config toy --out r --set optimizer=3",
            "optimizer=3: must be a mapping",
        ),
        (
            "train --config toy --out r --setting refreshkv",
            "stages.1.shortest packs several into one: give --set stages.1.shortest=nu",
        ),
        ("compare --new-tokens 2000", "new_tokens=2000 must be in [2, context=512)"),
    ],
)
def test_mistakes_that_need_no_model(fail, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*arguments.split())


@pytest.mark.parametrize(
    "command",
    [
        "prefill --prompt x --save",
        "generate --chat --prompt x --save",
        "train --config toy --out",
    ],
)
def test_a_folder_that_cannot_be_made_is_known_before_any_work(
    fail, command, text_file
):
    command = [*command.split(), text_file / "below"]
    if "--save" in command:
        command += ["--model", "no/where/at/all"]
    assert "text.txt/below cannot be made (Not a directory): choose" in fail(*command)


def test_methods_of_constant_memory_have_room_for_any_number():
    check_room(1 << 20, registry.parse("cascade:budget=64"), None, None)
    with pytest.raises(ValueError, match="--room 1048576 exceeds"):
        check_room(1 << 20, registry.parse("quest:budget=64"), None, None)


def test_a_config_that_lacks_something_is_named(fail, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("{}")
    assert "mine.json: model_type=None is not supp" in fail("plan", "--model", file)
    file.write_text('{"model_type": "llama"}')
    assert "mine.json: config.json lacks vocab_size" in fail("plan", "--model", file)


def test_an_empty_prompt(fail, checkpoint, text_file):
    assert "the prompt is empty" in fail(
        "generate", "--model", checkpoint, "--prompt", ""
    )
    text_file.write_text("")
    command = "generate", "--model", checkpoint, "--prompt-file", text_file
    assert "the prompt is empty" in fail(*command)


def test_a_prompt_that_is_not_utf8(fail, checkpoint, text_file):
    text_file.write_bytes(b"caf\xe9 and more")
    line = fail("generate", "--model", checkpoint, "--prompt-file", text_file)
    assert "text.txt is not UTF-8: byte 0xe9 at offset 3; convert" in line


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--prompt caf\udce9!", "--prompt is not UTF-8: byte 0xe9 at offset 3;"),
        ("--prompt \u20ac\udcff", "--prompt is not UTF-8: byte 0xff at offset 3;"),
        ("--prompt x --stop \udce9", "--stop is not UTF-8: byte 0xe9 at offset 0;"),
        ("--prompt x --system \udc80", "--system is not UTF-8: byte 0x80 at offset 0"),
        ("--prompt x --method \udc80", "--method is not UTF-8: byte 0x80 at offset 0"),
        ("--prompt x\ud83d", "--prompt is not UTF-8: half a pair, U+D83D, at offset 1"),
    ],
)
def test_an_argument_that_is_not_utf8(fail, option, said):
    """As Python has the bytes of a shell that are none; the model is not asked."""
    assert said in fail("generate", *option.split(), "--model", "no/where/at/all")


def test_a_path_may_be_any_bytes(fail, checkpoint, tmp_path):
    line = fail("generate", "--model", checkpoint, "--prompt-file", tmp_path / "\udce9")
    assert "\ufffd does not exist: give a UTF-8 file" in line


def test_a_prompt_is_never_cut(fail, checkpoint, text_file):
    options = ["--model", checkpoint, "--max-new-tokens", "13"]
    line = fail("generate", *options, "--prompt", "x" * 500)
    assert "500 tokens" in line
    assert "512" in line
    text_file.write_text("x" * 600)
    line = fail("score", "--model", checkpoint, "--text", text_file)
    assert "512" in line


def test_a_context_beyond_the_models(fail, checkpoint, text_file, tmp_path):
    model = ["--model", checkpoint, "--text", text_file, "--context", "600"]
    message = "context=600 exceeds the 512 tokens the model was made for"
    assert message in fail("eval", "--task", "passkey", *model)
    assert message in fail("compare", *model, "--out", tmp_path / "out")


def test_a_score_needs_tokens_after_the_prompt(fail, checkpoint, text_file):
    text_file.write_text("hello")
    options = ["score", "--model", checkpoint, "--text", text_file]
    assert "prefill=9 must be in [1, 3]" in fail(*options, "--prefill", "9")
    text_file.write_text("he")
    assert "has 2 tokens" in fail(*options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(fail, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be written" in fail("compare", "--out", locked)


def test_the_output_folder_is_tried_before_the_work(fail, tmp_path):
    # The model does not exist either: the folder is complained about first.
    (tmp_path / "file").write_text("")
    line = fail("compare", "--model", "no/where/at/all", "--out", tmp_path / "file")
    assert "file is not a folder: give --out another" in line
    # What is refused after it leaves no folder.
    for command in (
        "compare --text nowhere",
        "reproduce --model embedded-softmax --n 9",
    ):
        fail(*command.split(), "--context", "99999", "--out", tmp_path / "a" / "new")
    assert not (tmp_path / "a").exists()


def header_of(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_shard(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def no_config(folder):
    (folder / "config.json").unlink()


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def wrong_shape(folder):
    header, body = header_of(folder / "model.safetensors")
    entry = header["model.norm.weight"]
    entry["shape"] = [entry["shape"][0] // 2, 2]
    write_shard(folder / "model.safetensors", header, body)


def nan_weights(folder):
    header, body = header_of(folder / "model.safetensors")
    start = header["model.norm.weight"]["data_offsets"][0]
    body = body[:start] + np.float32(np.nan).tobytes() + body[start + 4 :]
    write_shard(folder / "model.safetensors", header, body)


def unknown_rope(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config["rope_scaling"] = {"rope_type": "spiral", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "has no config.json"),
        (no_tokenizer, "has no tokenizer.json"),
        (no_weights, r"model\.safetensors"),
        (cut_weights, r"model\.safetensors"),
        (wrong_shape, r"model\.norm\.weight"),
        (nan_weights, r"model\.norm\.weight.*NaN"),
        (unknown_rope, "spiral"),
    ],
)
def test_a_damaged_checkpoint(fail, broken, damage, message):
    damage(broken)
    line = fail("generate", "--model", broken, "--prompt", "x")
    assert re.search(message, line), line


def test_a_model_that_is_nowhere(fail):
    line = fail("generate", "--model", "no/where/at/all", "--prompt", "x")
    assert "no/where/at/all is no directory" in line


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, checkpoint):
    def fault(*arguments, **options):
        return json.loads("{")  # raised inside the standard library

    monkeypatch.setattr(models, "load", fault)
    with pytest.raises(json.JSONDecodeError):
        cli.run(["generate", "--model", str(checkpoint), "--prompt", "x"])
