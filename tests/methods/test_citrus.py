"""CItruS: the order of the official code, in float64, and each step of it alone."""

import functools
import types

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles.citrus as oracle
import pytest
from attention_only import Decoder, NoText, draw_weights

import kvjax
from kvjax.decoding import reader
from kvjax.interface import LanguageModel
from kvjax.methods.citrus import citrus
from kvjax.rope import Rope
from kvjax.stores.places import Settled

STRIDE = 4
VARIANTS = ("shared", "individual", "chunk")


@functools.cache
def method_of(variant, kept=5):
    """One object for all tests: they share its programs."""
    return citrus(budget=kept + STRIDE, stride=STRIDE, variant=variant)


# --- a model of three layers, which its oracle has in float64


DECODER = Decoder()
PARAMS = draw_weights(DECODER)
MODEL = LanguageModel(DECODER, PARAMS, NoText(), (), "plain")
WIDE = [
    oracle.Layer(**{name: own[name].astype(np.float64) for name in "qkvo"})
    for own in PARAMS["layers"]
]
CONTEXTS = (0, 3, 4, 5, 8, 9, 12, 13, 23, 31)
TOLD = (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)


def draw_prompts():
    rng = np.random.default_rng(1)
    sizes = zip(CONTEXTS, TOLD, strict=True)
    return [rng.integers(0, DECODER.vocab_size, a + b).tolist() for a, b in sizes]


PROMPTS = draw_prompts()


@functools.cache
def read(method, chunk_size=512):
    sizes = {"max_new_tokens": 3, "chunk_size": chunk_size, "instruction": TOLD}
    return reader.prefill(MODEL, method, PROMPTS, **sizes)


def expected(row, kept, variant):
    x = PARAMS["embedding"].astype(np.float64)[np.array(PROMPTS[row])]
    context, instruction = x[: CONTEXTS[row]], x[CONTEXTS[row] :]
    return oracle.citrus(
        WIDE, context, instruction, kept=kept, stride=STRIDE, variant=variant
    )


def kept_positions(state, row):
    positions = np.asarray(state.positions[row, 0])
    return positions[: int(state.used[row])].tolist()


# A cut to one token, below a chunk, just above one and two of them, and none.
@pytest.mark.parametrize(
    ("variant", "kept"),
    [
        *(("shared", kept) for kept in (1, 5, 9, 40)),
        ("individual", 5),
        ("chunk", 3),
    ],
)
def test_equals_the_official_order(variant, kept):
    """Rows of any context and instruction, in one batch: each as if it were alone.

    What every layer keeps, and the outputs, which depend on it all.
    """
    found = read(method_of(variant, kept))
    differ = 0
    for row, prompt in enumerate(PROMPTS):
        _, out, caches = expected(row, kept, variant)
        listed = [kept_positions(state, row) for state in found.states]
        assert listed == [cache.positions for cache in caches], row
        drive.assert_rows_close(found.hidden[row], out[-1], what=f"row {row}")
        context = len(prompt) - TOLD[row]
        assert [len(own) - TOLD[row] for own in listed] == [min(kept, context)] * 3
        differ += listed[0] != listed[1]
    assert bool(differ) == (kept < 31), "layers choose on their own"


def test_is_full_attention_while_nothing_is_cut():
    """In every layer, by what the model gives in the end."""
    full = reader.prefill(MODEL, "full", PROMPTS, max_new_tokens=3)
    found = read(method_of("shared", 40))
    np.testing.assert_allclose(found.hidden, full.hidden, rtol=1e-5, atol=1e-5)
    less = read(method_of("shared"))
    assert np.abs(less.hidden[-1] - full.hidden[-1]).max() > 1e-2


