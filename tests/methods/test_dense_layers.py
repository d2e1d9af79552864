"""The first layers attend in full, the others by the wrapped method."""

import drive
import oracles
import pytest

from kvjax.methods.dense_layers import dense_layers
from kvjax.methods.full import full
from kvjax.methods.tova import tova


@pytest.mark.parametrize("layer", [0, 1, 2, 5])
def test_layers_go_to_the_method_in_charge(layer):
    stream = drive.make_stream((20, 3), 6)
    method = dense_layers(tova(budget=5), full(), first=2)
    spec = drive.make_spec(stream, layer=layer)
    run = drive.run(method, spec, stream)
    inner = full() if layer < 2 else tova(budget=5)
    assert method.traffic(spec, 20) == inner.traffic(spec, 20)
    if layer < 2:
        drive.assert_matches(run, stream, oracles.full)
    else:
        drive.assert_matches(run, stream, oracles.tova, budget=5)


def test_two_layers_are_dense_by_default():
    stream = drive.make_stream((20,), 1)
    method = dense_layers(tova(budget=5), full())
    read = [method.traffic(drive.make_spec(stream, layer=i), 20).kv for i in range(4)]
    assert read[0] == read[1] > read[2] == read[3]


@pytest.mark.usefixtures("unchecked_shapes")
def test_error_names_the_value():
    with pytest.raises(ValueError, match="first=-1 must be at least 0"):
        dense_layers(full(), full(), first=-1)


@pytest.mark.usefixtures("unchecked_shapes")
def test_error_names_both_rows():
    with pytest.raises(ValueError, match=r"method.rows=1 must equal dense.rows=2"):
        dense_layers(full(), full()._replace(rows=2))
