"""A choice of pages serves until the next one; pages that begin since join it."""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kvjax
from kvjax.methods.quest import quest
from kvjax.methods.refreshkv.refresh import refresh

PAGE, PAGES = 4, 3
STREAM = drive.make_stream((1, 27, 28, 13), 14)
SPEC = drive.make_spec(STREAM)
QUEST = quest(budget=PAGE * PAGES, page_size=PAGE)


@functools.cache
def run(method):
    return drive.run(method, SPEC, STREAM)


def pages(diagnostics, step, row, head):
    """The listed pages in their order; those after the last token are -1."""
    listed = diagnostics.attended[step, row, head].reshape(-1, PAGE)
    return [int(tokens.max()) // PAGE if tokens.max() >= 0 else -1 for tokens in listed]


def mean_query(row, step):
    position = STREAM.prompts[row] + step
    return np.mean([oracles.rotate(q, position) for q in STREAM.q[row, :, position]], 0)


def expected(row, head, stride, threshold=None):
    """The list of each step, and which steps chose, from quest's own at every step."""
    held, reference, lists, choices = [-1] * PAGES, None, [], []
    for step in range(STREAM.steps):
        due = step % stride == 0
        query = mean_query(row, step)
        if threshold is not None and due and reference is not None:
            norms = np.linalg.norm(query) * np.linalg.norm(reference)
            due = query @ reference / norms <= threshold
        if due:
            held = pages(run(QUEST).diagnostics, step, row, head)
            reference = query
        choices.append(due)
        current = (STREAM.prompts[row] + step) // PAGE
        if current not in held:
            held = [current, *held[:-1]]
        lists.append(held)
    return lists, choices


@pytest.mark.parametrize(
    ("stride", "threshold"), [(1, None), (3, None), (9, None), (2, 0.0)]
)
def test_lists_are_held_between_choices(stride, threshold):
    schedule = {} if threshold is None else {"schedule": "qc", "threshold": threshold}
    found = run(refresh(QUEST, stride=stride, **schedule))
    moved = total = 0
    for row in range(len(STREAM.prompts)):
        for head in range(2):
            lists, choices = expected(row, head, stride, threshold)
            for step, listed in enumerate(lists):
                assert pages(found.diagnostics, step, row, head) == listed
                moved += listed != pages(run(QUEST).diagnostics, step, row, head)
        assert found.state.refreshes[row] == sum(choices)
        assert found.state.steps[row] == STREAM.steps
        total += sum(choices)
    assert (moved == 0) == (stride == 1)
    every = len(STREAM.prompts) * -(-STREAM.steps // stride)
    if threshold is None:
        assert total == every
    else:  # both decisions were taken, and not by the first steps alone
        assert len(STREAM.prompts) < total < every


def test_what_is_read_to_choose_is_not_read_between_choices():
    method = refresh(QUEST, stride=4)
    step = jax.jit(functools.partial(drive.step, method))
    state, _ = drive.prefill(method, SPEC, STREAM)
    state = method.finish(state)
    for i, inputs in enumerate(zip(*drive.step_inputs(STREAM), strict=True)):
        nothing = jnp.full_like(state.store.page_min, jnp.nan)
        store = state.store._replace(page_min=nothing, page_max=nothing)
        _, (blind, _) = step(state._replace(store=store), inputs)
        state, (out, _) = step(state, inputs)
        assert np.array_equal(blind, out) == (i % 4 != 0)


def test_bytes_are_those_of_a_choice_spread_over_its_steps():
    held, every = refresh(QUEST, stride=5), QUEST.traffic(SPEC, 41)
    found = held.traffic(SPEC, 41)
    assert found.kv == every.kv
    listed = 4 * PAGES * 2 * len(STREAM.prompts)
    assert found.metadata == -(-every.metadata // 5) + listed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: refresh(QUEST, stride=0), "stride=0 must be at least 1"),
        (lambda: refresh(QUEST, schedule="never"), "schedule='never' must be 'fixed'"),
        (lambda: refresh(kvjax.full()), r"Method\('full'\) does not make: wrap quest"),
        (lambda: kvjax.parse("refresh+retro+quest:budget=64"), "wrap quest itself"),
    ],
)
def test_wrong_arguments(make, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        make()