def test_a_context_is_read_in_any_pieces():
    """Chunks of the caller's, and chunks of the method's, have nothing to do with each
    other: one token at a time, and three.
    """
    method = method_of("shared")
    whole, pieces = read(method), read(method, 3)
    for a, b in zip(whole.states, pieces.states, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
    np.testing.assert_allclose(whole.hidden, pieces.hidden, rtol=1e-5, atol=1e-5)


def test_what_is_scored_is_the_context_behind_what_was_kept():
    """`score` tells the prompt's end, and predicts all of it by what is still there."""
    row = CONTEXTS.index(31)
    method = citrus(budget=9, stride=STRIDE, instruction=2)
    prompt = PROMPTS[row]
    tokens = [*prompt, 7]
    scores = kvjax.score(MODEL, method, [tokens], prefill=len(prompt))
    context, out, _ = expected(row, 5, "shared")
    hidden = np.concatenate([context, out])
    logits = hidden @ PARAMS["embedding"].astype(np.float64).T
    top = logits.max(-1)
    logsum = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    wanted = logits[np.arange(len(prompt)), tokens[1:]] - logsum
    np.testing.assert_allclose(scores.log_probs[0], wanted, rtol=1e-4, atol=1e-4)


def test_steps_go_on_behind_the_instruction():
    """Two tokens: each is kept and seen, at the place behind the last."""
    method = method_of("shared")
    found, more = read(method), np.array([[5, 9]] * len(PROMPTS), np.int32)
    states, outs = found.states, []
    step = jax.jit(DECODER.decode_step, static_argnums=3)
    for t in range(2):
        states, out = step(PARAMS, states, more[:, t : t + 1], method)
        outs.append(out[:, 0])
    for row in (0, 4, 9):
        _, _, caches = expected(row, 5, "shared")
        x = PARAMS["embedding"].astype(np.float64)[more[row]]
        out, _, _ = oracle.forward(WIDE, x, caches)
        for t in range(2):
            drive.assert_rows_close(outs[t][row], out[t], what=f"row {row}, step {t}")
        where = len(PROMPTS[row])
        assert kept_positions(states[0], row)[-2:] == [where, where + 1]


# --- one layer, step by step


@functools.cache
def jitted(method):
    asked = method.hooks.asked
    functions = {"prefill": method.prefill, "finish": method.finish}
    functions |= {name: getattr(asked, name) for name in ("probe", "close", "settle")}
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    return types.SimpleNamespace(**compiled)


CHUNKED = (2, 7, 17, 30)  # tokens of contexts
STREAM = drive.make_stream(CHUNKED, 3)
INSTRUCTION = drive.make_stream((1, 3, 4, 2), 0, seed=7)
SPEC = drive.make_spec(STREAM, max_new_tokens=3)


def probed(method, state, instruction=INSTRUCTION, padding=drive.PADDING):
    start = [0] * len(instruction.prompts)
    given = drive.chunk(
        instruction, start, instruction.prompts, size=STRIDE, padding=padding
    )
    return jitted(method).probe(state, *given)


def read_layer(method, spec=SPEC, stream=STREAM, instruction=INSTRUCTION, watch=None):
    """The state and the outputs of one layer's context, an instruction between."""
    state, outs = method.init(spec), []
    sizes = np.array(stream.prompts)
    for start in range(0, max(sizes), STRIDE):
        if start and instruction is not None and not method.hooks.asked.votes_once:
            state, _ = probed(method, state, instruction)
            if watch is not None:
                watch(state)
        lengths = np.clip(sizes - start, 0, STRIDE)
        given = drive.chunk(
            stream, [start] * len(sizes), lengths, spec.dtype, size=STRIDE
        )
        state, out = jitted(method).prefill(state, *given)
        outs.append(out)
    return state, jnp.concatenate(outs, axis=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_probe_leaves_votes_and_nothing_else(variant):
    """Twice is once; a row without an instruction has no votes of it."""
    method = method_of(variant)
    state, _ = read_layer(method)
    once, _ = probed(method, state)
    names = {"probed"} | {"other_votes" if variant == "individual" else "votes"}
    for name in state._fields:
        before, after = getattr(state, name), getattr(once, name)
        if name not in names:
            jax.tree.map(np.testing.assert_array_equal, after, before)
    assert once.probed.all()
    twice, _ = probed(method, once)
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    none = drive.make_stream((1, 0, 4, 0), 0, seed=7)
    part, _ = probed(method, state._replace(probed=jnp.zeros(4, bool)), none)
    assert part.probed.tolist() == [True, False, True, False]
    kept = getattr(part, next(iter(names - {"probed"})))
    before = getattr(state, next(iter(names - {"probed"})))
    np.testing.assert_array_equal(kept[1], before[1])


def weights_on_past(state, row, q, k, first):
    """Softmax weights of queries behind the past, on all they see; `(T, Hq, P + n)`."""
    held = int((np.asarray(state.past.positions[row]) >= 0).sum())
    past = np.asarray(state.past.k[row, :, :held], np.float64).swapaxes(0, 1)
    keys = oracle.turned(np.concatenate([past, k]))
    keys = np.repeat(keys, q.shape[1] // keys.shape[1], axis=1)
    queries = oracle.turned(q, held + first)
    logits = np.einsum("thd,shd->ths", queries, keys) / np.sqrt(q.shape[-1])
    for t in range(len(q)):
        logits[t, :, held + first + t + 1 :] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True))[:, :, :held], held


def test_votes_are_softmax_weights_over_heads_and_rows():
    """Of the instruction, and of a chunk so far; nothing of padding, huge as it is."""
    method = method_of("shared")
    state, _ = read_layer(method)
    voted, _ = probed(method, state)
    plain, _ = read_layer(method, instruction=None)
    checked = 0
    for row, told in enumerate(INSTRUCTION.prompts):
        q, k = (x[row, :, :told].swapaxes(0, 1) for x in INSTRUCTION[:2])
        weights, held = weights_on_past(state, row, q, k, 0)
        wanted = weights.mean(1).sum(0)
        np.testing.assert_allclose(voted.votes[row, 0, :held], wanted, atol=1e-5)
        assert not voted.votes[row, 0, held:].any()
        running = CHUNKED[row] % STRIDE
        start = CHUNKED[row] - running
        q, k = (x[row, :, start : CHUNKED[row]].swapaxes(0, 1) for x in STREAM[:2])
        weights, held = weights_on_past(plain, row, q, k, 0)
        wanted = weights.mean(1).sum(0)
        np.testing.assert_allclose(plain.votes[row, 0, :held], wanted, atol=1e-5)
        checked += held > 0 and running > 0
    assert checked == 3


def test_an_instruction_attends_to_the_past_and_to_itself():
    """Not to the running chunk: outputs against float64."""
    method = method_of("shared")
    state, _ = read_layer(method)
    _, out = probed(method, state)
    for row, told in enumerate(INSTRUCTION.prompts):
        held = int((np.asarray(state.past.positions[row]) >= 0).sum())
        q, k, v = (x[row, :, :told].swapaxes(0, 1) for x in INSTRUCTION[:3])
        past = (
            np.asarray(x[row, :, :held], np.float64).swapaxes(0, 1)
            for x in (state.past.k, state.past.v)
        )
        keys, values = (
            np.repeat(np.concatenate(pair), 2, axis=1)
            for pair in zip(past, (k, v), strict=True)
        )
        logits = np.einsum(
            "thd,shd->ths", oracle.turned(q, held), oracle.turned(keys)
        ) / np.sqrt(8)
        for t in range(told):
            logits[t, :, held + t + 1 :] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        wanted = np.einsum("ths,shd->htd", weights, values)
        drive.assert_rows_close(out[row, :, :told], wanted, what=f"row {row}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_places_are_in_order_and_keys_turn_at_them(variant):
    """After the last cut: as many as it leaves, ascending, for all heads the same."""
    method = method_of(variant)
    state, _ = read_layer(method)
    state, _ = probed(method, jitted(method).close(state))
    settled = jitted(method).settle(state)
    assert isinstance(settled, Settled)
    assert settled.positions.shape == (4, 1, 9 + 3)
    for row, context in enumerate(CHUNKED):
        kept = kept_positions(settled, row)
        assert len(kept) == min(5, context)
        assert kept == sorted(set(kept))
        raw = STREAM.k[row][:, kept].swapaxes(0, 1)
        turned = oracle.turned(raw).swapaxes(0, 1)
        np.testing.assert_allclose(settled.k[row, :, : len(kept)], turned, atol=1e-5)
        values = STREAM.v[row][:, kept]
        np.testing.assert_array_equal(settled.v[row, :, : len(kept)], values)


def test_rows_that_ended_are_not_cut_again():
    """`close` keeps every bit of a row whose chunk was full, votes too."""
    method = method_of("shared")
    stream = drive.make_stream((8, 7, 16, 9), 3)
    state, _ = read_layer(method, stream=stream)
    voted, _ = probed(method, state)
    closed = jitted(method).close(voted)
    for row in (0, 2):
        pairs = zip(jax.tree.leaves(voted), jax.tree.leaves(closed), strict=True)
        for before, after in pairs:
            np.testing.assert_array_equal(after[row], before[row])
        assert closed.probed[row]
    assert (closed.length == closed.entered).all()
    assert not closed.probed[1]


def test_a_needle_that_only_the_instruction_meets():
    """It stays through 20 chunks where the instruction votes, and where chunks vote it
    is gone at the first cut.
    """
    length = 20 * STRIDE
    stream = drive.make_stream((length,), 1, heads=(2, 1), head_dim=4, sharpness=0.1)
    instruction = drive.make_stream((2,), 0, heads=(2, 1), head_dim=4, sharpness=0.1)
    needle = np.array([1.0, 0, 0, 0], np.float32)
    stream.k[..., 0] = stream.q[..., 1:] = 0
    stream.k[0, 0, 5] = 6 * needle
    stream.q[..., 0], instruction.q[0] = -2.0, 6 * needle
    rope = Rope(4, kind="none")
    spec = drive.make_spec(stream, rope=rope)
    for variant in VARIANTS:
        method = method_of(variant, 2)
        state, _ = read_layer(method, spec, stream, instruction)
        state, _ = probed(method, jitted(method).close(state), instruction)
        kept = kept_positions(jitted(method).settle(state), 0)
        assert (5 in kept) == (variant != "chunk"), variant


def test_the_first_of_two_caches_is_that_of_chunks():
    """Bit for bit, outputs too; and the running chunk goes into both."""
    both, alone = method_of("individual"), method_of("chunk")
    two, outs = read_layer(both)
    one, expected_outs = read_layer(alone, instruction=None)
    np.testing.assert_array_equal(outs, expected_outs)
    for name in ("past", "votes", "run_k", "run_v", "length", "entered"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(two, name), getattr(one, name)
        )
    held = [np.asarray(x.positions[3, 0]) for x in (two.past, two.other)]
    assert set(held[0]) != set(held[1])
    newest = range(24, 28)  # the chunk that came last
    for name in ("k", "v"):
        a, b = (np.asarray(getattr(x, name)[3]) for x in (two.past, two.other))
        places = [[list(own).index(i) for i in newest] for own in held]
        np.testing.assert_array_equal(a[:, places[0]], b[:, places[1]])


def test_without_a_question_all_variants_are_one():
    """Plain reading: outputs, kept tokens, and the state that decodes."""
    runs = []
    for variant in VARIANTS:
        method = method_of(variant)
        state, outs = read_layer(method, instruction=None)
        runs.append((jitted(method).finish(state), outs))
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, runs[0])
    settled = runs[0][0]
    # The last chunk has not been judged: all of it is there, and five before it.
    for row, context in enumerate(CHUNKED):
        last = (context - 1) // STRIDE * STRIDE
        kept = kept_positions(settled, row)
        assert len(kept) == min(5, last) + context - last
        assert kept[-(context - last) :] == list(range(last, context))
    # What is kept of the past is chosen, and is not its beginning.
    assert kept_positions(settled, 3)[:5] != [0, 1, 2, 3, 4]


def test_the_instruction_is_read_behind_what_is_left():
    """What it gives then is not what it gave while it voted, unless nothing is cut."""
    method = method_of("shared")
    state, _ = read_layer(method)
    state, before = probed(method, jitted(method).close(state))
    settled = jitted(method).settle(state)
    start = [0] * 4
    given = drive.chunk(INSTRUCTION, start, INSTRUCTION.prompts, size=STRIDE)
    behind, after = jitted(method).prefill(settled, *given)
    for row, (context, told) in enumerate(
        zip(CHUNKED, INSTRUCTION.prompts, strict=True)
    ):
        gap = np.abs(after[row, :, :told] - before[row, :, :told]).max()
        held = min(9, context - (context - 1) // STRIDE * STRIDE + 5)
        assert (gap < 1e-5) == (min(held, context) <= 5), row
        assert int(behind.used[row]) == min(5, context) + told
        listed = kept_positions(behind, row)[-told:]
        assert listed == list(range(context, context + told))
    same = jitted(method).finish(behind)
    jax.tree.map(np.testing.assert_array_equal, same, behind)


def test_a_key_that_moved_often_is_the_key_that_came():
    """bfloat16, 200 cuts: turned once, at the end, from what was stored."""
    length = 201 * STRIDE
    stream = drive.make_stream((length,), 0, heads=(2, 1), dtype="bfloat16")
    stream.q[:] = 0  # all are equal: the earliest stay
    stream.q[..., 0] = 5.0
    stream.k[..., 0] = 0
    stream.k[0, 0, :, 0] = -5
    stream.k[0, 0, ::67, 0] = 5
    rope = Rope(8, theta=1e8)
    spec = drive.make_spec(stream, 40, "bfloat16", rope=rope, max_new_tokens=0)
    method = method_of("chunk")

    @jax.jit
    def read(state, q, k, v):
        return method.prefill(state, q, k, v, jnp.array([length]))[0]

    given = drive.chunk(stream, [0], [length], "bfloat16", size=length)[:3]
    settled = jitted(method).finish(read(method.init(spec), *given))
    kept = np.asarray(settled.positions[0, 0, :9])
    assert (np.diff(kept) > 0).all()
    assert 0 < kept[0] < 300, kept
    raw = given[1][:, :, kept]
    turned = jax.jit(rope)(raw, jnp.arange(9, dtype=jnp.int32)[None])
    np.testing.assert_array_equal(settled.k[:, :, :9], turned)


# --- options


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "budget=1 must be at least 2"),
        ({"stride": 0}, r"stride=0 must be in \[1, budget=1024\)"),
        ({"stride": 1024}, r"stride=1024 must be in .* raise the budget"),
        ({"variant": "dual"}, "variant='dual' must be one of shared, individual, ch"),
        ({"instruction": 0}, r"instruction=0 must be in \[1, stride=256\] tokens"),
        ({"stride": 8, "instruction": 9}, "instruction=9 must be .* raise the stride"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        citrus(**options)


def test_defaults_are_the_official_ones_and_follow_the_budget():
    asked = citrus().hooks.asked
    assert (asked.stride, asked.tokens, asked.votes_once) == (256, 16, False)
    asked = citrus(budget=16, variant="chunk").hooks.asked
    assert (asked.stride, asked.tokens, asked.votes_once) == (4, 4, True)
    assert citrus(budget=2).hooks.asked.stride == 1
