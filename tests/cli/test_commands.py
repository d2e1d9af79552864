"""The command line: results on stdout, the numbers of the API."""

import json
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny import TEXT

import kvjax
import models
from kvjax import cli, registry
from kvjax.cli import options
from kvjax.decoding.generate import generate
from kvjax.decoding.scoring import score
from kvjax.evaluation import compare as comparison

# What takes no model.


def test_version(run):
    assert run("--version") == f"kvjax {kvjax.__version__}\n"


COMMANDS = ("methods", "cite", "generate", "prefill", "score", "eval", "compare")
COMMANDS += ("convert", "plan", "reproduce", "train")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example_of_its_own(run, command):
    out = " ".join(run(command, "--help").split())
    assert f"Example: kvjax {command}" in out


@pytest.mark.parametrize("command", [one.name for one in cli.app.registered_commands])
def test_nothing_of_a_help_is_cut_in_a_narrow_terminal(run, command, monkeypatch):
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    out = run(command, "--help")
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_what_a_method_lacks_for_its_answers_is_a_line_on_stderr(
    run, checkpoint, capsys, tmp_path
):
    scores = tmp_path / "heads.json"
    scores.write_text('{"needle_mass": [[0.1, 0.2, 0.3, 0.4]]}')
    options = ["--model", str(checkpoint), "--prompt", "ab", "--max-new-tokens", "1"]

    def said(*arguments):
        cli.run(list(arguments))
        return [x for x in capsys.readouterr().err.splitlines() if "duo" in x]

    (line,) = said("generate", *options, "--method", "quantize+duo+full")
    assert line.startswith("kvjax: note: duo without heads: the first heads of each la")
    assert line.endswith("give heads=FILE, written with: kvjax heads --json > FILE")
    assert not said("generate", *options, "--method", f"duo:heads={scores}+full")
    sizes = ["--context", "64", "--budget", "16,32", "--new-tokens", "8"]
    assert not said("plan", "--model", str(checkpoint), "--method", "duo+full", *sizes)
    missing = ["--model", "no/where/at/all"]
    for command in (
        ["prefill", "--prompt", "x", "--save", str(tmp_path / "read")],
        ["score", "--text", str(scores)],
        ["eval", "--task", "passkey"],
        ["compare", *sizes, "--method", "duo+quest", "--out", str(tmp_path / "out")],
        ["calibrate", "--budget", "16,32"],
    ):
        notes = said(*command, *missing, "--method", "duo+full")
        assert notes == [line], command
    assert not said("bench", "decode", *missing, "--method", "duo+full")


def test_a_chat_is_told_from_a_question_in_one(run):
    for command, words in [
        ("prefill", "Use the model's chat template."),
        ("compare", "Ask in the model's chat template"),
        ("eval", "Ask in the model's chat template"),
    ]:
        assert words in " ".join(run(command, "--help").replace("│", " ").split())


def test_no_command_is_help(run):
    out = run()
    assert all(command in out for command in COMMANDS)


def test_methods_lists_the_registry(run):
    known = json.loads(run("methods", "--json"))
    assert [entry["name"] for entry in known] == [
        *registry.names(),
        *registry.transforms(),
    ]
    text = " ".join(run("methods").split())
    for entry in known:
        assert entry["summary"] in text
        assert entry["reads"] in text
        options = registry.options(entry["name"])
        assert entry["options"] == {key: p.default for key, p in options.items()}
        assert "not said" not in entry.values()


def test_cite_prints_entries_of_every_method_named_and_of_kvjax(run):
    printed = run("cite", "quest:budget=64", "retro+h2o", "h2o")
    keys = re.findall(r"^@\w+\{(\w+),$", printed, re.MULTILINE)
    assert keys == [
        *("tang2024quest", "choi2025retrospective", "zhang2023h2o"),
        *("xu2024refreshkv", "kvjax2026"),
    ]
    # BibTeX takes any @ for the start of an entry.
    assert printed.count("@") == len(keys)
    assert "% quest: Tang et al." in printed
    document = json.loads(run("cite", "quest", "--json"))
    (quest,) = document["methods"]
    assert quest["source"].startswith("Tang et al.")
    assert quest["bibtex"][0] in printed
    assert run("cite").strip() == document["kvjax"]


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
        (["--steps", "3"], "--steps is of kvjax bench decode: leave it out"),
        (["--method", "full"], "--method is of kvjax bench decode: leave it out"),
        (["decode", "--page-size", "16"], "--page-size is of kvjax bench kernels"),
        (["decode", "--method", "qest"], "did you mean 'quest'?"),
        (["decode", "--repeats", "0"], "repeats=0 must be at least 1"),
    ],
)
def test_what_cannot_be_timed_is_an_error(fail, options, message):
    assert message in fail("bench", *options)


# With a model.


def test_bench_times_the_steps_of_a_model(run, checkpoint):
    command = ["bench", "decode", "--model", checkpoint, "--context", "64,96"]
    command += ["--steps", "2", "--repeats", "1", "--budget", "16"]
    command += ["--method", "full", "--method", "streaming_llm"]
    document = json.loads(run(*command, "--json"))
    found = [(row["method"], row["context"]) for row in document["rows"]]
    specs = "full", "streaming_llm:budget=16"
    assert found == [(spec, context) for context in (64, 96) for spec in specs]
    for row in document["rows"]:
        assert row["num_bytes"] == row["cache_bytes"] + document["weights_read"]
    assert document["manifest"]["settings"]["steps"] == 2
    table = run(*command)
    assert all(spec in table for spec in specs)
    assert "of weights are read a step" in " ".join(table.split())


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


