"""Random eviction: sinks and the newest stay, the rest by draws that nothing sways."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.interface import CacheSpec
from kvjax.methods.random import random
from kvjax.rope import Rope

OPTIONS = {"budget": 12, "num_sinks": 2, "window": 3, "seed": 5}


def test_equals_a_loop_over_integers():
    """Prompts below, at and above the budget, in one batch, of the layer's number."""
    stream = drive.make_stream((1, 4, 12, 13, 40), 2, heads=(6, 3))
    spec = drive.make_spec(stream, layer=3)
    run = drive.run(random(**OPTIONS), spec, stream)
    drive.assert_matches(run, stream, oracles.random, **OPTIONS, layer=3)


def draws(lengths, *, layer=0, capacity=600, heads=4, **options):
    """The importance of tokens that were never written: nothing else is looked at."""
    spec = CacheSpec(
        len(lengths), heads, heads, 2, capacity, "float32", Rope(2), layer=layer
    )
    method = random(**OPTIONS | options)
    state = method.init(spec)
    store = state.store._replace(length=jnp.asarray(lengths, jnp.int32))
    return np.asarray(jax.jit(method.importance)(state._replace(store=store)))


def test_a_draw_is_a_matter_of_seed_layer_head_length_and_position_alone():
    first = draws([600, 500])
    np.testing.assert_array_equal(draws([500, 500])[1], first[1])
    # Capacity and the other heads are not in it, nor is the place in the batch.
    np.testing.assert_array_equal(
        draws([500], capacity=700, heads=2)[0, :, :600], (first[1, :2])
    )
    others = [draws([600, 500], seed=6), draws([600, 500], layer=1)]
    rows = [row for drawn in (first, *others) for row in drawn.reshape(8, -1)]
    for a in range(len(rows)):
        for b in range(a):
            free = np.isfinite(rows[a]) & np.isfinite(rows[b])
            together = np.corrcoef(rows[a][free], rows[b][free])[0, 1]
            assert abs(together) < 5 / free.sum() ** 0.5, (a, b)


def test_every_token_has_the_same_chance():
    drawn = draws(list(range(300, 340)), heads=8)[..., 2:290]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    kept = drawn > np.quantile(drawn, 0.75, axis=-1, keepdims=True)
    chances = kept.mean((0, 1))
    assert abs(chances.mean() - 0.25) < 1e-3
    # 320 draws of each position: five deviations.
    assert np.abs(chances - 0.25).max() < 5 * (0.25 * 0.75 / 320) ** 0.5


def test_sinks_and_the_newest_are_certain_and_padding_is_nothing():
    (row,) = draws([20], num_sinks=3, window=4)
    assert np.isposinf(row[:, [0, 1, 2, 16, 17, 18, 19]]).all()
    assert np.isfinite(row[:, 3:16]).all()
    assert np.isneginf(row[:, 20:]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 36}, "budget=36 must exceed num_sinks=4 and window=32 together"),
        ({"num_sinks": -1}, "num_sinks=-1 must be at least 0 and window=32 at least 1"),
        ({"window": 0}, "num_sinks=4 must be at least 0 and window=0 at least 1"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 2147483647\]"),
        ({"seed": 2**31}, r"seed=2147483648 must be in \[0, 2147483647\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_values(options, message):
    with pytest.raises(ValueError, match=message):
        random(**options)
