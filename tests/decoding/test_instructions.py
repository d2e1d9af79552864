"""Instructions: how many tokens, in which order read, and who is told of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_only import Decoder, NoText, draw_weights
from tiny import tiny_model

import kvjax
from kvjax import accounting, interface, registry
from kvjax.attention.typed import typed
from kvjax.decoding import asking, ending, endless, instructions, reader, saved_prompt
from kvjax.evaluation import asked_after, compare_runs, one_task, together
from kvjax.evaluation.tasks import haystack
from kvjax.interface import Hooks, LanguageModel, Method
from kvjax.rope import Rope

MODEL = tiny_model(num_layers=1, context=64)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (5, 31, 22)]
METHOD = kvjax.citrus(budget=12, stride=4, instruction=3)
ASKED = METHOD.hooks.asked
NEW = 3


@functools.cache
def answers(instruction=None):
    made = kvjax.generate(
        MODEL, METHOD, PROMPTS, max_new_tokens=NEW, instruction=instruction
    )
    return [one.tokens for one in made]


# --- how many tokens


def test_counts_are_given_or_the_methods():
    count = functools.partial(instructions.counts, METHOD, PROMPTS)
    assert count(None) == [3, 3, 3]
    assert count(4) == [4, 4, 4]
    assert count([1, 4, 2]) == [1, 4, 2]
    assert instructions.counts(METHOD, [[1, 2], [3]], None) == [2, 1]
    assert instructions.counts(registry.parse("full"), PROMPTS, None) == [0, 0, 0]
    starts = [2, 30, 22]  # three tokens, one, and none: then it is the last
    assert instructions.of_questions(ASKED, PROMPTS, starts) == (3, 1, 1)
    assert instructions.of_questions(ASKED, PROMPTS, [0, 0, 20]) == (4, 4, 2)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("method", "instruction", "message"),
    [
        (METHOD, 0, "instruction=0 must be a number of tokens at a prompt's end"),
        (METHOD, [1, 2, -1], "instruction=-1 must be a number"),
        (METHOD, True, "instruction=True must be a number"),
        (METHOD, "Why?", "instruction='Why.' must be a number"),
        (METHOD, 2.5, "instruction=2.5 must be a number"),
        (METHOD, [1, 2], "instruction has 2 numbers for 3 prompts: give one for each"),
        (METHOD, 5, "instruction=5 of prompt 0 exceeds stride=4: .* raise stride"),
        (METHOD, [6, 1, 1], "instruction=6 exceeds the 5 tokens of prompt 0"),
        ("quest", 2, "instruction=2 is given to .*quest.*: only methods .*: citrus"),
    ],
)
def test_a_wrong_instruction_is_refused_before_any_work(method, instruction, message):
    for call in (kvjax.generate, kvjax.stream, reader.prefill):
        with pytest.raises(ValueError, match=message):
            call(MODEL, method, PROMPTS, max_new_tokens=2, instruction=instruction)


# --- the order of acts


def told(part):
    """Tokens of each row in an act."""
    tokens, lengths = part
    pairs = zip(tokens.tolist(), lengths, strict=True)
    return [row[:length] for row, length in pairs]


def test_acts_are_in_the_official_order():
    """A probe before every chunk but the first, whatever pieces it is read in; the
    last chunk is closed before the last probe.
    """
    prompts = [list(range(9)), list(range(20, 23)), [50]]
    ends = [[8], [21, 22], [50]]
    found = list(instructions.acts(ASKED, prompts, [1, 2, 1], 3))
    names = [act for act, _ in found]
    two = ["read", "read"]
    assert names == [*two, "probe", *two, "close", "probe", "settle", "read"]
    reads = [told(part) for act, part in found[:-1] if act == "read"]
    assert reads == [
        [[0, 1, 2], [20], []],
        [[3], [], []],
        [[4, 5, 6], [], []],
        [[7], [], []],
    ]
    shown = [told(part) for act, part in found if act == "probe"]
    assert shown == [ends, ends]
    assert told(found[-1][1]) == ends
    once = ASKED._replace(votes_once=True)
    names = [act for act, _ in instructions.acts(once, prompts, [1, 2, 1], 5)]
    assert names == ["read", "read", "close", "probe", "settle", "read"]
    only = [act for act, _ in instructions.acts(ASKED, [[1], [2, 3]], [1, 2], 5)]
    assert only == ["close", "probe", "settle", "read"]


# --- who is told


def test_a_count_changes_what_is_kept_and_none_is_the_methods():
    """Rows are told apart: a row's answer does not depend on the others' counts."""
    assert answers((3, 3, 3)) == answers()
    other = answers((3, 1, 3))
    assert (other[0], other[2]) == (answers()[0], answers()[2])
    read = [
        reader.prefill(MODEL, METHOD, PROMPTS, max_new_tokens=NEW, instruction=count)
        for count in (3, (3, 1, 3))
    ]
    held = [np.asarray(x.states[0].positions) for x in read]
    np.testing.assert_array_equal(held[0][[0, 2]], held[1][[0, 2]])
    assert (held[0][1] != held[1][1]).any()


class Example(haystack.Asked):
    """An example whose answers are not judged."""

    def score(self, generated):
        return float(generated == self.answer)


def example(prompt, told):
    return Example("", prompt, "xy", 2, len(prompt) - told)


def test_tasks_say_where_their_question_begins(monkeypatch):
    """`seen`: of a long question the end; `after`: nobody is told, and all is plain."""
    noted, really = [], reader.instructions.counts

    def counts(method, prompts, instruction):
        noted.append(instruction)
        return really(method, prompts, instruction)

    monkeypatch.setattr(reader.instructions, "counts", counts)
    sizes = {"new_tokens": NEW, "batch": 3}
    examples = [example(p, n) for p, n in zip(PROMPTS, (2, 9, 3), strict=True)]
    (seen,) = compare_runs.retrieve(MODEL, [METHOD], examples, **sizes)
    assert noted == [(2, 4, 3)]
    by_hand = kvjax.generate(
        MODEL, METHOD, PROMPTS, max_new_tokens=NEW, instruction=(2, 4, 3), eos_ids=()
    )
    assert [x.text for x in by_hand] == seen.answers
    noted.clear()
    (after,) = asked_after.answers(MODEL, [METHOD], examples, **sizes)
    assert not noted
    contexts = [x.prompt[: x.asked_at] for x in examples]
    plain = METHOD._replace(hooks=Hooks())
    ended = reader.prefill(MODEL, plain, contexts, max_new_tokens=9 + NEW, longest=29)
    questions = [x.prompt[x.asked_at :] for x in examples]
    said = asking.ask(MODEL, METHOD, ended, questions, max_new_tokens=NEW, eos_ids=())
    assert [one.text for one in said] == after
    noted.clear()
    read = together.read(MODEL, [METHOD], PROMPTS, max_new_tokens=NEW)
    assert not noted, "windows of text ask nothing"
    found, alone = read.take(0), reader.prefill(MODEL, plain, PROMPTS, max_new_tokens=3)
    np.testing.assert_array_equal(found.states[0].positions, alone.states[0].positions)


def test_what_is_compiled_ahead_is_what_is_timed():
    """Of a prompt with an instruction, all programs."""
    prompt = PROMPTS[1]
    compare_runs.compile_reading(MODEL, METHOD, prompt, new_tokens=NEW)
    programs = (reader._layer, ending._finish, reader._init)
    sizes = [program._cache_size() for program in programs]
    compare_runs.seconds_to_read(MODEL, METHOD, prompt, new_tokens=NEW)
    assert [program._cache_size() for program in programs] == sizes


def ended(events):
    """The last thing that a generator yields, and what it returns."""
    last = None
    while True:
        try:
            last = next(events)
        except StopIteration as end:
            return last, end.value


def test_a_text_without_end_and_a_prefix_are_read_plainly():
    """Beyond the context, in the same memory, up to the room that was asked for."""
    text = "".join(f"{i * 7919 % 1000} is a number.\n" for i in range(20))
    assert len(text) > 4 * MODEL.decoder.context
    progress, read = ended(
        endless.read(MODEL, METHOD, endless.pieces([text.encode()]), room=8)
    )
    assert progress.tokens == len(text)
    assert np.isfinite(progress.nats)
    (state,) = read.states
    assert not state.probed.any()
    events = endless.extend(MODEL, METHOD, read, max_new_tokens=8)
    _, (answer,) = ended(events)
    assert len(answer.tokens) == 8
    message = r"room=49 that is 65, which exceeds .* of 64"
    with pytest.raises(ValueError, match=message):
        ended(endless.read(MODEL, METHOD, [text], room=49))
    prefix = saved_prompt.read(MODEL, METHOD, [text[:40]], room=8)
    prefix = saved_prompt.extend(MODEL, METHOD, prefix, ["Why?"])
    near = prefix._replace(room=49)
    with pytest.raises(ValueError, match=message):
        saved_prompt.extend(MODEL, METHOD, near, [text[:40]])
    whole = saved_prompt.read(MODEL, METHOD, [text[:40] + "Why?"], room=8)
    for a, b in zip(
        jax.tree.leaves(prefix.states), jax.tree.leaves(whole.states), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_eval_takes_more_than_the_context_where_the_method_does():
    """Windows of a text ask nothing: they are read plainly."""
    text = "".join(f"{i * 7919 % 1000} is a number.\n" for i in range(30))
    full = registry.parse("full")
    sizes = {"context": 200, "n": 1, "new_tokens": 4, "batch": 1}
    found = one_task.run("perplexity", MODEL, METHOD, full, text, **sizes)
    assert found["tokens_per_window"] == 3
    assert found["perplexity"]["mean"] > 1
    message = "context=200 exceeds the 64 tokens the model was made for"
    for task, method in (("fidelity", METHOD), ("perplexity", full)):
        with pytest.raises(ValueError, match=message):
            one_task.run(task, MODEL, method, full, text, **sizes)


# --- beyond the model's context


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A rotation that knows the highest position it was asked for."""

    inner: Rope
    most: int

    static_until = float("inf")

    def __call__(self, x, positions, length=None):
        turned = self.inner(x, positions, length)
        beyond = (positions >= self.most)[:, None, :, None]
        return jnp.where(beyond, jnp.nan, turned)


