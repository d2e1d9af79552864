"""StreamingLLM sees the sinks and the newest tokens, re-numbered, at every token."""

import functools

import drive
import jax
import numpy as np
import oracles
import pytest

from kvjax.methods.streaming_llm import streaming_llm


@pytest.mark.parametrize(
    ("heads", "budget", "num_sinks"),
    [
        ((6, 2), 8, 4),
        ((4, 1), 7, 2),
        ((2, 2), 5, 0),
        ((2, 2), 4, 3),
        ((2, 2), 1, 0),
    ],
)
def test_equals_float64_loops(heads, budget, num_sinks):
    """Prompts shorter and longer than the ring; 21 steps wrap it several times."""
    stream = drive.make_stream((1, 5, 8, 26), 21, heads=heads)
    method = streaming_llm(budget=budget, num_sinks=num_sinks)
    run = drive.run(method, drive.make_spec(stream), stream)
    options = {"budget": budget, "num_sinks": num_sinks}
    drive.assert_matches(run, stream, oracles.streaming_llm, **options)


@pytest.mark.parametrize(
    "chunks",
    [
        [(1, 1, 9), (0, 13, 9), (2, 13, 9)],
        [(3, 3, 3), (0, 24, 0), (0, 0, 24)],
        [(3, 1, 1), *[(0, 2, 2)] * 13],
    ],
    ids=["thirds", "holes", "pairs"],
)
def test_chunks_of_any_size_change_nothing(chunks):
    """A chunk may be shorter than the ring, longer, or empty in some rows."""
    stream = drive.make_stream((3, 27, 27), 3)
    method = streaming_llm(budget=6, num_sinks=2)
    run = drive.run(method, drive.make_spec(stream), stream, chunks)
    drive.assert_matches(run, stream, oracles.streaming_llm, budget=6, num_sinks=2)


def test_half_precision():
    stream = drive.make_stream((4, 30), 20, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    run = drive.run(streaming_llm(budget=8, num_sinks=3), spec, stream)
    options = {"budget": 8, "num_sinks": 3}
    drive.assert_matches(run, stream, oracles.streaming_llm, "bfloat16", **options)


def test_memory_does_not_depend_on_the_context():
    method = streaming_llm(budget=8)
    stream = drive.make_stream((3,), 2)
    shapes = []
    for capacity in (64, 8192):
        spec = drive.make_spec(stream, capacity=capacity)
        state = jax.eval_shape(functools.partial(method.init, spec))
        shapes.append([leaf.shape for leaf in jax.tree.leaves(state)])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("before", [2**24, 2**31 - 64])
def test_far_along_a_stream_all_is_as_near_its_beginning(before):
    """The same tokens `before` tokens later: the sinks and the window see the same."""
    stream = drive.make_stream((40,), 1)
    method, spec = streaming_llm(budget=12, num_sinks=4), drive.make_spec(stream)
    prefill = jax.jit(method.prefill)
    step = jax.jit(functools.partial(drive.step, method))

    def outputs(jump):
        first, rest = drive.prompt_inputs(stream, [(8,), (32,)])
        state, _ = prefill(method.init(spec), *first)
        length = np.asarray(state.length) + np.int32(jump)
        state, out = prefill(state._replace(length=jax.device_put(length)), *rest)
        inputs = [np.asarray(x)[0] for x in drive.step_inputs(stream)]
        _, (last, _) = step(state, inputs)
        # The ring of 8 holds none of the tokens before the jump by then.
        out, last = np.asarray(out), np.asarray(last)
        return np.concatenate([out[0, :, 8:], last[0]], axis=1)

    assert before % 8 == 0  # every token has the slot that it has near the beginning
    drive.assert_rows_close(outputs(before), outputs(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget=0 must be at least 1"),
        ({"budget": 4}, r"num_sinks=4 must be in \[0, budget=4\)"),
        ({"budget": 8, "num_sinks": 9}, r"num_sinks=9 must be in \[0, budget=8\)"),
        ({"budget": 8, "num_sinks": -1}, r"num_sinks=-1 must be in \[0, budget=8\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        streaming_llm(**options)


def test_defaults_of_the_paper():
    """Budget 1,024 and 4 sinks: left out, they are what is written here."""
    stream = drive.make_stream((3, 1040), 2, heads=(1, 1), head_dim=4)
    spec = drive.make_spec(stream)
    explicit = drive.run(streaming_llm(budget=1024, num_sinks=4), spec, stream)
    default = drive.run(streaming_llm(), spec, stream)
    kept = drive.attended_positions(default.diagnostics.attended[-1, 1], 1)[0]
    assert kept == [0, 1, 2, 3, *range(1041 - 1019, 1042)]
    drive.assert_rows_close(default.out, explicit.out)
