"""The command line: results on stdout, one line a mistake, the numbers of the API."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

import kvjax
import models
from kvjax import cli, registry
from kvjax.generate import generate
from kvjax.scoring import score
from models.llama.tokenizer import HFTokenizer

TEXT = "".join(
    f"line {i * 7919 % 1000} is about {'abcdefgh'[i % 8]}.\n" for i in range(90)
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    return HFTokenizer(backend, {}, {"default": TEMPLATE})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_model(num_layers=1, context=512)
    model = model._replace(tokenizer=byte_tokenizer(), eos_ids=(258,))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.save_pretrained(model, folder)
    return folder


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compiled code goes to a folder of the test, and JAX forgets it afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def run(capsys):
    """Runs a command and returns what it prints; it must succeed."""

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def fail(capsys):
    """Runs a command that must fail as users' mistakes do; returns its one line."""

    def fail(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("kvjax: error: ")
        return line

    return fail


# What takes no model.


def test_version(run):
    assert run("--version") == f"kvjax {kvjax.__version__}\n"


COMMANDS = ("methods", "cite", "generate", "score", "eval", "compare", "train")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example_of_its_own(run, command):
    out = " ".join(run(command, "--help").split())
    assert f"Example: kvjax {command}" in out


def test_no_command_is_help(run):
    out = run()
    assert all(command in out for command in COMMANDS)


def test_methods_lists_the_registry(run):
    known = json.loads(run("methods", "--json"))
    assert [entry["name"] for entry in known] == [
        *registry.names(),
        *registry.transforms(),
    ]
    text = run("methods")
    for entry in known:
        assert entry["summary"] in text
        assert entry["reads"] in text
        options = registry.options(entry["name"])
        assert entry["options"] == {key: p.default for key, p in options.items()}
        assert "not said" not in entry.values()


def test_cite_prints_the_source(run):
    assert "arXiv:2406.10774" in run("cite", "quest")
    document = json.loads(run("cite", "quest", "--json"))
    assert document["source"].startswith("Tang et al.")


def test_python_m_kvjax_is_quick_to_answer_and_imports_nothing_heavy():
    code = (
        "import sys; from kvjax import cli; cli.run(['methods']); "
        "print([m for m in ('flax', 'models', 'matplotlib', 'tokenizers', 'jinja2', "
        "'optax', 'orbax', 'grain', 'yaml') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_process_ends_with_the_code_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "kvjax", "cite", "quset"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "unknown method 'quset'; did you mean 'quest'?" in done.stderr


SMALL_LAYER = (
    *("--budget", "32", "--page-size", "16", "--kv-heads", "2", "--group", "2"),
    *("--head-dim", "8", "--repeats", "1"),
)


def test_bench_prints_every_operation_at_every_context(run):
    printed = run("bench", "kernels", "--context", "64,128", *SMALL_LAYER, "--json")
    document = json.loads(printed)
    assert document["manifest"]["settings"]["context"] == [64, 128]
    names = [(row["name"], row["context"]) for row in document["rows"]]
    half = len(names) // 2
    assert names[half:] == [(name, 128) for name, _ in names[:half]]
    assert ("sparse", 64) in names
    table = run("bench", "--context", "64", *SMALL_LAYER)
    assert all(name in table for name, _ in names)
    assert "floor ms" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layers"], "subject='layers' must be one of kernels"),
        (["--context", "1e5"], "--context 1e5 must be whole numbers with commas"),
        (["--context", "100"], "must be multiples of page_size=64"),
        (["--group", "0"], "group=0 must be at least 1"),
    ],
)
def test_what_cannot_be_timed_is_an_error(fail, options, message):
    assert message in fail("bench", *options)


# With a model.


def test_generate_is_the_apis_text(run, checkpoint):
    options = [
        "--model",
        checkpoint,
        "--method",
        "quest:budget=16",
        "--prompt",
        TEXT[:99],
    ]
    options += ["--max-new-tokens", "20"]
    document = json.loads(run("generate", *options, "--json"))
    model = models.load(checkpoint)
    (expected,) = generate(
        model, registry.parse("quest:budget=16"), [TEXT[:99]], max_new_tokens=20
    )
    assert document["tokens"] == expected.tokens
    assert document["text"] == expected.text
    assert document["prompt_tokens"] == 99
    assert run("generate", *options) == expected.text + "\n"


