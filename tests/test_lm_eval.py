"""The harness's requests: likelihoods are those of `score`, texts those of `generate`.

The package lm_eval is heavy: here a stand-in of its base class is enough. The last test
runs it where it is installed, in a process of its own.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from tiny import EOS, SMALL, byte_tokenizer, tiny_model

from kvjax import registry
from kvjax.decoding import reader
from kvjax.decoding.generate import generate
from kvjax.decoding.sampling import Sampling
from kvjax.decoding.scoring import score
from kvjax.lm_eval import requests
from kvjax.lm_eval.requests import Pair, Wanted

MODEL = tiny_model(num_layers=1, deviation=0.3)
RNG = np.random.default_rng(3)


def drawn(size):
    return tuple(RNG.integers(0, 256, size).tolist())


# Of lengths whose states have one shape, here and in what they are compared with.
LONG, OTHER, SHORT = drawn(64), drawn(64), drawn(50)
LOSSY = registry.parse("snapkv", **SMALL)
PAIRS = [
    Pair(LONG, drawn(16)),
    Pair(SHORT, drawn(4)),
    Pair(LONG, drawn(1)),
    Pair(OTHER, drawn(16)),
    Pair(LONG, ()),
    Pair(SHORT, drawn(16)),
    Pair(LONG, drawn(5)),
]


def scored(method, pairs):
    """By `score`: sums over the continuations, and if each is the likeliest."""
    found = [(0.0, True)] * len(pairs)
    for size in {len(context) for context, _ in pairs}:
        asked = [i for i, (c, text) in enumerate(pairs) if len(c) == size and text]
        rows = [[*pairs[i].context, *pairs[i].continuation] for i in asked]
        rows += rows[:1] * (len(rows) % 2)
        for start in range(0, len(rows), 2):
            two = sorted(rows, key=len, reverse=True)[start : start + 2]
            two[0] = two[0] + [0] * (size + 16 - len(two[0]))
            scores = score(
                MODEL, method, two, prefill=size, chunk_size=16, return_logits=True
            )
            for row, line in enumerate(two):
                for i in asked:
                    own = [*pairs[i].context, *pairs[i].continuation]
                    if line[: len(own)] != own:
                        continue
                    end = len(own) - size
                    chosen = scores.logits[row, :end].argmax(-1).tolist()
                    log_probs = scores.log_probs[row, size - 1 : size - 1 + end]
                    greedy = chosen == own[size:]
                    found[i] = log_probs.sum(dtype=float), greedy
    return found


@pytest.mark.parametrize("name", ["snapkv", "streaming_llm"])
def test_likelihoods_are_those_of_score(name):
    method = registry.parse(name, **SMALL)
    likely, _ = generate(
        MODEL, method, [OTHER, LONG], max_new_tokens=16, eos_ids=(), chunk_size=16
    )
    pairs = [*PAIRS, Pair(OTHER, tuple(likely.tokens))]
    found = requests.likelihoods(MODEL, method, pairs, batch=2, chunk_size=16)
    assert found[4] == (0.0, True)
    expected = scored(method, pairs)
    for place, (log_prob, greedy) in enumerate(expected):
        assert found[place].log_prob == pytest.approx(log_prob, abs=1e-4), place
        assert found[place].is_greedy == greedy, place
    assert found[-1].is_greedy
    assert not found[0].is_greedy
    # What tells decode steps from a prompt: another method says something else.
    whole = requests.likelihoods(MODEL, "full", pairs[:2], batch=2, chunk_size=16)
    assert abs(whole[0].log_prob - found[0].log_prob) > 1e-3


def test_a_context_is_read_once(monkeypatch):
    read, seen = reader.read_whole, []

    def counting(model, method, prompts, options):
        seen.append([len(prompt) for prompt in prompts])
        return read(model, method, prompts, options)

    monkeypatch.setattr(reader, "read_whole", counting)
    done = []
    requests.likelihoods(
        MODEL, LOSSY, PAIRS, batch=2, chunk_size=16, progress=done.append
    )
    assert seen == [[64, 64], [50, 50]]  # the last batch is filled up
    assert done == [2 / 3, 1.0]


def test_lengths_share_programs():
    sizes = {requests.rounded_up(size) for size in range(1, 4097)}
    assert len(sizes) == 16
    for size in range(1, 5000):
        assert size <= requests.rounded_up(size) <= max(16, 1.5 * size + 16)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9, 10, 31])
@pytest.mark.parametrize("most", [1, 4, 9])
def test_windows_predict_every_token_once(count, most):
    text = list(range(100, 100 + count))
    pairs = requests.windows(text, 7, most)
    assert [token for pair in pairs for token in pair.continuation] == text
    for index, (context, continuation) in enumerate(pairs):
        fed = len(context) + len(continuation) - 1
        assert fed <= most
        assert fed == most or count < most
        known = [7, *text]
        place = known.index(continuation[0])
        assert known[place - len(context) : place] == list(context)
        if index < len(pairs) - 1:
            assert len(context) == 1


def test_a_context_keeps_its_newest_tokens():
    assert requests.newest(range(9), 2, 8) == (3, 4, 5, 6, 7, 8)
    assert requests.newest(range(3), 2, 8) == (0, 1, 2)
    with pytest.raises(
        ValueError, match=r"8 tokens behind a context .* room for it in"
    ):
        requests.newest(range(3), 8, 8)


def test_texts_are_those_of_generate():
    sampled = Sampling(temperature=1.0)
    wanted = [Wanted(context, 16) for context in (SHORT, LONG, OTHER, SHORT)]
    alone = generate(
        MODEL, LOSSY, [LONG, OTHER], max_new_tokens=16, chunk_size=16
    ) + generate(MODEL, LOSSY, [LONG, SHORT], max_new_tokens=16, chunk_size=16)
    long, other, _, short = (row.text for row in alone)
    stop = long[2:4]
    wanted += [Wanted(LONG, 16, sampling=sampled)] * 2
    wanted += [Wanted(context, 16, (stop,)) for context in (LONG, OTHER)]
    done = []
    options = {"batch": 2, "chunk_size": 16}
    texts = requests.continuations(
        MODEL, LOSSY, wanted, progress=done.append, **options
    )
    assert texts[:4] == [short, long, other, short]
    assert texts[6] == long[: long.index(stop)]
    assert texts[4] != texts[5]  # samples of their own
    assert done == sorted(done)
    assert done[-1] == 1.0
    again = requests.continuations(MODEL, LOSSY, wanted[4:6], **options)
    assert again == requests.continuations(MODEL, LOSSY, wanted[4:6], **options)
    assert again != requests.continuations(MODEL, LOSSY, wanted[4:6], seed=1, **options)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair((), (1,)), "request 1 has no context"),
        (Pair((1, 2), (260,)), "row 1 holds token id 260"),
        (Pair((1,) * 4090, (1,) * 8), "request 1 takes 4097 tokens, a context of 4090"),
    ],
)
def test_requests_that_cannot_be_answered(pair, message):
    with pytest.raises(ValueError, match=message):
        requests.likelihoods(MODEL, "full", [PAIRS[0], pair])
    wanted = Wanted(pair.context + pair.continuation[7:], 8)
    if pair.continuation != (260,):
        with pytest.raises(ValueError, match=r"request 0 (has no|takes 4099)"):
            requests.continuations(MODEL, "full", [wanted])


# --- the model of the harness


class Base:
    """A stand-in of the harness's own."""


