"""Dense entmax: of the model's alpha, or of a given one on any model."""

import drive
import oracles
import pytest

from kvjax.methods.entmax_full import entmax_full


def test_alpha_is_the_one_given_or_the_models():
    stream = drive.make_stream((9, 4), 3)
    softmax = drive.make_spec(stream)
    run = drive.run(entmax_full(alpha=2.0), softmax, stream)
    drive.assert_matches(run, stream, oracles.full, alpha=2.0)
    assert entmax_full().init(drive.make_spec(stream, alpha=1.5)).spec.alpha == 1.5
    with pytest.raises(
        ValueError, match=r"alpha=None takes the model's .* 1.0, softmax"
    ):
        entmax_full().init(softmax)
    with pytest.raises(ValueError, match=r"alpha=1.0 must be finite and above 1"):
        entmax_full(alpha=1.0)
