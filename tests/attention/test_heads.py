"""What is done over all heads, where two devices have half of them each."""

import dataclasses

import drive
import jax
import numpy as np
import pytest

from kvjax.attention import heads
from kvjax.interface import Share

WHOLE = drive.make_spec(drive.make_stream((1, 2, 3), 1, heads=(8, 4)))
OWN = dataclasses.replace(
    WHOLE, num_q_heads=4, num_kv_heads=2, share=Share("tensor", heads=2)
)
X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def on_both(function, *given):
    """What each of two devices gets, of arrays that go to them."""
    run = jax.vmap(lambda *own: function(OWN, *own), axis_name="tensor")
    return np.asarray(run(*map(jax.device_put, given)))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (heads.total, X.sum(1)),
        (heads.mean, X.mean(1)),
        (heads.largest, X.max(1)),
        (heads.gathered, X),
    ],
)
def test_both_have_what_is_over_all_heads(function, expected):
    halves = np.stack([X[:, :2], X[:, 2:]])
    for found in (*on_both(function, halves), function(WHOLE, jax.device_put(X))):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_each_takes_its_own():
    def own(spec, every):
        return heads.own(spec, every, axis=1), heads.first(spec)

    run = jax.vmap(lambda every: own(OWN, every), axis_name="tensor")
    taken, first = run(jax.device_put(np.stack([X, X])))
    np.testing.assert_array_equal(taken, np.stack([X[:, :2], X[:, 2:]]))
    assert first.tolist() == [0, 2]
    whole = jax.device_put(X)
    assert heads.own(WHOLE, whole, axis=1) is whole
    assert (heads.first(WHOLE), heads.count(WHOLE, 4), heads.count(OWN, 2)) == (0, 4, 4)
