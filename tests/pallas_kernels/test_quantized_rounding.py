"""What becomes of products with rows in 4 bits where a device rounds its operands.

As a TPU rounds float32 by default: to bfloat16, with sums in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Format, Layout

SIZE, GROUP = 64, 32


def stored(rows):
    layout = Layout((Format(SIZE, 4, GROUP),), "float32")
    return jax.jit(functools.partial(quantized.encode, layout))(jnp.asarray(rows))


def rounded(operation, x, rows):
    """What a TPU computes, and the numbers of the rows."""
    run = jax.jit(functools.partial(_rounding, jax.make_jaxpr(operation)(x, rows)))
    (found,) = run(*jax.tree.leaves((x, rows)))
    return np.asarray(found, float), np.asarray(quantized.floats(rows), float)


def _rounding(closed, *arguments):
    """Evaluates a program whose products round operands unless told otherwise."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for step in closed.jaxpr.eqns:
        given, parameters = [read(x) for x in step.invars], step.params
        if step.primitive.name in ("jit", "pjit"):
            found = _rounding(parameters["jaxpr"], *given)
        else:
            if step.primitive is lax.dot_general_p and parameters["precision"] is None:
                given = [lax.reduce_precision(x, 8, 7) for x in given]  # bfloat16
            found = step.primitive.bind(*given, **parameters)
        several = isinstance(found, list | tuple)
        values |= zip(step.outvars, found if several else [found], strict=True)
    return [read(x) for x in closed.jaxpr.outvars]


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_keys_far_from_zero_lose_what_their_codes_lose():
    """A code times its scale errs by 2**-9 of it, and sums times offsets by nothing.

    Rounded to bfloat16, these would err by ten times the bound.
    """
    q = np.asarray(jnp.asarray(draw(6, SIZE, seed=0) + 1, jnp.bfloat16), np.float32)
    rows = stored(draw(50, SIZE, seed=1) + 100)
    found, keys = rounded(quantized.times_keys, q, rows)
    span = np.ptp(keys.reshape(50, -1, GROUP), axis=-1).repeat(GROUP, -1)
    bound = 2.0**-8 * np.abs(q) @ span.T + 1e-2  # sums of large float32 err too
    assert (np.abs(found - q.astype(float) @ keys.T) < bound).all()


def test_offsets_meet_weights_that_are_rounded_as_for_codes():
    """Values err 2.4 times as much as floats, of which codes times scales are most.

    With offsets that meet weights as they were it would be 3.2 times.
    """
    weights = np.asarray(jax.nn.softmax(draw(60, 50, seed=0)))
    rows = stored(draw(50, SIZE, seed=1))
    found, values = rounded(quantized.weighted_sum, weights, rows)
    narrow = np.asarray(jnp.asarray(weights, jnp.bfloat16), float)
    exact = weights.astype(float) @ values
    of_floats = np.linalg.norm(narrow @ values - exact)
    assert np.linalg.norm(found - exact) < 2.8 * of_floats