def test_what_loading_compiles_is_none_of_a_generations_seconds(
    run, checkpoint, monkeypatch
):
    def traced(x):
        time.sleep(0.5)
        return x

    def load(*given):
        jax.jit(traced)(1)
        return options.load(*given)

    monkeypatch.setattr("kvjax.cli.decode.load", load)
    command = ["generate", "--model", checkpoint, "--prompt", "ab", "--json"]
    found = json.loads(run(*command, "--max-new-tokens", "2"))
    assert found["timings"]["compile_seconds"] <= found["seconds"]


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
    asked = ["--method", "snapkv:budget=40", "--question", "after"]
    assert run("eval", *options, *asked).startswith(
        "passkey, snapkv:budget=40, context 200, question after it: "
    )
    assert document["question"] == "seen"


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


@pytest.fixture
def compared(checkpoint, text_file, tmp_path):
    """Arguments of a small comparison."""
    options = ["--model", checkpoint, "--text", text_file, "--out", tmp_path / "report"]
    options += ["--context", "352", "--new-tokens", "8", "--windows", "2", "--n", "1"]
    return ["compare", *options, "--budget", "40"]


def test_a_comparison_goes_on_where_it_was_stopped(
    run, fail, compared, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "report" / "results.json"
    original = comparison.compare_runs.seconds_to_read
    timed = []

    def stopped(model, method, *arguments, **options):
        timed.append(method)
        if len(timed) == 3:
            raise KeyboardInterrupt
        return original(model, method, *arguments, **options)

    methods = ["--method", "snapkv", "--method", "streaming_llm"]
    monkeypatch.setattr(comparison.compare_runs, "seconds_to_read", stopped)
    assert cli.run([str(argument) for argument in [*compared, *methods]]) == 130
    capsys.readouterr()
    before = json.loads(data.read_text("utf-8"))
    assert [row["method"] for row in before["rows"]] == ["full", "snapkv:budget=40"]
    assert before["complete"] is False

    # What is there is not lost by a second call without a word.
    line = fail(*compared, *methods)
    assert "results.json is there from an earlier run" in line
    assert "--continue" in line
    assert "--overwrite" in line
    assert json.loads(data.read_text("utf-8")) == before

    monkeypatch.setattr(comparison.compare_runs, "seconds_to_read", original)
    line = fail(*compared, *methods, "--continue", "--seed", "1")
    assert "seed=0 and cannot go on with 1" in line
    run(*compared, *methods, "--continue")
    after = json.loads(data.read_text("utf-8"))
    assert after["complete"] is True
    assert after["rows"][:2] == before["rows"]
    names = [row["method"] for row in after["rows"]]
    assert names == ["full", "snapkv:budget=40", "streaming_llm:budget=40"]

    # A row that was gone on with is the row of a run that was never stopped.
    run(*compared, *methods, "--overwrite")
    whole = json.loads(data.read_text("utf-8"))["rows"][2]
    speed = ("tokens_per_second", "prefill_seconds")
    for name in whole.keys() - set(speed):
        assert after["rows"][2][name] == whole[name], name
    assert "not both" in fail(*compared, "--continue", "--overwrite")

    # What is to be replaced is not taken up again by --continue.
    def at_once(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.compare_runs, "retrieve", at_once)
    assert (
        cli.run([str(argument) for argument in [*compared, *methods, "--overwrite"]])
        == 130
    )
    capsys.readouterr()
    begun = json.loads(data.read_text("utf-8"))
    assert (begun["rows"], begun["complete"]) == ([], False)
    assert not data.with_name("report.html").exists()

    data.write_text("{")
    assert "is damaged" in fail(*compared, *methods, "--continue")


def test_the_budget_goes_to_every_method_that_does_not_say():
    found = cli.compare._methods(
        ["dense_layers:first=1+quest:page_size=8", "tova:budget=5"], 100, [32]
    )
    assert list(found) == [
        "full",
        "dense_layers:first=1+quest:budget=32,page_size=8",
        "tova:budget=5",
    ]
    for alpha in (1.0, 1.5):
        every = cli.compare._methods(cli.compare._every(alpha), 1024, [256])
        named = dict.fromkeys(spec.partition(":")[0] for spec in every)
        more = ["retro+quest"] if alpha == 1 else []
        hidden = (*cli.compare.BY_NAME, cli.compare.SAME)
        names = [name for name in registry.names(alpha) if name not in hidden]
        assert list(named) == [*names, *more]
    assert "entmaxkv:budget=256,selector=gaussian" in every
    assert "quest:budget=256" not in every


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


def test_what_a_user_must_know_of_a_model_is_one_line_on_stderr(
    checkpoint, text_file, capsys
):
    given = json.loads((checkpoint / "config.json").read_text())
    given |= {"model_type": "mistral", "sliding_window": 64}
    del given["attention_bias"], given["mlp_bias"]
    windowed = shutil.copytree(checkpoint, text_file.parent / "windowed")
    (windowed / "config.json").write_text(json.dumps(given))
    note = "kvjax: note: the context ends at 64 tokens, the sliding window of the"
    plan = ["plan", "--model", windowed / "config.json", "--method", "full"]
    plan += ["--context", 64, "--new-tokens", 8, "--device", "T4", "--json"]
    generate = ["generate", "--model", windowed, "--prompt", "x", "--max-new-tokens", 2]
    for command in (plan, generate):
        assert cli.run([str(argument) for argument in command]) == 0
        captured = capsys.readouterr()
        assert captured.err.count("kvjax: note: ") == captured.err.count(note) == 1
        assert "note" not in captured.out