def test_generate_passes_sampling_stop_and_seed_on(run, checkpoint, text_file):
    text_file.write_text(TEXT[:99])
    options = ["--model", checkpoint, "--prompt-file", text_file, "--temperature", "2"]
    options += ["--max-new-tokens", "12", "--json", "--top-k", "50", "--seed"]
    one, again, other = (
        json.loads(run("generate", *options, seed)) for seed in (1, 1, 2)
    )
    assert one["tokens"] == again["tokens"] != other["tokens"]
    letter = next(c for c in one["text"] if c.isascii())
    stopped = json.loads(run("generate", *options, 1, "--stop", letter))
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == one["text"][: one["text"].index(letter)]


def test_chat_wraps_the_prompt_in_the_template(run, checkpoint):
    options = ["--model", checkpoint, "--prompt", "hi", "--max-new-tokens", "1"]
    document = json.loads(run("generate", *options, "--json", "--chat"))
    assert document["prompt_tokens"] == len("<user>hi")


def test_score_is_the_apis(run, checkpoint, text_file):
    text_file.write_text(TEXT[:200])
    options = ["--model", checkpoint, "--text", text_file]
    options += ["--method", "streaming_llm:budget=16", "--prefill", "150"]
    document = json.loads(run("score", *options, "--json"))
    model, method = models.load(checkpoint), registry.parse("streaming_llm:budget=16")
    tokens = model.tokenizer.encode(TEXT[:200])
    expected = score(model, method, [tokens], prefill=150).log_probs[0]
    np.testing.assert_allclose(document["log_probs"], expected, rtol=1e-6)
    assert document["token_ids"] == tokens
    assert document["predicted_by_decode_steps"] == 49
    assert document["perplexity"] == pytest.approx(np.exp(-expected[150:].mean()))
    assert f"{document['perplexity']:.4f}" in run("score", *options)


def test_eval_prints_the_accuracy_it_measured(run, checkpoint, text_file):
    options = ["--model", checkpoint, "--text", text_file, "--task", "passkey"]
    options += ["--context", "200", "--n", "2", "--batch", "2"]
    document = json.loads(run("eval", *options, "--json"))
    assert document["task"] == "passkey"
    assert document["accuracy"]["n"] == 2
    correct = sum(example["correct"] for example in document["examples"])
    assert document["accuracy"]["mean"] == correct / 2
    out = run("eval", *options)
    assert out.startswith("passkey, full, context 200: ")
    assert "n=2" in out


def test_compare_writes_what_it_prints(run, checkpoint, text_file, tmp_path):
    out = tmp_path / "report"
    options = ["--model", checkpoint, "--text", text_file, "--out", out, "--n", "2"]
    options += ["--context", "352", "--new-tokens", "8", "--windows", "2"]
    options += ["--batch", "2", "--budget", "32", "--method", "streaming_llm", "--json"]
    printed = json.loads(run("compare", *options))
    assert printed == json.loads((out / "results.json").read_text("utf-8"))
    names = [row["method"] for row in printed["rows"]]
    assert names == ["full", "streaming_llm:budget=32"]
    assert names[1] in (out / "report.html").read_text("utf-8")
    about = printed["manifest"]
    assert about["arguments"] == ["compare", *map(str, options)]
    assert about["settings"]["budget"] == 32
    assert about["settings"]["seed"] == 0


def test_the_budget_goes_to_every_method_that_does_not_say():
    found = cli.evaluate._methods(
        ["dense_layers:first=1+quest:page_size=8", "tova:budget=5"], 100, 32
    )
    assert list(found) == [
        "full",
        "dense_layers:first=1+quest:budget=32,page_size=8",
        "tova:budget=5",
    ]
    every = cli.evaluate._methods(None, 1024, 256)
    assert [spec.partition(":")[0] for spec in every] == list(registry.names())


def test_compiled_code_is_kept_between_runs(run, checkpoint, tmp_path):
    options = ["--model", checkpoint, "--prompt", "hi", "--max-new-tokens", "2"]
    run("generate", *options)
    assert jax.config.jax_compilation_cache_dir == str(
        tmp_path / "cache" / "kvjax" / "xla"
    )


