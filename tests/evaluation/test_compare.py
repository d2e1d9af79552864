"""The comparison: every method sees the same inputs, and its numbers are its own."""

import threading
import types

import jax
import numpy as np
import pytest
from tiny import ByteTokenizer, tiny_model

import kvjax
from kvjax import accounting
from kvjax.decoding.feeding import Fed
from kvjax.decoding.generate import generate
from kvjax.decoding.scoring import score
from kvjax.evaluation import (
    compare,
    compare_inputs,
    compare_runs,
    continuations,
    one_task,
)
from kvjax.evaluation.tasks import chain, needles
from kvjax.report import table

MODEL = tiny_model(num_layers=1)
TEXT = "".join(
    f"line {i * 7919 % 1000} is about {'abcdefgh'[i % 8] * 5}.\n" for i in range(300)
)
SETTINGS = compare_inputs.Settings(
    context=352, new_tokens=16, examples=3, windows=3, batch=2, depths=(0.0, 1.0)
)
GENERATED = {"max_new_tokens": 16, "eos_ids": ()}
METHODS = {
    "full": kvjax.full(),
    "same": kvjax.parse("quest:budget=512"),
    "streaming": kvjax.parse("streaming_llm:budget=16"),
}


DROP_PROGRAMS = compare_runs.drop_programs


@pytest.fixture(autouse=True)
def kept_programs(monkeypatch):
    """What is compiled stays for the next comparison here; `rows` drops it."""
    monkeypatch.setattr(compare_runs, "drop_programs", lambda: None)


@pytest.fixture(scope="module")
def inputs():
    return compare_inputs.make_inputs(MODEL, TEXT, SETTINGS)


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def rows(inputs, seen):
    order = {name: METHODS[name] for name in ("same", "streaming", "full")}
    return compare.compare(
        MODEL, order, inputs, SETTINGS, progress=lambda *event: seen.append(event)
    ).rows


def test_the_reference_comes_first_then_the_given_order(rows):
    assert [row.method for row in rows] == ["full", "same", "streaming"]


def test_two_threads_only_on_a_cpu_where_states_take_little_room(monkeypatch):
    decoder, group = MODEL.decoder, [METHODS["full"], METHODS["streaming"]]
    full, streaming = [
        accounting.bytes_of_prompt(method, decoder, SETTINGS.context, 16)
        for method in group
    ]
    lengths = 4 * decoder.num_layers  # of a row; the one thing that both keep
    # While one decodes there are a copy of it and one of the reference.
    held = full + streaming - lengths + 2 * full
    least = 8 * SETTINGS.batch * held
    assert compare._threads(decoder, group, SETTINGS, least) == 2
    assert compare._threads(decoder, group, SETTINGS, least - 1) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compare._threads(decoder, group, SETTINGS, least) == 1


class Watched(ByteTokenizer):
    """Knows which threads asked it."""

    def __init__(self):
        self.threads = set()

    def decode(self, tokens):
        self.threads.add(threading.current_thread())
        return super().decode(tokens)


def test_threads_change_no_figure_and_leave_the_clocks_alone(inputs, monkeypatch):
    """Two threads or one: nothing but a speed tells; a tokenizer sees one alone."""
    running, tokenizer = [], Watched()
    model = MODEL._replace(tokenizer=tokenizer)

    def watched(module, name):
        original = getattr(module, name)

        def run(*arguments, **options):
            others = [job for job in threading.enumerate() if "Pool" in job.name]
            running.append((name, threading.current_thread(), others))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, run)

    watched(compare_runs, "compile_reading")
    watched(compare_runs, "seconds_to_read")
    watched(continuations, "_continued")
    chosen = {name: METHODS[name] for name in ("full", "streaming")}
    DROP_PROGRAMS()  # threads compile: what runs alone behind them finds it done
    monkeypatch.setattr(compare, "_threads", lambda *_: 2)
    beside = compare.compare(model, chosen, inputs, SETTINGS).rows
    calls = {name: [] for name, *_ in running}
    for name, job, others in running:
        calls[name].append((job is threading.main_thread(), bool(others)))
    assert sorted(calls) == ["_continued", "compile_reading", "seconds_to_read"]
    assert set(calls.pop("compile_reading")) == {(False, True)}
    for timed in calls.values():
        assert set(timed) == {(True, False)}

    running.clear()
    monkeypatch.setattr(compare, "_threads", lambda *_: 1)
    alone = compare.compare(model, chosen, inputs, SETTINGS).rows
    assert all(job is threading.main_thread() for _, job, _ in running)
    speeds = {"tokens_per_second": 0.0, "prefill_seconds": 0.0}
    for one, two in zip(alone, beside, strict=True):
        assert one._replace(**speeds) == two._replace(**speeds)
    assert tokenizer.threads == {threading.main_thread()}


