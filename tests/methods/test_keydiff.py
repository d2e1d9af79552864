"""The keys least like the others stay; how long they are does not matter."""

import drive
import numpy as np
import oracles
import pytest

from kvjax.methods.keydiff import keydiff


def kept(stream):
    run = drive.run(keydiff(budget=8), drive.make_spec(stream), stream)
    return run, run.diagnostics.attended


def test_equals_float64_loops_whatever_the_lengths_of_keys():
    """Prompts below, at and above the budget; the anchor is of directions."""
    stream = drive.make_stream((1, 8, 9, 30), 3)
    run, before = kept(stream)
    drive.assert_matches(run, stream, oracles.keydiff, budget=8)
    rng = np.random.default_rng(0)
    stream.k[...] *= rng.uniform(0.2, 5.0, (*stream.k.shape[:3], 1))
    run, after = kept(stream)
    np.testing.assert_array_equal(after, before)
    drive.assert_matches(run, stream, oracles.keydiff, budget=8)


def test_one_key_among_equals_stays():
    """All keys are one direction but for one token's, which is no longer than they."""
    stream = drive.make_stream((30,), 1)
    stream.k[...] = 0
    stream.k[..., 3] = 1.0  # turns least
    stream.k[:, :, 17] = 0
    stream.k[:, :, 17, 0] = 0.5
    _, attended = kept(stream)
    assert (attended[0, 0] == 17).any(-1).all()


@pytest.mark.parametrize("budget", [0, -3])
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(budget):
    with pytest.raises(ValueError, match=f"budget={budget} must be at least 1"):
        keydiff(budget=budget)
