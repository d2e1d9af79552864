"""What is no prompt, no token and no option: one error that names it, and all else."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL, TEXT, tiny_model

from kvjax import registry
from kvjax.decoding import endless, generate, saved_prompt, scoring
from kvjax.decoding.checks import token_rows
from kvjax.decoding.sampling import Sampling
from kvjax.evaluation import compare_inputs, one_task

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

MODEL = tiny_model(num_layers=1)
FULL = registry.parse("full")
RING = registry.parse("streaming_llm", **SMALL)
IDS = [104, 105, 32]


@pytest.mark.parametrize(
    "row",
    [
        IDS,
        tuple(IDS),
        [np.int64(i) for i in IDS],
        [np.array(i) for i in IDS],
        np.array(IDS),
        np.array(IDS, np.uint8),
        jnp.array(IDS),
        [jnp.int32(i) for i in IDS],
        iter(IDS),
        map(int, IDS),
    ],
)
def test_rows_of_integers_of_any_kind(row):
    (found,) = token_rows([row])
    assert found == IDS
    assert {type(token) for token in found} == {int}


def test_an_array_of_rows():
    assert token_rows(np.array([IDS, IDS])) == [IDS, IDS]
    assert token_rows(jnp.array([IDS])) == [IDS]
    assert token_rows([range(3), np.array([]), []]) == [[0, 1, 2], [], []]
    assert token_rows(["hi ", IDS], MODEL.tokenizer) == [IDS, IDS]


WRONG = [
    ([b"hi"], r"prompt 0 is b'hi', of type bytes, .*decode"),
    ([IDS, bytearray(b"hi")], "prompt 1 is bytearray.*decode"),
    ([[1.7, 2.2]], "prompt 0 holds 1.7 at place 0, which is no token id"),
    ([[1, 2.0]], "prompt 0 holds 2.0 at place 1"),
    ([[1, True]], "prompt 0 holds True at place 1"),
    ([[1, np.bool_(True)]], "prompt 0 holds .*True.* at place 1"),
    ([[1, None]], "prompt 0 holds None at place 1"),
    ([[1, "a"]], "prompt 0 holds 'a' at place 1"),
    ([[[1, 2]]], r"prompt 0 holds \[1, 2\] at place 0"),
    ([np.array([1.0, 2.0])], r"prompt 0 is an array of shape \(2,\) and dtype float64"),
    ([np.array([True])], "dtype bool, not one of integers"),
    ([np.array([[1, 2]])], r"an array of shape \(1, 2\) and dtype int64"),
    ([jnp.array([1.0])], "dtype float32, not one of integers"),
    ([1, 2, 3], "prompt 0 is 1, of type int, .*in a list of their own"),
    (np.array(IDS), "prompt 0 is .*104.*, of type int64"),
    (np.array(1), "prompts is .* not a list of prompts"),
    (b"hi", "prompts is b'hi', of type bytes.*decode"),
    (None, "prompts is None, of type NoneType, not a list of prompts"),
    ({"a": IDS}, "prompts is .*of type dict"),
    ([{1: 2}], "prompt 0 is .*of type dict"),
    ([{1, 2}], "prompt 0 is .*of type set"),
    ([None], "prompt 0 is None"),
]


@pytest.mark.parametrize(("prompts", "message"), WRONG)
def test_what_is_no_row_of_tokens(prompts, message):
    for run in (
        lambda: generate.generate(MODEL, FULL, prompts, max_new_tokens=3),
        lambda: generate.stream(MODEL, FULL, prompts),
        lambda: generate.prefill(MODEL, FULL, prompts, max_new_tokens=3),
        lambda: scoring.score(MODEL, FULL, prompts, prefill=1),
        lambda: saved_prompt.read(MODEL, FULL, prompts),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_texts_must_be_whole_and_where_tokens_are_asked_for_are_none():
    cut = "a\ud83d b"
    with pytest.raises(ValueError, match=r"prompt 1 has '\\ud83d' at character 1"):
        generate.generate(MODEL, FULL, ["fine", cut])
    with pytest.raises(ValueError, match=r"piece 1 of the text has '\\ud83d'"):
        list(endless.read(MODEL, RING, ["fine", cut]))
    with pytest.raises(ValueError, match="piece 0 of the text is b'fine'"):
        list(endless.read(MODEL, RING, [b"fine"]))
    with pytest.raises(ValueError, match="texts='fine' is one text"):
        endless.read(MODEL, RING, "fine")
    with pytest.raises(ValueError, match=r"prompt 0 is 'fine'.*tokenizer first"):
        scoring.score(MODEL, FULL, ["fine"], prefill=1)


OPTIONS = [
    ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be an integer"),
    ({"max_new_tokens": True}, "max_new_tokens=True must be an integer"),
    ({"max_new_tokens": "3"}, "max_new_tokens='3' must be an integer"),
    ({"max_new_tokens": None}, "max_new_tokens=None must be an integer"),
    ({"eos_ids": 1}, r"eos_ids=1 must be token ids, .* such as \(2,\)"),
    ({"eos_ids": "1"}, "eos_ids='1' must be token ids"),
    ({"eos_ids": [1.5]}, r"eos_ids=\[1.5\] must be token ids"),
    ({"eos_ids": [True]}, r"eos_ids=\[True\] must be token ids"),
    ({"eos_ids": [-1]}, r"eos_ids=\[-1\] must be token ids"),
    ({"stop": [5]}, r"stop=\[5\] must be a sequence of non-empty strings"),
    ({"stop": None}, "stop=None must be a sequence"),
    ({"stop": [b"x"]}, r"stop=\[b'x'\] must be a sequence"),
    ({"seed": 1.5}, "seed=1.5 must be an integer"),
    ({"seed": True}, "seed=True must be an integer"),
    ({"seed": None}, "seed=None must be an integer"),
    ({"stream_every": 1.5}, "stream_every=1.5 must be an integer"),
    ({"sampling": None}, "sampling=None must be a kvjax.decoding.sampling.Sampling"),
    ({"sampling": (1.0, 5)}, r"sampling=\(1.0, 5\) must be a"),
    ({"sampling": Sampling(top_k=None)}, "top_k=None must be a number; .* 0"),
    ({"sampling": Sampling(temperature="1")}, "temperature='1' must be a number"),
    ({"sampling": Sampling(top_p=True)}, "top_p=True must be a number"),
    ({"sampling": Sampling(top_k=float("nan"))}, "top_k=nan must be an integer"),
    ({"sampling": Sampling(top_k=float("inf"))}, "top_k=inf must be an integer"),
    ({"sampling": Sampling(min_p=[0.1])}, r"min_p=\[0.1\] must be a number"),
]


@pytest.fixture(scope="module")
def read():
    """Prompts read once: what is refused uses nothing of them up."""
    return saved_prompt.read(MODEL, FULL, [IDS], room=8)


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_what_is_no_option(options, message, read):
    filled = {"max_new_tokens": 3} | options
    prefilled = generate.Prefilled(read.states, read.hidden, jnp.array([IDS[-1:]]))
    runs = [
        lambda: generate.generate(MODEL, FULL, [IDS], **filled),
        lambda: generate.stream(MODEL, FULL, [IDS], **filled),
        lambda: generate.continued(MODEL, FULL, prefilled, **filled),
    ]
    if options != {"max_new_tokens": None}:  # here all that there is room for
        runs.append(lambda: saved_prompt.stream(MODEL, FULL, read, **filled))
    for run in runs:
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: generate.generate(MODEL, FULL, [IDS], chunk_size=2.0),
            "chunk_size=2.0",
        ),
        (lambda: generate.generate(MODEL, FULL, [IDS], on_text=3), "on_text=3 must be"),
        (lambda: generate.generate("smollm2", FULL, [IDS]), "model='smollm2' must be"),
        (lambda: scoring.score(None, FULL, [IDS], prefill=1), "model=None must be"),
        (lambda: saved_prompt.read("x", FULL, [IDS]), "model='x' must be"),
        (lambda: endless.read("x", RING, [TEXT]), "model='x' must be"),
        (lambda: scoring.score(MODEL, FULL, [IDS], prefill=1.0), "prefill=1.0"),
        (lambda: scoring.score(MODEL, FULL, [IDS], prefill=True), "prefill=True"),
        (lambda: saved_prompt.read(MODEL, FULL, [IDS], room=2.5), "room=2.5 must be"),
        (lambda: endless.read(MODEL, RING, [TEXT], chunk_size=8.0), "chunk_size=8.0"),
        (lambda: compare_inputs.Settings(context=512.0), "context=512.0 must be"),
        (lambda: compare_inputs.Settings(seed=-1), "seed=-1 must be"),
        (lambda: one_task.run("passkey", MODEL, FULL, FULL, TEXT, n=2.5), "n=2.5 must"),
        (lambda: one_task.run("passkey", "x", FULL, FULL, TEXT), "model='x' must be"),
    ],
)
def test_other_arguments(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_integers_of_numpy_are_integers():
    options = {"max_new_tokens": np.int64(3), "stream_every": np.int16(2)}
    options |= {
        "seed": np.uint32(7),
        "eos_ids": np.array([1]),
        "chunk_size": np.int8(2),
    }
    sampling = Sampling(np.float32(0.5), np.int64(3))
    found = generate.generate(MODEL, FULL, [IDS], sampling=sampling, **options)
    plain = {"max_new_tokens": 3, "stream_every": 2, "seed": 7, "eos_ids": (1,)}
    same = generate.generate(
        MODEL, FULL, [IDS], sampling=Sampling(0.5, 3), chunk_size=2, **plain
    )
    assert found == same
    assert type(compare_inputs.Settings(context=np.int64(256)).context) is int
    assert type(saved_prompt.read(MODEL, FULL, [IDS], room=np.int64(2)).room) is int


@pytest.mark.parametrize("last", [2**31 - 4, 2**31 - 1])
def test_a_stream_ends_with_the_positions(last):
    """Nothing is used up: it may go on to the very last."""
    done = endless.Progress(last, 1, 1, 0.0)
    text = endless.Read((), None, [1], None, done)
    with pytest.raises(ValueError, match="more than 2147483647 tokens"):
        endless.extend(MODEL, RING, text, max_new_tokens=2**31 - last)