def test_the_reference_agrees_with_itself(rows):
    assert rows[0].nats_lost[:3] == (0, 0, 0)
    assert rows[0].top1_agreement.mean == 1
    assert rows[0].kl.mean == pytest.approx(0, abs=1e-9)
    assert rows[0].kl_p99[:3] == pytest.approx((0, 0, 0), abs=1e-9)
    assert rows[0].tokens_before_difference == (16, 16, 16, 3)


def test_a_method_with_room_for_everything_gives_the_references_numbers(rows):
    full, same, _ = rows
    assert same.perplexity.mean == pytest.approx(full.perplexity.mean, rel=1e-3)
    assert same.top1_agreement.mean >= 0.97  # near-ties may flip
    for task in ("passkey", "multikey", "chain"):
        assert getattr(same, task) == getattr(full, task)


def test_a_method_that_forgets_shows_it(rows):
    forgetful = rows[2]
    assert forgetful.kl.mean > 0.05
    assert forgetful.top1_agreement.mean < 0.9
    assert forgetful.kl_p99.mean > forgetful.kl.mean
    assert forgetful.kl_p99.high == np.inf  # of 45 tokens
    assert abs(forgetful.nats_lost.mean) > 1e-3


def test_perplexity_is_of_the_tokens_after_the_prompt_that_decode_steps_predict(
    rows, inputs
):
    before = SETTINGS.context - 16
    for row in rows:
        scores = score(MODEL, METHODS[row.method], inputs.windows, prefill=before)
        expected = np.exp(-scores.log_probs[:, -15:].mean())
        assert row.perplexity.mean == pytest.approx(expected, rel=1e-3)
        assert row.perplexity.n == 3


def test_bytes_are_the_accountings(rows):
    for row in rows:
        method = METHODS[row.method]
        assert row.bytes_read == accounting.bytes_read(method, MODEL.decoder, 352, 16)
        assert row.bytes_held == accounting.bytes_held(method, MODEL.decoder, 352, 16)
    assert rows[2].bytes_read < rows[0].bytes_read / 10


def test_what_attention_loses_is_measured(rows):
    full, same, forgetful = rows
    layer = MODEL.decoder.cache_spec(1, 352)
    token = 2 * 4 * layer.num_kv_heads * layer.head_dim  # bytes, float32
    held = np.arange(337, 352)  # tokens of each of the 15 steps
    assert full.bytes_measured == pytest.approx(held.mean() * token)
    metadata = accounting.traffic(METHODS["same"], MODEL.decoder, 352, 16).metadata
    assert same.bytes_measured == pytest.approx(held.mean() * token + metadata)
    assert forgetful.bytes_measured == 16 * token == forgetful.bytes_read
    for exact in (full, same):
        assert exact.proved_exact.mean == exact.support.mean == 1
        assert exact.dropped_mass.mean == 0
        assert exact.output_error.mean < 1e-5
    assert full.full_steps.mean == 1
    assert forgetful.full_steps.mean == forgetful.proved_exact.mean == 0
    assert forgetful.support.mean == pytest.approx((16 / held).mean(), rel=1e-4)
    assert forgetful.output_error.mean > 0.01


