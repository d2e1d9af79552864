"""The promise that makes every method a draft: what was drafted can be undone."""

import functools

import jax
import numpy as np

from kvjax.interface import State
from kvjax.testing import streams
from kvjax.testing.streams import NothingToCheckError, Stream, expect
from kvjax.testing.subject import PROMPTS, STEPS, Subject

DRAFTED = 3  # tokens
KEPT = (0, 1, 2, 3, 2, 1)  # of these, by each row
ROWS = np.arange(len(PROMPTS))


def what_was_drafted_leaves_no_trace(subject: Subject) -> None:
    """Each row keeps its own number of tokens, and goes on as if there were no others.

    By the states of before, of which rows are put together, and by `rewind` if there
    is one. Steps that revise earlier ones never are as if those had not come.
    """
    if subject.method.rows > 1:
        raise NothingToCheckError
    state, _ = subject.prefill()
    ended = subject.jitted_finish(state)
    inputs = subject.step_inputs()
    states, now = [jax.tree.map(np.array, ended)], ended
    for index in range(DRAFTED):
        now, _ = subject.compiled_step(now, [x[index] for x in inputs])
        states.append(jax.tree.map(np.array, now))
    _goes_on(subject, jax.tree.map(_of_rows, *states), "rows put together")
    if subject.method.rewind is not None:
        taken = functools.partial(jax.jit, static_argnums=2)(subject.method.rewind)
        count = jax.device_put(np.asarray([DRAFTED - n for n in KEPT], np.int32))
        _goes_on(subject, taken(now, count, DRAFTED), "rewound")


def _of_rows(*leaves: np.ndarray) -> np.ndarray:
    """Returns each row as it was when it had the tokens that it keeps."""
    first = leaves[0]
    if all(np.array_equal(leaf, first) for leaf in leaves):
        return first  # weights, say
    expect(
        first.shape[:1] == (len(PROMPTS),),
        f"an array of shape {first.shape} changes with steps, and has no row for each "
        f"of {len(PROMPTS)}.",
    )
    return np.stack([leaves[kept][b] for b, kept in zip(ROWS, KEPT, strict=True)])


def _goes_on(subject: Subject, state: State, what: str) -> None:
    """Decodes what follows in each row, and compares."""
    q, k, v, prompts, _ = subject.stream
    behind = Stream(q, k, v, tuple(np.add(prompts, KEPT).tolist()), STEPS - DRAFTED)
    before = subject.baseline
    inputs = streams.step_inputs(behind)
    state = jax.tree.map(jax.device_put, state)
    for index in range(STEPS - DRAFTED):
        state, (out, diagnostics) = subject.compiled_step(
            state, [x[index] for x in inputs]
        )
        then = np.asarray(KEPT) + index
        np.testing.assert_allclose(
            np.asarray(out)[:, :, -1],
            before.out[then, ROWS],
            rtol=1e-5,
            atol=1e-5,
            err_msg=f"outputs of step {index}, {what}",
        )
        np.testing.assert_array_equal(
            diagnostics.attended,
            before.diagnostics.attended[then, ROWS],
            err_msg=f"attended in step {index}, {what}",
        )
