"""KVzip: the largest weights of a second reading, against float64 loops."""

import dataclasses

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kvjax
from kvjax import accounting, registry
from kvjax.methods import kvzip as module
from kvjax.methods.kvzip import kvzip

BUDGET, STEPS = 8, 3
PROMPTS = (1, 5, 8, 21, 30)
# Of each row the tokens that are repeated, chunk by chunk: a few, one, and none.
CHUNKS = [(3, 7, 6, 9, 9), (0, 2, 0, 9, 1), (0, 0, 0, 4, 9)]


def chunk_of(again, row, lengths):
    """The queries and keys of a row's chunk, as an oracle takes them."""
    return tuple(x[row, :, : lengths[row]].astype(np.float64) for x in again[:2])


def read_twice(method, spec, stream, *, seed=5, chunks=CHUNKS, whole=None):
    """The state before `finish`, the outputs of the chunks, and what was repeated.

    Padding holds huge numbers, as in the first reading.
    """
    heads = stream.q.shape[1], stream.k.shape[1]
    state, _ = drive.prefill(method, spec, stream, whole)
    step, outs, again = jax.jit(method.reread.prefill), [], []
    for number, lengths in enumerate(chunks):
        size = max(max(lengths), 1)
        drawn = drive.make_stream(
            [size] * len(lengths), 0, heads=heads, seed=seed + number, sharpness=3.0
        )
        start = np.zeros(len(lengths), int)
        *inputs, counts = drive.chunk(drawn, start, lengths, size=size + 2)
        state, out = step(state, *inputs, counts)
        again.append(drawn)
        outs.append(np.asarray(out))
    of_row = {
        prompt: [
            chunk_of(drawn, row, lengths)
            for drawn, lengths in zip(again, chunks, strict=True)
        ]
        for row, prompt in enumerate(stream.prompts)
    }
    return state, outs, again, of_row


def decoded(method, state, stream):
    inputs = drive.step_inputs(stream)

    @jax.jit
    def decode(state):
        state = method.finish(state)
        return jax.lax.scan(lambda s, x: drive.step(method, s, x), state, inputs)

    state, (out, diagnostics) = decode(state)
    prompt_out = [np.zeros((4, 0, 8))] * len(stream.prompts)
    diagnostics = jax.tree.map(np.asarray, diagnostics)
    return drive.Run(prompt_out, np.asarray(out)[:, :, :, -1], diagnostics, state)


def assert_keeps(run, stream, oracle):
    """Kept positions and outputs are the oracle's at every step."""
    for row, prompt in enumerate(stream.prompts):
        trace = oracle(stream.row(row))
        for i in range(stream.steps):
            attended = drive.attended_positions(
                run.diagnostics.attended[i, row], stream.q.shape[1]
            )
            assert attended == trace.attended[prompt + i], (row, i)
            drive.assert_rows_close(run.out[i, row], trace.out[prompt + i])


# Blocks of keys and tiles of queries that do not divide what they cut, and one of each.
@pytest.mark.parametrize(("tile", "block"), [(4, 7), (256, 512)])
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 3)])
def test_equals_float64_loops(heads, tile, block, monkeypatch):
    """Scores of every token; kept positions; outputs."""
    monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(module, "BLOCK", block)
    stream = drive.make_stream(PROMPTS, STEPS, heads=heads, sharpness=3.0)
    method, spec = kvzip(budget=BUDGET), drive.make_spec(stream)
    state, _, _, of_row = read_twice(method, spec, stream)
    importance = np.asarray(method.importance(state))
    for row, prompt in enumerate(PROMPTS):
        expected = oracles.kvzip_scores(stream.row(row), of_row[prompt])
        np.testing.assert_allclose(state.scores[row, :, :prompt], expected, atol=1e-6)
        assert not state.scores[row, :, prompt:].any()
        np.testing.assert_array_equal(
            importance[row, :, :prompt], state.scores[row, :, :prompt]
        )
        assert (importance[row, :, prompt:] == -np.inf).all()
    run = decoded(method, state, stream)
    assert_keeps(
        run,
        stream,
        lambda row: oracles.kvzip(row, budget=BUDGET, chunks=of_row[row.prompt]),
    )


