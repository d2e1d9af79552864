"""`kvjax convert`, and a GGUF file as the model of other commands."""

import json

import checkpoints
import gguf_files
import numpy as np
import pytest

import models

PROMPT = ("--prompt", "hehehe", "--max-new-tokens", "4")


@pytest.fixture
def file(tmp_path):
    config = checkpoints.CONFIGS["tied"]
    return gguf_files.write(tmp_path / "tiny.gguf", config, "Q8_0")


def test_the_folder_is_the_model_of_the_file(run, file, tmp_path):
    folder = tmp_path / "folder"
    line = run("convert", file, folder)
    assert line.startswith(f"{folder}: {file} in the Hugging Face layout, float32, ")
    ours, theirs = models.load(file), models.load(folder)
    assert ours.decoder == theirs.decoder
    assert (theirs.eos_ids, theirs.tokenizer.bos_id) == ((1,), 0)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1
    np.testing.assert_array_equal(ours.params["embedding"], theirs.params["embedding"])
    texts = [run("generate", "--model", path, *PROMPT) for path in (file, folder)]
    assert texts[0] == texts[1]


def test_a_dtype_may_be_chosen(run, file, tmp_path):
    document = json.loads(
        run("convert", file, tmp_path / "small", "--dtype", "bfloat16", "--json")
    )
    assert document["dtype"] == "bfloat16"
    assert models.load(tmp_path / "small").params["embedding"].dtype == "bfloat16"
    stored = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    assert document["bytes"] == stored


def test_plan_reads_the_header_alone(run, file):
    sizes = ("--context", "64", "--new-tokens", "16", "--method", "quest:budget=16")
    document = json.loads(run("plan", "--model", file, *sizes, "--json"))
    assert document["model_context"] == 64
    assert document["dtype"] == "float32"


def test_the_folder_is_looked_at_before_the_work(fail, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    line = fail("convert", tmp_path / "none.gguf", tmp_path / "full")
    assert "full exists; remove it or choose another" in line
    assert "none.gguf is no file" in fail(
        "convert", tmp_path / "none.gguf", tmp_path / "new"
    )
    assert not (tmp_path / "new").exists()


def test_only_gguf_files_are_converted(fail, checkpoint, tmp_path):
    line = fail("convert", checkpoint, tmp_path / "new")
    assert "only a GGUF file is converted" in line
    assert "a folder in the Hugging Face layout needs no conversion" in line


def test_mistakes_leave_nothing(fail, file, tmp_path):
    line = fail("convert", file, tmp_path / "new", "--dtype", "int8")
    assert "dtype='int8' is not supported; use float32, bfloat16, float16" in line
    file.write_bytes(file.read_bytes()[:-1])
    assert "is cut short" in fail("convert", file, tmp_path / "new")
    assert "is cut short" in fail("generate", "--model", file, *PROMPT)
    assert "is cut short" in fail("plan", "--model", file)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == [
        "tiny.gguf"
    ]