def test_a_cache_that_cannot_be_made_is_no_fault(
    run, checkpoint, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    options = ["--model", checkpoint, "--prompt", "hi", "--max-new-tokens", "2"]
    run("generate", *options)


# Training.


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path):
    """A config of two steps on the text, in the checkpoint's tokens."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
model:
  config: {{model_type: llama, vocab_size: 260, hidden_size: 16, intermediate_size: 16,
           num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
           head_dim: 8, max_position_embeddings: 512, rms_norm_eps: 1e-5}}
  tokenizer: {checkpoint}
data: {{corpus: {text_file}, held_out: {text_file}, threads: 0}}
stages: [{{steps: 2, tokens: 64, lengths: {{16: 1}}, mixture: {{text: 1}}}}]
evaluate: {{tokens: 64}}
log: {{every: 1, tensorboard: false}}
""")
    return path


def test_train_makes_a_model_that_the_other_commands_read(run, recipe, tmp_path):
    out = tmp_path / "run"
    printed = run("train", "--config", recipe, "--out", out)
    assert printed == f"{out / 'model'}\n"
    lines = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2]
    trained = models.load(out / "model")
    assert trained.decoder.vocab_size == 260
    options = ["--model", out / "model", "--prompt", "line", "--max-new-tokens", "3"]
    assert run("generate", *options)

    # More steps, from the run's own config.
    run("train", "--out", out, "--resume", "--set", "stages.0.steps=3")
    lines = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3]
    again = models.load(out / "model")
    different = jax.tree.map(
        lambda a, b: bool((a != b).any()), trained.params, again.params
    )
    assert any(jax.tree.leaves(different))


def test_train_goes_on_from_a_checkpoint(run, recipe, checkpoint, tmp_path):
    options = ["--set", "model.config=null", "--set", "model.tokenizer=null"]
    options += ["--set", f"model.checkpoint={checkpoint}", "--set", "optimizer.lr=1e-9"]
    run("train", "--config", recipe, "--out", tmp_path / "run", *options)
    before, after = models.load(checkpoint), models.load(tmp_path / "run" / "model")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        before.params,
        after.params,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "",
            "give --config a YAML file or a preset (embedded-entmax, embedded-softmax",
        ),
        ("--config nowhere", "nowhere is no file and no preset; presets: "),
        ("--config RECIPE --resume", "out holds no run to resume"),
        ("--config RECIPE --set optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("--config RECIPE --set data.corpus=no.txt", "'no.txt' matches no file"),
        ("--config RECIPE --set data.corpus=EMPTY", "holds no text: every file is em"),
        ("--config RECIPE --set stages.0.mixture.txt=1", "there is no source 'txt'"),
        ("--config RECIPE --set model.config.vocab_size=9", "raise model.config.vocab"),
        ("--config RECIPE --set model.config.hidden=9", "key hidden=9 is not known"),
        (
            "--config RECIPE --set optimizer.lr=1e30 --set optimizer.clip=0",
            "training stopped, and no checkpoint was saved before it",
        ),
    ],
)
def test_mistakes_in_training(
    run, recipe, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    arguments = arguments.replace("RECIPE", str(recipe)).replace("EMPTY", "empty.txt")
    assert cli.run(["train", "--out", "out", *arguments.split()]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("kvjax: error: ")
    assert message in line


def test_train_says_which_extra_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['grain'] = None; from kvjax import cli; "
        f"sys.exit(cli.run(['train', '--config', 'toy', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    line = "kvjax: error: training needs grain: pip install 'kvjax[train]'.\n"
    assert done.stderr == line


# Mistakes: one line that names what is wrong.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
        ("generate --prompt x --top-p 0", "top_p=0.0 must be in (0, 1]"),
        ("generate", "--prompt or --prompt-file"),
        ("generate --prompt x --prompt-file y", "only one of them"),
        ("generate --prompt-file nowhere.txt", "nowhere.txt"),
        ("score --text nowhere.txt", "nowhere.txt"),
        ("eval --task needle", "unknown task='needle': choose one of passkey,"),
        ("eval --task passkey --n -3", "n=-3 must be at least 1"),
        ("eval --task passkey --context 0", "context=0 must be at least 1"),
        ("compare --n -3", "examples=-3 must be at least 1"),
        ("compare --budget 0", "budget=0 must be at least 1"),
        ("compare --budget 16", "snapkv:budget=16: budget=16 must exceed window=32"),
        ("compare --budget 2048", "budget=2048 must be below context=512"),
        ("compare --new-tokens 2000", "new_tokens=2000 must be in [2, context=512)"),
    ],
)
def test_mistakes_that_need_no_model(fail, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*arguments.split())


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