def test_a_long_prompt_is_attended_to_and_scored_in_tiles():
    """More queries and more keys than are attended to at once."""
    stream = drive.make_stream((600, 3), STEPS, sharpness=3.0)
    method, spec = kvzip(budget=50), drive.make_spec(stream)
    assert spec.capacity > module.BLOCK
    state, _, _, of_row = read_twice(method, spec, stream, chunks=[(60, 70), (8, 0)])
    for row, prompt in enumerate(stream.prompts):
        expected = oracles.kvzip_scores(stream.row(row), of_row[prompt])
        np.testing.assert_allclose(state.scores[row, :, :prompt], expected, atol=1e-6)
        assert not state.scores[row, :, prompt:].any()


def test_the_second_reading_attends_as_a_longer_prompt_would_and_leaves_no_trace():
    stream = drive.make_stream(PROMPTS, STEPS)
    method, spec = kvzip(budget=BUDGET), drive.make_spec(stream)
    before, _ = drive.prefill(method, spec, stream)
    state, outs, again, _ = read_twice(method, spec, stream)
    for a, b in zip(
        jax.tree.leaves(state.store), jax.tree.leaves(before.store), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for drawn, lengths, out in zip(again, CHUNKS, outs, strict=True):
        for row, count in enumerate(lengths):
            prompt = PROMPTS[row]
            longer = oracles.Row(
                *(
                    np.concatenate([a[row, :, :prompt], b[row, :, :count]], axis=1)
                    for a, b in zip(stream[:3], drawn[:3], strict=True)
                ),
                prompt=prompt + count,
            )
            expected = oracles.full(longer).out[prompt:].swapaxes(0, 1)
            drive.assert_rows_close(out[row, :, :count], expected, what=f"row {row}")


def test_a_row_without_tokens_keeps_every_bit():
    """Of the others' chunks and padding it sees nothing; nor of how many there are."""
    stream = drive.make_stream(PROMPTS, STEPS)
    method, spec = kvzip(budget=BUDGET), drive.make_spec(stream)
    first, *_ = read_twice(method, spec, stream, chunks=CHUNKS[:1])
    both, *_ = read_twice(method, spec, stream, chunks=[CHUNKS[0], (0, 0, 0, 9, 1)])
    np.testing.assert_array_equal(both.scores[:3], first.scores[:3])
    assert (both.scores[3:] != first.scores[3:]).any()


def test_chunks_of_the_first_reading_change_nothing():
    stream = drive.make_stream(PROMPTS, STEPS)
    method, spec = kvzip(budget=BUDGET), drive.make_spec(stream)
    once, *_ = read_twice(method, spec, stream)
    parts = [(1, 2, 0, 9, 15), (0, 3, 8, 12, 0), (0, 0, 0, 0, 15)]
    cut, *_ = read_twice(method, spec, stream, whole=parts)
    np.testing.assert_allclose(cut.scores, once.scores, atol=1e-6)


def test_of_the_cache_in_bfloat16_the_weights_are_those_of_the_attention():
    stream = drive.make_stream(PROMPTS, STEPS, dtype="bfloat16", sharpness=3.0)
    spec = drive.make_spec(stream, dtype="bfloat16")
    method = kvzip(budget=BUDGET)
    state, _ = drive.prefill(method, spec, stream)
    start, lengths = np.zeros(5, int), (9,) * 5
    drawn = drive.make_stream(lengths, 0, seed=5, dtype="bfloat16", sharpness=3.0)
    inputs = drive.chunk(drawn, start, lengths, jnp.bfloat16, size=9)
    state, out = jax.jit(method.reread.prefill)(state, *inputs)
    assert out.dtype == jnp.bfloat16
    assert state.scores.dtype == jnp.float32
    found = np.asarray(state.scores)
    for row, prompt in enumerate(PROMPTS):
        chunks = [chunk_of(drawn, row, lengths)]
        expected = oracles.kvzip_scores(stream.row(row), chunks)
        np.testing.assert_allclose(found[row, :, :prompt], expected, atol=3e-2)


def test_wide_types_change_nothing():
    stream = drive.make_stream(PROMPTS, STEPS)
    method, spec = kvzip(budget=BUDGET), drive.make_spec(stream)
    expected, *_ = read_twice(method, spec, stream)
    with jax.enable_x64(True):
        state, *_ = read_twice(method, spec, stream)
        eager, _ = method.reread.prefill(
            state, *drive.chunk(stream, [0] * 5, (1,) * 5, size=1)
        )
    for found in (state, eager):
        types = jax.tree.map(lambda x: (x.shape, x.dtype), found)
        assert types == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    np.testing.assert_allclose(state.scores, expected.scores, atol=1e-6)


def test_bytes_of_a_prompt_have_the_scores():
    stream = drive.make_stream(PROMPTS, STEPS)
    spec = drive.make_spec(stream)
    scores = 4 * spec.batch * spec.num_kv_heads * spec.capacity
    full, ours = (
        accounting.prompt_bytes(one, spec) for one in (kvjax.full(), kvzip(budget=4))
    )
    assert ours == full + scores
    snapkv = kvjax.snapkv(budget=4, window=2)
    assert accounting.state_bytes(kvzip(budget=4), spec) == accounting.state_bytes(
        snapkv, spec
    )


def test_the_defaults_are_the_papers():
    method = kvzip()
    assert method.reread.chunk == 2048
    assert method.reread.words == "Repeat the previous context:"
    assert kvzip(chunk=512).reread.chunk == 512
    assert method.exact_prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 must be at least 1 token"),
        ({"chunk": 0}, "chunk=0 must be at least 1 token"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_values(options, message):
    with pytest.raises(ValueError, match=message):
        kvzip(**options)


# --- under transforms


def test_heads_share_their_budget_by_the_second_reading():
    """Of all heads together the best, each head's own first: alpha = 0 has no floor."""
    stream = drive.make_stream(PROMPTS, STEPS, sharpness=3.0)
    spec = drive.make_spec(stream)
    method = kvjax.head_budgets(kvzip(budget=BUDGET), alpha=0.0)
    state, _, _, of_row = read_twice(method, spec, stream)
    run = decoded(method, state, stream)
    for row, prompt in enumerate(PROMPTS):
        scores = oracles.kvzip_scores(stream.row(row), of_row[prompt])
        order = sorted(np.ndindex(scores.shape), key=lambda at: (-scores[at], *at))
        attended = drive.attended_positions(run.diagnostics.attended[0, row], 4)
        for head in range(2):
            kept = sorted(j for kv, j in order[: 2 * BUDGET] if kv == head)
            assert attended[2 * head] == [*kept, prompt]


@pytest.mark.parametrize(
    "spec",
    [
        "decode_eviction+kvzip:budget=8",
        "duo+kvzip:budget=8",
        "dense_layers+duo+kvzip:budget=8",
    ],
)
def test_transforms_that_would_drop_the_second_reading_refuse(spec):
    transform = spec.split("+")[-2]
    message = rf"{transform} cannot wrap Method\('kvzip:budget=8'\), which reads its "
    with pytest.raises(ValueError, match=message):
        registry.parse(spec)


def test_lists_of_layers_read_again_alike_or_refuse():
    mixed = [kvzip(budget=8), kvjax.full()]
    for methods in (mixed, mixed[::-1], [kvzip(chunk=4), kvzip(chunk=8)]):
        names = [f".*{one.spec_text()}.*" for one in methods]
        message = f"{' and '.join(names)} do not read a prompt again alike, .*`chunk`"
        with pytest.raises(ValueError, match=message):
            kvjax.layer_budgets(methods)
    method = kvjax.layer_budgets([kvzip(budget=8), kvzip(budget=6)])
    assert method.reread._replace(prefill=None) == (None, 2048, module.WORDS)


def test_dense_layers_must_hold_what_they_read():
    method = kvjax.dense_layers(kvzip(budget=8), kvjax.quest(budget=16), first=1)
    spec = drive.make_spec(drive.make_stream((4,), 1))
    with pytest.raises(
        ValueError, match=r"twice, and .*quest.* in one store: use full"
    ):
        method.init(dataclasses.replace(spec, layer=0))
    method.init(dataclasses.replace(spec, layer=1))
    message = r"kvzip.* twice, and dense layers beside .*quest.*: use full"
    with pytest.raises(ValueError, match=message):
        kvjax.dense_layers(kvjax.quest(budget=16), kvzip(budget=8))


def test_other_attention_does_not_merge():
    """A dense layer of an entmax model says so, where the method is not asked."""
    method = kvjax.dense_layers(kvzip(budget=8), kvjax.full(), first=1)
    stream = drive.make_stream((4,), 1)
    state, _ = drive.prefill(
        method, drive.make_spec(stream, layer=0, alpha=1.5), stream
    )
    with pytest.raises(ValueError, match=r"under softmax attention, not alpha=1\.5"):
        method.reread.prefill(state, *drive.chunk(stream, [0], [2], size=2))
