"""`kvjax generate --chat`: sampling, a system text, turn after turn."""

import json
import pathlib
import re
import shlex
import shutil
import types

import pytest

import models
from kvjax import cli
from kvjax.cli import decode
from kvjax.decoding import reader, saved_prompt

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "chat.md"


def messages_in(folder):
    return json.loads((folder / saved_prompt.ABOUT).read_text("utf-8"))["messages"]


@pytest.fixture
def sampled(checkpoint, tmp_path):
    """The checkpoint, with the `generation_config.json` that a test gives it."""

    def sampled(**generation):
        model = models.load(checkpoint)._replace(generation=generation)
        folder = tmp_path / "sampled"
        models.save_pretrained(model, folder)
        return folder

    return sampled


def test_the_checkpoints_own_sampling_is_used_in_a_chat(sampled, capsys):
    folder = sampled(do_sample=True, temperature=0.6, top_k=7, typical_p=0.5)
    command = ["generate", "--model", str(folder), "--prompt", "hi", "--json"]
    command += ["--max-new-tokens", "2"]

    def sampling(*options):
        assert cli.run([*command, *options]) == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)["sampling"]
        return found["temperature"], found["top_k"], captured.err

    assert sampling() == (0.0, 0, "")
    note = "kvjax: note: sampling as generation_config.json says: "
    others = "without typical_p, which kvjax does not have\n"
    said = f"{note}temperature=0.6, top_k=7, {others}"
    assert sampling("--chat") == (0.6, 7, said)
    # What is given wins.
    said = f"{note}top_k=7, {others}"
    assert sampling("--chat", "--temperature", "0.9") == (0.9, 7, said)
    assert sampling("--chat", "--temperature", "0") == (0.0, 0, f"{note}{others}")
    # And what the file leaves out is said.
    shutil.rmtree(folder)
    assert sampled(do_sample=True, temperature=0.5) == folder
    said = f"{note}temperature=0.5, top_k=50 (default)\n"
    assert sampling("--chat") == (0.5, 50, said)


def test_a_system_text_comes_before_the_first_turn(run, fail, checkpoint):
    options = ["--model", checkpoint, "--prompt", "hi", "--max-new-tokens", "1"]
    found = json.loads(
        run("generate", *options, "--json", "--chat", "--system", "be kind")
    )
    assert found["prompt_tokens"] == len("<system>be kind<user>hi")
    assert "add --chat" in fail("generate", *options, "--system", "be kind")