@pytest.fixture
def adapter(monkeypatch):
    """The module of `KvjaxLM`, over a stand-in of the package."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].TemplateLM = Base
    monkeypatch.delitem(sys.modules, "kvjax.lm_eval.model", raising=False)
    yield importlib.import_module("kvjax.lm_eval.model")
    sys.modules.pop("kvjax.lm_eval.model", None)


class Request:
    def __init__(self, *args):
        self.args = args


CHAT = MODEL._replace(tokenizer=byte_tokenizer(), name="some/model")


def test_the_model_answers_in_the_order_of_requests(adapter):
    model = adapter.KvjaxLM(MODEL, LOSSY, batch_size=2, chunk_size=16)
    texts = [("one two ", "three"), ("one two", " four"), ("", "five")]
    found = model.loglikelihood([Request(*pair) for pair in texts])
    pairs = [(b"one two", b" three"), (b"one two", b" four"), ((EOS,), b"five")]
    pairs = [Pair(tuple(context), tuple(text)) for context, text in pairs]
    options = {"batch": 2, "chunk_size": 16}
    assert found == requests.likelihoods(MODEL, LOSSY, pairs, **options)
    asked = Request("one two", {"max_gen_toks": 16}), Request("one", {})
    model.max_gen_toks = 16
    assert model.generate_until(asked) == requests.continuations(
        MODEL,
        LOSSY,
        [Wanted(tuple(b"one two"), 16), Wanted(tuple(b"one"), 16)],
        **options,
    )
    rolled, none = model.loglikelihood_rolling([Request("five"), Request("")])
    assert rolled == pytest.approx(found[2][0], abs=1e-5)
    assert none == 0
    assert model.num_cut == 0
    assert "snapkv" in model.get_model_info()["method"]


def test_a_long_context_loses_its_oldest_tokens(adapter):
    model = adapter.KvjaxLM(
        MODEL, LOSSY, max_length=16, batch_size=2, chunk_size=16, max_gen_toks=4
    )
    text = "abcdefghijklmnopqrstuv"
    long, short = model.loglikelihood(
        [Request(text, "wxyz"), Request(text[9:], "wxyz")]
    )
    assert long == short
    assert model.num_cut == 1
    assert model.generate_until([Request(text, {}), Request("abc", {})]) == (
        model.generate_until([Request(text[10:], {}), Request("abc", {})])
    )
    assert model.num_cut == 2
    # A text of more than a window is cut into several: each token counts once.
    (rolled,) = model.loglikelihood_rolling([Request(text)])
    pairs = requests.windows(list(text.encode()), EOS, 16)
    assert len(pairs) == 2
    expected = requests.likelihoods(MODEL, LOSSY, pairs, batch=2, chunk_size=16)
    assert rolled == pytest.approx(sum(x for x, _ in expected), abs=1e-4)


def test_tokens_begin_a_text_once(adapter):
    class Begins:
        encode = staticmethod(lambda text: [1, *text.replace("~", "\x01").encode()])
        decode = staticmethod(lambda tokens: bytes(tokens).decode())

    model = adapter.KvjaxLM(MODEL._replace(tokenizer=Begins()))
    assert model.tok_encode("ab") == [1, 97, 98]
    assert model.tok_encode("~ab") == [1, 97, 98]  # a template wrote BOS itself
    assert model.tok_encode("ab", add_special_tokens=False) == [97, 98]
    assert model.prefix_token_id == 1
    assert model._encode_pair("ab ", "c") == ([1, 97, 98], [32, 99])
    assert model._encode_pair("", "c") == ([1], [99])
    with pytest.raises(ValueError, match="no token that ends a text"):
        _ = adapter.KvjaxLM(MODEL._replace(eos_ids=())).prefix_token_id


def test_a_chat_has_the_models_template(adapter):
    model = adapter.KvjaxLM(CHAT)
    assert model.chat_template(False) is None
    assert "message" in model.chat_template(True)
    text = model.apply_chat_template([{"role": "user", "content": "hello"}])
    assert text == "<user>hello"
    assert model.tokenizer_name == "some__model"
    with pytest.raises(ValueError, match="no chat template 'tools', only default"):
        model.chat_template("tools")
    with pytest.raises(ValueError, match="no chat template 'default', only none"):
        adapter.KvjaxLM(MODEL).chat_template(True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (64, (), Sampling())),
        ({"until": "\n", "max_gen_toks": 3}, (3, ("\n",), Sampling())),
        ({"until": ["a", ""], "do_sample": False}, (64, ("a",), Sampling())),
        ({"temperature": 0.7}, (64, (), Sampling(temperature=0.7))),
        ({"temperature": 0.7, "do_sample": False}, (64, (), Sampling())),
        ({"do_sample": True, "top_k": 5}, (64, (), Sampling(1.0, top_k=5))),
        ({"temperature": 0.0, "top_p": None, "num_beams": 1}, (64, (), Sampling())),
    ],
)
def test_options_of_a_reply(adapter, given, expected):
    assert adapter.generation_options(given, 64) == expected


def test_options_that_are_not_offered(adapter):
    with pytest.raises(ValueError, match="generate with num_beams=4, which kvjax"):
        adapter.generation_options({"num_beams": 4}, 64)
    with pytest.raises(ValueError, match="max_length=5000 exceeds the model's context"):
        adapter.KvjaxLM(MODEL, max_length=5000)


def test_without_the_package_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "kvjax.lm_eval.model", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'kvjax\[lm-eval\]'"):
        _ = importlib.import_module("kvjax.lm_eval").KvjaxLM


# --- the harness itself

SPEC = "snapkv:budget=24,window=8"
CHOICES = """\
task: kvjax_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}} The answer is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXTS = """\
task: kvjax_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}} The answer is"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLED = """\
task: kvjax_rolled
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte}]
"""
# Every answer of the model that the harness made an example of, beside our own score.
COMPARED = """
import json, sys
import kvjax
from kvjax.lm_eval import KvjaxLM
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
model = kvjax.load("embedded-softmax")
lm = KvjaxLM(model, sys.argv[2], batch_size=3)
found = simple_evaluate(
    model=lm, tasks=["kvjax_choices"], log_samples=True, bootstrap_iters=0,
    task_manager=TaskManager(include_path=sys.argv[1]),
)
pairs = []
for sample in found["samples"]["kvjax_choices"]:
    for arguments, answer in zip(sample["arguments"], sample["resps"], strict=True):
        (context, text), ((ours, _),) = arguments, answer
        before = model.tokenizer.encode(context)
        whole = model.tokenizer.encode(context + text)
        assert whole[: len(before)] == before
        scores = kvjax.score(model, lm.method, [whole], prefill=len(before))
        pairs.append([float(ours), float(scores.log_probs[0, len(before) - 1 :].sum())])