def test_what_comes_from_the_host_is_counted(inputs):
    """With room for every page each comes once, for the first of 15 steps."""
    spec = "offload:cache=0+quest:budget=512"
    methods = {"full": METHODS["full"], spec: kvjax.parse(spec)}
    results = compare.compare(MODEL, methods, inputs, SETTINGS)
    full, away = results.rows
    layer = MODEL.decoder.cache_spec(1, 352)
    page = 16 * 2 * 4 * layer.num_kv_heads * layer.head_dim  # bytes, float32
    full_pages = 336 // 16
    assert away.bytes_moved == pytest.approx(full_pages * page / 15, rel=1e-6)
    assert away.pages_found.mean == pytest.approx(1 - 1 / 15, rel=1e-6)
    assert away.bytes_in_host == 352 // 16 * page
    held = accounting.bytes_held(methods[spec], MODEL.decoder, 352, 16)
    assert away.bytes_held == held - away.bytes_in_host
    assert away.kl.mean < 1e-9
    assert full.bytes_in_host is full.bytes_moved is full.pages_found is None
    columns = results.columns()
    assert columns["bytes_in_host"] == [None, away.bytes_in_host]
    assert columns["pages_found"] == [None, away.pages_found.mean]


def test_depths_add_up(rows):
    for row in rows:
        assert [cell[0] for cell in row.passkey_by_depth] == [0.0, 1.0]
        assert [cell[2] for cell in row.multikey_by_depth] == [2, 1]
        correct = sum(cell[1] for cell in row.passkey_by_depth)
        assert row.passkey.mean == pytest.approx(correct / 3)


def test_speed_and_progress_are_reported(rows, seen):
    for row in rows:
        assert 0 < row.prefill_seconds < 60
        assert 0 < row.tokens_per_second < 1e7
        fractions = [fraction for name, fraction in seen if name == row.method]
        assert fractions[0] == 0
        assert fractions[-1] == 1
        assert fractions == sorted(fractions)


def answering(monkeypatch, reply):
    """Replaces decoding: row i of the batch says `reply(its prompt)`."""
    calls, prompts, really = [], [], compare_runs.together.read_checked

    def read(model, methods, given, options):
        prompts[:] = given
        return really(model, methods, given, options)

    def feed(model, method, prefilled, wanted, **options):
        calls.append(wanted.shape)
        assert (wanted == compare_runs.feeding.CHOOSE).all()
        said = [list(reply(bytes(p).decode()).encode()) for p in prompts]
        padded = [row + [32] * wanted.shape[1] for row in said]
        tokens = np.array([row[: wanted.shape[1]] for row in padded], np.int32)
        return Fed(tokens, np.zeros(tokens.shape), None, (), ())

    own = types.SimpleNamespace(CHOOSE=-1, feed=feed, drop_programs=lambda: None)
    monkeypatch.setattr(compare_runs.together, "read_checked", read)
    monkeypatch.setattr(compare_runs, "feeding", own)  # others decode
    return calls


def test_retrieval_counts_right_answers_in_their_places(monkeypatch):
    examples = needles.passkey(MODEL.tokenizer, TEXT, context=200, n=5)
    answers = {example.text: example.answer for example in examples}
    right = [example.text for example in examples[::2]]
    calls = answering(
        monkeypatch, lambda text: answers[text] + ". R" if text in right else "nonsense"
    )
    (found,) = compare_runs.retrieve(
        MODEL, [METHODS["full"]], examples, new_tokens=9, batch=2
    )
    assert found.scores == [1, 0, 1, 0, 1]
    assert len(found.answers) == 5
    # Three batches, all of one shape: an answer has five digits.
    assert calls == [(2, 7)] * 3


