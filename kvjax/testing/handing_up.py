"""The promise of a method whose layers hand something up while a prompt is read."""

import functools

import jax

from kvjax.testing import streams
from kvjax.testing.streams import NothingToCheckError, expect
from kvjax.testing.subject import PROMPTS, Subject


def what_a_layer_hands_up_has_one_shape(subject: Subject) -> None:
    """Whatever came from below: layers above the first share a program.

    And a layer with none below it reads as `prefill_after` does without.
    """
    method, spec = subject.method, subject.spec
    if method.hooks.prefill_after is None:
        raise NothingToCheckError
    empty = jax.eval_shape(functools.partial(method.init, spec))
    inputs = streams.chunk(subject.stream, [0] * len(PROMPTS), PROMPTS, size=21)
    *_, first = jax.eval_shape(method.hooks.prefill_after, empty, *inputs, None)
    state, out, second = jax.eval_shape(
        method.hooks.prefill_after, empty, *inputs, first
    )
    for actual, expected, what in (
        (second, first, "what a layer hands up"),
        (state, empty, "the state behind a chunk"),
        (out, inputs[0], "out"),
    ):
        types = [
            jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
            for tree in (actual, expected)
        ]
        expect(types[0] == types[1], f"{what} is {types[0]}, not {types[1]}.")