@dataclasses.dataclass(frozen=True)
class Short(Decoder):
    """One layer, a short context, and NaN for what is beyond it."""

    num_layers: int = 1
    context: int = 24

    @property
    def rope(self):
        return Bounded(Rope(6), self.context)


SHORT = LanguageModel(Short(), draw_weights(Short()), NoText(), (), "short")


def test_a_text_longer_than_the_context_is_read():
    """Eight times as long: no position reaches the context, and memory is constant."""
    method = kvjax.citrus(budget=14, stride=4, instruction=4)
    decoder = SHORT.decoder
    assert accounting.reads_any_length(method, decoder)
    assert not accounting.is_endless(method, decoder)
    prompt = np.random.default_rng(0).integers(0, 40, 8 * decoder.context).tolist()
    (answer,) = kvjax.generate(SHORT, method, [prompt], max_new_tokens=6)
    assert len(answer.tokens) == 6
    for tokens in (64, 4096):
        spec = interface.layer_specs(decoder, 1, tokens, 6)[0]
        assert accounting.prompt_bytes(method, spec) == 1849
        assert accounting.state_bytes(method, spec) == 2008
    message = r"takes 18 positions for a long text; with max_new_tokens=7 that is 25, "
    with pytest.raises(ValueError, match=message + r"which exceeds .* of 24: lower"):
        kvjax.generate(SHORT, method, [prompt], max_new_tokens=7)
    with pytest.raises(ValueError, match="tokens behind the prompt=7 that is 25"):
        kvjax.score(SHORT, method, [prompt], prefill=len(prompt) - 7)
    # Where positions are absolute, constant bytes are not enough.
    absolute = method._replace(renumbers=False)
    with pytest.raises(ValueError, match=r"exceeds the model's context of 24: short"):
        kvjax.generate(SHORT, absolute, [prompt], max_new_tokens=6)
    # A prompt that fits has no higher places than tokens.
    kvjax.generate(SHORT, method, [prompt[:16]], max_new_tokens=8)