def test_choosing_is_timed_and_nothing_else(monkeypatch):
    clock = iter(np.arange(0.0, 90, 1.0) ** 2)  # start, end: gaps grow
    own = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(continuations, "time", own)  # others look at theirs
    windows = [[i] * 40 for i in range(3)]
    found = continuations.expect(
        MODEL, METHODS["full"], windows, new_tokens=8, batch=2
    ).continued
    # Two batches: ticks 0 and 1, then 4 and 9.
    assert found.tokens_per_second == [2 * 8 / (1 - 0), 2 * 8 / (9 - 4)]


def test_tokens_are_counted_up_to_the_first_that_differs(rows, inputs):
    reference = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    chosen = np.array([[1, 2, 3, 4], [1, 2, 9, 4], [9, 2, 3, 4]])
    counted = continuations.tokens_before_difference(reference, chosen)
    assert counted.tolist() == [4, 2, 0]
    # Of a method it is what two plain generations have in common.
    prompts = [window[:336] for window in inputs.windows]
    said = [
        [one.tokens for one in generate(MODEL, METHODS[name], prompts, **GENERATED)]
        for name in ("full", "streaming")
    ]
    alike = [
        next((i for i in range(16) if a[i] != b[i]), 16)
        for a, b in zip(*said, strict=True)
    ]
    assert min(alike) < 16
    assert rows[2].tokens_before_difference.mean == pytest.approx(np.mean(alike))


def read_list(text):
    """A perfect reader: follows the chain through the list."""
    body, _, question = text.rpartition("\nchain: ")
    follows = dict(line.split("-") for line in body.split())
    word = question.rpartition(", ")[2]
    said = ""
    for _ in range(6):
        said += f", {word}-{follows[word]}"
        word = follows[word]
    return said.removeprefix(", ").removeprefix(question.rpartition(", ")[2])


def test_links_are_counted_up_to_the_first_mistake(monkeypatch):
    examples = chain.chain_of_key(MODEL.tokenizer, "", context=400, n=3)
    mistakes = iter([None, 3, 0])  # links that are right

    def reply(text):
        links = read_list(text).split(", ")
        wrong = next(mistakes)
        if wrong is not None:
            links[wrong] = "-x" if wrong == 0 else "x-x"
        return ", ".join(links)

    answering(monkeypatch, reply)
    result = one_task.run(
        "chain",
        MODEL,
        METHODS["full"],
        METHODS["full"],
        TEXT,
        context=400,
        n=3,
        batch=1,
    )
    assert [example["score"] for example in result["examples"]] == [1, 0.6, 0]
    assert result["valid_prefix"]["mean"] == pytest.approx(1.6 / 3)
    assert [example["expected"] for example in result["examples"]] == [
        example.answer for example in examples
    ]


def test_scores_go_to_their_own_task(monkeypatch, inputs):
    chains = {example.text for example in inputs.chain}
    passkeys = {example.text: example.answer for example in inputs.passkey}

    def reply(text):
        if text in chains:
            return read_list(text)
        return passkeys.get(text, "nothing")

    answering(monkeypatch, reply)
    (row,) = compare.compare(MODEL, {"full": METHODS["full"]}, inputs, SETTINGS).rows
    assert (row.passkey.mean, row.multikey.mean, row.chain.mean) == (1, 0, 1)
    assert row.chain_links == inputs.chain[0].links == 1


def test_a_chain_has_as_many_links_as_new_tokens_can_hold():
    # Of bytes: a word is 3 to 7 tokens, a link up to 17.
    for new_tokens, most in ((8, 1), (64, 4), (100, 5)):
        settings = compare_inputs.Settings(
            context=400, new_tokens=new_tokens, examples=4, windows=1
        )
        made = compare_inputs.make_inputs(MODEL, TEXT, settings).chain
        assert {example.links for example in made} == {most}
        assert max(example.answer_tokens for example in made) <= new_tokens


# The others take longer contexts: test_ruler, test_long_output.
LONG = (*one_task.MATCHED, "countdown", "path_traversal")
FITTING = [task for task in one_task.TASKS if task not in LONG]