print(json.dumps(pairs))
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip(
            "NO lm_eval: the harness itself did NOT run; pip install 'kvjax[lm-eval]'"
        )
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {
            "text": f"{word} = {number}\n" * 12 + f"What is {word}?",
            "choices": [f" {number}", " nothing", f" {word} and {word}"],
            "answer": 0,
        }
        for word, number in [("apple", 7), ("river", 12), ("stone", 30)]
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / "choices.jsonl").write_text(text, "utf-8")
    for name, task in [("choices", CHOICES), ("texts", TEXTS), ("rolled", ROLLED)]:
        task = task.replace("FOLDER", str(folder))
        (folder / f"{name}.yaml").write_text(task, "utf-8")
    return folder


def offline(folder):
    settings = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | settings | {"HF_HOME": str(folder / "cache")}


def test_the_harness_has_the_log_probabilities_of_score(tasks):
    done = subprocess.run(
        [sys.executable, "-c", COMPARED, tasks, SPEC],
        env=offline(tasks),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pairs = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert pairs.shape == (9, 2)
    np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], atol=1e-4)


def test_the_command_runs_every_kind_of_task(tasks, tmp_path):
    names = "kvjax_choices,kvjax_texts,kvjax_rolled"
    out = tmp_path / "results.json"
    options = ["--tasks", names, "--include-path", tasks, "--method", SPEC]
    options += ["--limit", "2", "--output", out]
    done = subprocess.run(
        [sys.executable, "-m", "kvjax", "lm-eval", *options],
        env=offline(tasks),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text("utf-8"))
    assert document["method"] == SPEC
    assert document["n-samples"]["kvjax_choices"]["effective"] == 2
    assert set(document["results"]) == set(names.split(","))
    assert document["results"]["kvjax_rolled"]["bits_per_byte,none"] > 0
    for name in names.split(","):
        assert name in done.stdout