# --- transforms


def test_dense_layers_under_dynamic_rope_read_no_prompt_in_parts():
    """All keys rotate at once there, and the question comes between two parts."""
    rope = Rope(8, kind="dynamic", factor=2.0, original_context=16)
    model = tiny_model(num_layers=1, rope=rope)
    method = kvjax.dense_layers(METHOD, registry.parse("full"), first=1)
    kvjax.generate(model, method, [PROMPTS[0][:12]], max_new_tokens=2)
    with pytest.raises(ValueError, match="17 tokens and rotates all keys at once from"):
        kvjax.generate(model, method, [[5] * 17], max_new_tokens=2)


def test_dense_layers_tell_the_method_and_keep_nothing_of_it():
    """The dense layer holds every token once; the others are cut."""
    model = tiny_model(num_layers=2)
    method = kvjax.dense_layers(METHOD, registry.parse("full"), first=1)
    sizes = {"max_new_tokens": NEW, "instruction": (2, 4, 3)}
    found = reader.prefill(model, method, PROMPTS, **sizes)
    full = reader.prefill(model, "full", PROMPTS, max_new_tokens=NEW)
    dense, sparse = (layer.state for layer in found.states)
    np.testing.assert_array_equal(dense.length, [5, 31, 22])
    for row, prompt in enumerate(PROMPTS):
        held = slice(0, len(prompt))
        for name in "kv":
            a, b = (getattr(x, name)[row, :, held] for x in (dense, full.states[0]))
            np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(sparse.used, [3 + 2, 8 + 4, 8 + 3])
    assert not accounting.reads_any_length(method, model.decoder)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_transform_that_would_drop_the_question_is_refused():
    @typed
    def dropping(method: Method) -> Method:
        return method._replace(hooks=Hooks())

    message = "dropping cannot wrap .*, which is told where a prompt's question begins"
    with pytest.raises(ValueError, match=message):
        dropping(METHOD)
    with pytest.raises(ValueError, match="quantize could store in fewer bits"):
        registry.parse("quantize+citrus").init(MODEL.decoder.cache_spec(1, 64))
