"""Attention of models that repeat tokens, in training: against loops over pairs."""

import functools

import jax
import numpy as np
import oracles.phd
import pytest

from kvjax.copies import Copies
from kvjax.rope import Rope
from kvjax.training import phd
from kvjax.training.attention import causal_attention
from kvjax.training.phd import phd_attention

LENGTH = 11
# Copies, window and chunk: of PHD, its windows, and windows in chunks; odd ones too.
SIZES = [(2, 0, 0), (3, 0, 4), (2, 1, 4), (2, 16, 8), (3, 4, 4), (5, 4, 8), (4, 1, 0)]
SIZES += [(3, 16, 0)]
ROPE = Rope(4)


@functools.cache
def heads(rows, batch=2):
    rng = np.random.default_rng(rows)
    q = 2 * rng.standard_normal((batch, 4, rows, 4)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, 2, rows, 4)).astype(np.float32)
    return q, k, v


def attend(sizes, q, k, v, **options):
    attention = phd_attention(ROPE, copies=Copies(*sizes), **options)
    return jax.jit(functools.partial(attention, 0))(q, k, v)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_copies_attend_as_defined(sizes):
    """Over blocks of four positions, the last of which is not whole, in two groups."""
    given = heads(sizes[0] * LENGTH)
    expected = oracles.phd.attention(*given, *sizes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(phd, "CPU_SCORES", 0)
        patched.setattr(phd, "CPU_MIN_BLOCK", 4)
        patched.setattr(phd, "MAX_GROUPS", 2)
        out = attend(sizes, *given)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    # Originals are the vanilla model's, to the bit: one function computes them.
    vanilla = jax.jit(functools.partial(causal_attention(ROPE), 0))
    own = [x[:, :, :LENGTH] for x in given]
    np.testing.assert_array_equal(out[:, :, :LENGTH], vanilla(*own))
