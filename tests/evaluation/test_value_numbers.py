"""Numbers of values: equal only where the values are, whatever a program is given."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from kvjax.evaluation.value_numbers import value_numbers


def numbers(function, *given, inputs=None):
    program = jax.make_jaxpr(function)(*given)
    return value_numbers(program, range(len(given)) if inputs is None else inputs)


X, Y = np.arange(4, dtype=np.float32), np.ones(4, np.float32)


def scanned(factor):
    def sums(x):
        return lax.scan(lambda total, one: (total * factor + one, total), 0.0, x)[1]

    return sums


def same(first, second, *given, inputs=None):
    """Whether both functions' values have one number."""
    (a, b) = numbers(lambda *x: (first(*x), second(*x)), *given, inputs=inputs)
    return a == b


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * 2 + y,
        lambda x, y: jnp.sort(x)[::-1] @ y,
        lambda x, y: jax.nn.softmax(x) + jax.nn.relu(y),
        lambda x, y: scanned(3.0)(x) + lax.cond(x[0] > 0, jnp.sin, jnp.cos, y),
        lambda x, y: lax.dynamic_update_slice(x, y[:2], (1,)),
        lambda x, y: x + np.arange(4, dtype=np.float32),
    ],
)
def test_the_same_operations_of_the_same_things_are_equal(function):
    assert same(function, function, X, Y)
    assert same(jax.jit(function), lambda x, y: jax.jit(function)(x, y), X, Y)

    # Of things that are equal by what is said of them, and of others.
    def later(x, y, z):
        return function(z, y)

    def sooner(x, y, z):
        return function(x, y)

    assert same(sooner, later, X, Y, X, inputs=["x", "y", "x"])
    assert not same(sooner, later, X, Y, X)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x * 2, lambda x: x * 3),
        (lambda x: x + x, lambda x: x * x),
        (lambda x: x[:2], lambda x: x[1:3]),
        (lambda x: x.astype(jnp.float16), lambda x: x.astype(jnp.bfloat16)),
        (scanned(2.0), scanned(2.5)),
        (
            lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
            lambda x: lax.cond(x[0] > 0, jnp.cos, jnp.sin, x),
        ),
        (
            lambda x: lax.fori_loop(0, 3, lambda i, y: y * 2, x),
            lambda x: lax.fori_loop(0, 4, lambda i, y: y * 2, x),
        ),
        (
            lambda x: x + np.array([0, 1, 2, 3], np.float32),
            lambda x: x + np.array([0, 1, 2, 4], np.float32),
        ),
        (jax.jit(lambda x: x - 1), jax.jit(lambda x: x - 2)),
        (
            lambda x: lax.map(lambda row: row[:1], x.reshape(2, 2)),
            lambda x: lax.map(lambda row: row[1:], x.reshape(2, 2)),
        ),
        (lambda x: jnp.zeros(4), lambda x: jnp.full(4, -0.0)),
        (
            lambda x: jax.pure_callback(np.sin, x, x),
            lambda x: jax.pure_callback(np.cos, x, x),
        ),
    ],
)
def test_other_operations_have_other_numbers(first, second):
    assert not same(first, second, X)


def test_outputs_of_one_operation_are_told_apart():
    assert len(set(numbers(lambda x: lax.top_k(x, 2), X))) == 2
    assert len(set(numbers(lambda x: jnp.split(x, 2), X))) == 2
    first, again = numbers(lambda x: (x, x), X)
    assert first == again


def test_what_has_effects_is_equal_to_nothing():
    def told(x):
        jax.debug.print("{}", x)
        return x + 1

    def looped(x):
        def step(total, one):
            jax.debug.print("{}", total)
            return total + one, None

        return lax.scan(step, x, X)[0]

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    drawn = itertools.count()

    def draw(x):
        return io_callback(lambda _: np.float32(next(drawn)), shape, x)

    assert same(told, told, np.float32(1.0))
    for other in (looped, draw, jax.jit(draw), jax.jit(looped)):
        assert not same(other, other, np.float32(1.0))


def test_a_key_in_a_program_is_itself():
    one, other = jax.random.key(0), jax.random.key(0)
    assert same(lambda x: (x, one)[1], lambda x: (x, one)[1], X)
    assert not same(lambda x: (x, one)[1], lambda x: (x, other)[1], X)
