"""`kvjax prefill --save` and `kvjax generate --resume`."""

import json
import subprocess
import sys

import pytest
from text_families import FAMILIES
from tiny import TEXT, tiny_model

import models
from kvjax import registry
from kvjax.decoding import saved_prompt

LONG = "quest:budget=16,page_size=4"


@pytest.fixture
def folder(run, checkpoint, text_file, tmp_path):
    text_file.write_text(TEXT[:99])
    save = tmp_path / "read"
    options = ["--model", checkpoint, "--method", LONG, "--prompt-file", text_file]
    printed = run("prefill", *options, "--room", "30", "--save", save)
    assert "99 tokens read by" in printed
    assert "room for 30 more" in printed
    return save


def test_a_resumed_text_is_the_uninterrupted_one(run, fail, checkpoint, folder):
    options = ["--temperature", "1.5", "--seed", "4", "--json", "--max-new-tokens"]
    alone = ["--model", checkpoint, "--method", LONG, "--prompt", TEXT[:99]]
    expected = json.loads(run("generate", *alone, *options, "30"))
    resumed = json.loads(run("generate", "--resume", folder, *options, "30"))
    for key in ("tokens", "text", "finish_reason", "prompt_tokens", "model"):
        assert resumed[key] == expected[key]
    assert resumed["method"] == registry.canonical(LONG)
    text = run("generate", "--resume", folder, "--model", checkpoint, "--method", LONG)
    assert text

    more = json.loads(
        run("generate", "--resume", folder, "--prompt", TEXT[99:110], *options, "9")
    )
    alone = [*alone[:-1], TEXT[:110]]
    longer = json.loads(run("generate", *alone, *options, "9"))
    assert (more["tokens"], more["prompt_tokens"]) == (longer["tokens"], 110)

    assert "cannot go on with tova:budget=5" in fail(
        "generate", "--resume", folder, "--method", "tova:budget=5"
    )
    assert "room for 30 tokens" in fail(
        "generate", "--resume", folder, "--max-new-tokens", "31"
    )
    assert "give --chat to kvjax prefill" in fail(
        "generate", "--resume", folder, "--chat", "--prompt", "x"
    )
    assert "exists; remove it or choose another" in fail(
        "prefill", "--prompt", "x", "--save", folder
    )


def test_an_option_added_later_changes_no_older_prefix(run, folder):
    """The spec in the folder may lack it: both are spelled by the version that runs."""
    path = folder / saved_prompt.ABOUT
    document = json.loads(path.read_text())
    del document["stored_as"]
    path.write_text(json.dumps(document | {"method": LONG}))
    assert run("generate", "--resume", folder, "--method", LONG + ",recent=1")


def test_another_model_is_refused_before_it_is_loaded(
    fail, checkpoint, folder, tmp_path
):
    """Of the other one there is no more than its sizes."""
    resume = ["generate", "--resume", folder]
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    line = fail(*resume, "--model", other)
    assert f"cannot go on with '{other}': their sizes differ; go on with" in line
    assert "leave --model out" in line
    assert "saved with dtype float32 and cannot go on with bfloat16" in fail(
        *resume, "--dtype", "bfloat16"
    )
    line = fail(*resume, "--weights", "int8")
    assert (
        "saved with float weights and cannot go on with --weights int8: leave" in line
    )


def test_several_prompts_are_for_python(fail, checkpoint, tmp_path):
    model, full = models.load(checkpoint), registry.parse("full")
    read = saved_prompt.read(model, full, [[1, 2], [3]])
    saved_prompt.save(tmp_path / "two", model, read, method_name="full")
    assert "holds 2 prompts" in fail("generate", "--resume", tmp_path / "two")
    assert "holds no prefix" in fail("generate", "--resume", tmp_path)


@pytest.mark.parametrize("method", ["streaming_llm:budget=16", "cascade:budget=16"])
def test_constant_memory_has_room_for_any_number(run, checkpoint, tmp_path, method):
    """Whatever was read since: 128 tokens where nobody says, as without a folder."""
    folder = tmp_path / "read"
    options = ["--model", checkpoint, "--prompt", "def main(", "--method", method]
    run("prefill", *options, "--save", folder, "--room", "2")
    more = ["--prompt", "import os\n" * 5]
    found = json.loads(run("generate", "--resume", folder, *more, "--json"))
    assert len(found["tokens"]) == 128
    options = ["--max-new-tokens", "5", "--json"]
    found = json.loads(run("generate", "--resume", folder, *more, *options))
    assert len(found["tokens"]) == 5


def test_room_that_is_used_up_says_how_to_get_more(fail, folder):
    more = ["--prompt", "x" * 30]
    line = fail("generate", "--resume", folder, *more)
    assert "room for 30 tokens more" in line
    assert "31 are wanted" in line
    assert "room=31 or more (kvjax prefill --room)" in line
    line = fail(
        "generate", "--resume", folder, "--prompt", "xx", "--max-new-tokens", 29
    )
    assert "room for 30 tokens more" in line
    assert "31 are wanted" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prefill --prompt x --save y --room 0", "room=0 must be at least 1"),
        ("prefill --prompt x --save y --room -7", "room=-7 must be at least 1"),
        ("prefill --prompt x --save y --chunk-size 0", "chunk_size=0 must be at least"),
        ("generate --prompt x --max-new-tokens 0", "max_new_tokens=0 must be at least"),
        ("generate --resume y --max-new-tokens -3", "max_new_tokens=-3 must be at"),
        ("prefill --prompt x --save y --finish --chat", "goes on: leave --chat out"),
    ],
)
def test_numbers_below_one_are_mistakes_before_any_work(fail, arguments, message):
    assert message in fail(*arguments.split(), "--model", "no/where/at/all")


