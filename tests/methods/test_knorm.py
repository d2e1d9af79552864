"""The shortest keys stay, whoever asks, and all that is generated."""

import drive
import oracles
import pytest

from kvjax.methods.knorm import knorm


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_equals_float64_loops(heads):
    """Prompts below, at and above the budget, in one batch."""
    stream = drive.make_stream((1, 8, 9, 30), 3, heads=heads)
    run = drive.run(knorm(budget=8), drive.make_spec(stream), stream)
    drive.assert_matches(run, stream, oracles.knorm, budget=8)


def test_half_precision_is_consistent():
    stream = drive.make_stream((30, 5), 3, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    run = drive.run(knorm(budget=8), spec, stream)
    drive.assert_consistent(run, stream, "bfloat16")


@pytest.mark.parametrize("budget", [0, -3])
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(budget):
    with pytest.raises(ValueError, match=f"budget={budget} must be at least 1"):
        knorm(budget=budget)