def test_three_turns(run, fail, checkpoint, tmp_path):
    folder = tmp_path / "talk"
    options = ["--chat", "--max-new-tokens", "6", "--method", "quest:budget=16"]
    command = ["generate", "--model", checkpoint, "--prompt", "how are you?"]
    first = json.loads(
        run(*command, *options, "--system", "be kind", "--save", folder, "--json")
    )
    begin = "<system>be kind<user>how are you?"
    assert first["prompt_tokens"] == len(begin)
    said = [("system", "be kind"), ("user", "how are you?")]
    said += [("assistant", first["text"])]
    assert [tuple(m.values()) for m in messages_in(folder)] == said

    def turn(prompt, *more):
        done = run(
            *("generate", "--chat", "--resume", folder, "--prompt", prompt, "--json"),
            *("--max-new-tokens", "6", *more),
        )
        return json.loads(done)

    second = turn("and now?", "--save", folder)
    tokenizer = models.load(checkpoint).tokenizer
    roles = ["system", "user", "assistant", "user"]
    texts = ["be kind", "how are you?", first["text"], "and now?"]
    whole = [
        {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
    ]
    expected = tokenizer.apply_chat_template(whole)
    assert second["prompt_tokens"] == len(expected)
    # Only what is new was read.
    assert second["timings"]["prompt_tokens"] == len("<user>and now?")
    third = turn("the end.")
    said += [("user", "and now?"), ("assistant", second["text"])]
    # Without --save the folder is what it was.
    assert [tuple(m.values()) for m in messages_in(folder)] == said
    assert turn("the end.")["tokens"] == third["tokens"]

    assert "ends with a reply: give --prompt" in fail(
        "generate", "--chat", "--resume", folder
    )
    assert "exists; remove it or choose another" in fail(
        *command, "--chat", "--save", folder
    )


def test_room_is_had_as_the_message_says(run, fail, checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "talk"
    begin = ["--model", checkpoint, "--prompt", "hi", "--save", folder]
    begin += ["--room", "40"]
    short = ["generate", "--chat", "--max-new-tokens", "5"]
    run(*short, *begin)
    resume = [*short, "--resume", folder, "--prompt", "and now? " * 5]
    line = fail(*resume)
    (room,) = re.findall(r"give --room (\d+), with --resume and --save", line)
    run(*resume, "--room", room, "--save", folder)
    run(*resume)
    with monkeypatch.context() as patch:
        patch.setattr("kvjax.cli.prefix.load", lambda *_: pytest.fail("loaded"))
        line = fail(*resume, "--room", 512)
    assert "--room 512 exceeds what the model's context of 512 leaves behind" in line
    # What a template makes of earlier turns now is known once they are read.
    held = json.loads((folder / "prefix.json").read_text())["prompt_tokens"][0]
    assert f"room={513 - held} that exceeds" in fail(*resume, "--room", 513 - held)


def test_a_conversation_goes_on_in_its_own_folder(
    run, checkpoint, tmp_path, monkeypatch
):
    folder = tmp_path / "all" / "talk"
    turn = ["generate", "--chat", "--max-new-tokens", "2"]
    run(*turn, "--model", checkpoint, "--prompt", "hi", "--save", folder)
    monkeypatch.chdir(folder)
    run(*turn, "--resume", ".", "--save", ".", "--prompt", "and now?")
    assert len(messages_in(folder)) == 4
    assert [p.name for p in folder.parent.iterdir()] == ["talk"]


def test_a_conversation_begun_by_prefill(run, fail, checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "asked"
    options = ["--model", checkpoint, "--prompt", "hi", "--chat", "--system", "be kind"]
    run("prefill", *options, "--save", folder, "--room", "90")
    assert [m["role"] for m in messages_in(folder)] == ["system", "user"]
    # Left out, it is that of every conversation.
    found = json.loads(run("prefill", *options, "--save", tmp_path / "b", "--json"))
    assert found["prompt_tokens"] + found["room"] == 512
    now = [0.0]

    def read(*arguments):
        now[0] += 7.0
        return read_chunk(*arguments)

    read_chunk = reader.program(None)
    monkeypatch.setattr(reader, "program", lambda judge: read)
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(decode, "time", clock)
    alone = json.loads(run("generate", *options, "--json", "--max-new-tokens", "5"))
    kept = run(
        *("generate", *options, "--json", "--max-new-tokens", "5"),
        *("--save", tmp_path / "kept"),
    )
    # The prompt's are in them, whoever reads it.
    assert alone["seconds"] == json.loads(kept)["seconds"] == 7.0
    resume = ["generate", "--chat", "--resume", folder]
    found = json.loads(run(*resume, "--max-new-tokens", "5", "--json"))
    assert found["tokens"] == alone["tokens"]
    assert "waits for a reply: leave --prompt out" in fail(*resume, "--prompt", "x")
    raw = ["generate", "--resume", folder, "--prompt", "x"]
    assert "holds a conversation, in which a text behind it is a turn" in fail(*raw)
    line = fail(*resume, "--max-new-tokens", "91", "--save", tmp_path / "on")
    assert "room for 90 tokens more" in line
    assert not (tmp_path / "on").exists()


def test_what_is_no_conversation(run, fail, checkpoint, tmp_path):
    folder = tmp_path / "plain"
    run("prefill", "--model", checkpoint, "--prompt", "hi", "--save", folder)
    line = fail("generate", "--chat", "--resume", folder, "--prompt", "x")
    assert "holds no conversation: begin one with --chat --save" in line
    generate = ["generate", "--model", checkpoint, "--prompt", "x"]
    assert "--save keeps a conversation: add --chat" in fail(
        *generate, "--save", tmp_path / "new"
    )
    assert "--room is that of a conversation" in fail(*generate, "--room", "3")
    assert "give it where the conversation begins" in fail(
        *("generate", "--resume", folder, "--chat", "--system", "x", "--prompt", "x")
    )


def test_the_commands_of_the_page_run_as_they_stand(
    run, checkpoint, tmp_path, monkeypatch
):
    shutil.copytree(checkpoint, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```shell\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    said = [run(*shlex.split(line)[1:]) for line in block.strip().splitlines()]
    assert len(said) == 3
    roles = [message["role"] for message in messages_in(pathlib.Path("talk"))]
    assert roles == ["system", *["user", "assistant"] * 2]