def test_a_text_behind_a_prefix_gains_no_blank(run, tmp_path):
    """As with SentencePiece's, which puts one before every text."""
    tokenizer = FAMILIES["sentencepiece"]()
    model = tiny_model(num_layers=1, vocab_size=tokenizer.vocab_size)
    models.save_pretrained(
        model._replace(tokenizer=tokenizer, eos_ids=()), tmp_path / "m"
    )
    options = ["--max-new-tokens", "6", "--json"]
    alone = ["--model", tmp_path / "m", "--prompt"]
    expected = json.loads(run("generate", *alone, "hello world", *options))
    run("prefill", *alone, "hello", "--save", tmp_path / "p", "--room", "16")
    more = ["--resume", tmp_path / "p", "--prompt", " world"]
    found = json.loads(run("generate", *more, *options))
    for key in ("prompt_tokens", "tokens", "text"):
        assert found[key] == expected[key]


def test_a_prefix_goes_on_from_another_folder(
    run, fail, checkpoint, tmp_path, monkeypatch
):
    """Where its model lies is kept, whatever it was called by; names stay names."""
    monkeypatch.chdir(checkpoint.parent)
    save = tmp_path / "read"
    read = ["--model", checkpoint.name, "--prompt", "one two", "--save", save]
    run("prefill", *read)
    monkeypatch.chdir(tmp_path)
    assert run("generate", "--resume", save, "--max-new-tokens", 2)
    assert saved_prompt.about(save)["model"] == str(checkpoint)

    # A model that is gone is asked for, by the one line there is.
    path = save / saved_prompt.ABOUT
    for name in (str(tmp_path / "gone"), "gone/or/relative"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": name}))
        line = fail("generate", "--resume", save)
        assert f"was read by the model {name}, which is not there (any more)" in line
        assert "give --model where it is now" in line
        assert run("generate", "--resume", save, "--model", checkpoint)


def test_a_full_disk_is_one_line_and_leaves_nothing(checkpoint, tmp_path):
    """The library below complains on many lines, and by other errors."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1)); "
        "from kvjax import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    save = tmp_path / "new" / "read"
    read = ["--model", str(checkpoint), "--prompt", TEXT[:300], "--save", str(save)]
    done = subprocess.run(
        [sys.executable, "-c", code, "prefill", *read],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"could not be written to {save} (File too large), and nothing" in line
    assert not save.parent.exists()


def test_a_finished_prompt_is_asked_again_and_again(run, fail, checkpoint, tmp_path):
    """Smaller on disk; a question is none of the other's, and sees what was kept."""
    read = [
        "--model",
        checkpoint,
        "--method",
        "snapkv:budget=16,window=4",
        "--room",
        30,
    ]
    read += ["--prompt", TEXT[:99], "--save"]
    whole = json.loads(run("prefill", *read, tmp_path / "whole", "--json"))
    assert not whole["finished"]
    save = tmp_path / "ended"
    printed = run("prefill", *read, save, "--finish")
    assert ", finished; room for 30 more" in printed
    size = sum(file.stat().st_size for file in save.rglob("*") if file.is_file())
    assert size < whole["bytes"]
    ask = ["generate", "--resume", save, "--max-new-tokens", 9, "--json", "--prompt"]
    first, other, again = (
        json.loads(run(*ask, question))
        for question in ("Where?", "Who is it?", "Where?")
    )
    assert first["tokens"] == again["tokens"] != other["tokens"]
    assert [x["prompt_tokens"] for x in (first, other)] == [99 + 6, 99 + 10]
    model, method = models.load(checkpoint), registry.parse(read[3])
    found = saved_prompt.finish(
        model, method, saved_prompt.read(model, method, [TEXT[:99]], room=30)
    )
    (told,) = saved_prompt.ask(model, method, found, ["Where?"], max_new_tokens=9)
    assert told.text == first["text"]
    # All there is room for, and no more.
    assert len(json.loads(run(*ask[:3], "--json"))["tokens"]) <= 30
    resumed = ["generate", "--resume", save]
    for more, message in [
        (["--method", "tova:budget=5"], "cannot go on with tova:budget=5"),
        (["--chat", "--prompt", "x"], "holds no conversation"),
        (["--max-new-tokens", 25, "--prompt", "Where?"], "31 are wanted"),
    ]:
        assert message in fail(*resumed, *more)


def test_a_saved_prompt_is_sealed_unless_it_has_ended(run, checkpoint, tmp_path):
    """Its clusters are in the folder, and what comes behind goes on from them."""
    method = "squeezed:budget=8,tail=4,rounds=1"
    options = ["--model", checkpoint, "--method", method, "--prompt", TEXT[:60]]
    for name, more, expected in (("open", [], (4, [60])), ("over", ["--finish"], (3,))):
        run("prefill", *options, *more, "--room", "12", "--save", tmp_path / name)
        about = saved_prompt.about(tmp_path / name)
        assert (about["format"], *([about["sealed"]] if not more else [])) == expected
    resume = ["--resume", tmp_path / "open", "--prompt", TEXT[60:66], "--json"]
    found = json.loads(run("generate", *resume, "--max-new-tokens", "5"))
    assert (found["prompt_tokens"], len(found["tokens"])) == (66, 5)