@pytest.mark.parametrize("task", FITTING)
def test_a_task_alone(task):
    result = one_task.run(
        task,
        MODEL,
        METHODS["streaming"],
        METHODS["full"],
        TEXT,
        context=352,
        n=3,
        new_tokens=16,
        batch=2,
    )
    if task == "chain":
        assert result["valid_prefix"]["n"] == len(result["examples"]) == 3
        assert result["links"] == 5
    elif task == "extraction":
        assert result["f1"]["n"] == len(result["examples"]) == 3
        assert result["rows"] == 12
    elif task in one_task.RETRIEVAL:
        assert result["accuracy"]["n"] == 3
        assert len(result["examples"]) == 3
        assert sum(cell["asked"] for cell in result["by_depth"]) == 3
    elif task == "perplexity":
        assert result["tokens_per_window"] == 15
        assert result["perplexity"]["mean"] == pytest.approx(
            np.exp(-result["log_prob"]["mean"])
        )
        # A byte is a token here.
        bits = -result["log_prob"]["mean"] / np.log(2)
        assert result["bits_per_byte"]["mean"] == pytest.approx(bits)
    else:
        assert [layer["layer"] for layer in result["layers"]] == [0]
        for layer in result["layers"]:
            assert layer["error"]["mean"] > 0.01
            assert 0 < layer["dropped"]["mean"] < 1
            # Under softmax every token has weight: of 352 it sees 16.
            assert layer["support"]["mean"] == pytest.approx(16 / 344, rel=0.05)
            assert layer["exact"]["mean"] == 0


def test_an_entmax_models_layers_say_what_was_lost(capsys):
    result = one_task.run(
        "fidelity",
        tiny_model(num_layers=1, attention_alpha=1.5),
        kvjax.parse("entmaxkv:budget=8,page_size=4"),
        METHODS["full"],
        TEXT,
        context=64,
        n=2,
        new_tokens=8,
        batch=2,
    )
    (layer,) = result["layers"]
    assert 0 < layer["dropped"]["mean"] < 1
    assert 0 < layer["support"]["mean"] < 1
    names = {"task": "fidelity", "method": "m", "context": 64, "n": 2}
    table.print_task(names | result)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == [
        "0",
        f"{layer['error']['mean']:.4f}",
        f"{layer['dropped']['mean']:.2g}",
        f"{layer['support']['mean']:.0%}",
        f"{layer['exact']['mean']:.0%}",
        "0%",
    ]


def test_the_numbers_of_a_task_alone_are_the_comparisons(rows, inputs):
    result = one_task.run(
        "fidelity",
        MODEL,
        METHODS["streaming"],
        METHODS["full"],
        TEXT,
        context=352,
        n=3,
        new_tokens=16,
        batch=2,
    )
    assert result["kl"]["mean"] == pytest.approx(rows[2].kl.mean, rel=1e-6)
    assert result["nats_lost"]["mean"] == pytest.approx(rows[2].nats_lost.mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: compare_inputs.Settings(examples=-1),
            "examples=-1 must be at least 1",
        ),
        (
            lambda: compare_inputs.Settings(context=64, new_tokens=64),
            r"new_tokens=64 must be in \[2, context=64\)",
        ),
        (
            lambda: compare_inputs.check_context(MODEL, 5000),
            "context=5000 exceeds the 4096 tokens",
        ),
        (
            lambda: compare.compare(
                MODEL, {}, compare_inputs.Inputs([], [], [], []), SETTINGS
            ),
            "reference='full' is not among",
        ),
        (
            lambda: compare_inputs.make_inputs(
                MODEL,
                TEXT,
                compare_inputs.Settings(
                    context=352, new_tokens=4, examples=1, windows=1
                ),
            ),
            "new_tokens=4 cannot hold an answer of 5 tokens",
        ),
        (lambda: one_task.check_task("needle"), "unknown task='needle': choose one of"),
    ],
)
def test_errors_name_the_values_and_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
