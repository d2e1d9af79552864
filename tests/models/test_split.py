"""Weights over a mesh: the same bits, in parts, none of which was ever whole."""

import jax
import numpy as np
import pytest
from tiny import byte_tokenizer, tiny_model

import models
from kvjax import parallel
from models.llama import split, weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_model(num_layers=1, tied_embeddings=False, head_dim=16, mlp_width=128)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    models.save_pretrained(model._replace(tokenizer=tokenizer), folder)
    return folder


def on_device(device):
    """Bytes of all arrays on a device, but those of no other."""
    return sum(
        shard.data.nbytes
        for array in jax.live_arrays()
        if len(array.devices()) > 1
        for shard in array.addressable_shards
        if shard.device == device
    )


def test_each_device_reads_its_part(checkpoint, monkeypatch):
    """Two KV heads over four devices: each has one, and a quarter of the rest."""
    reference, last = models.load(checkpoint), jax.devices()[3]
    before, held, read = on_device(last), [], weights._raw

    def watched(*given):
        held.append(on_device(last) - before)
        return read(*given)

    monkeypatch.setattr(weights, "_raw", watched)
    model = models.load(checkpoint, mesh="tensor=4")
    mesh = parallel.of(model.decoder)
    assert mesh is not None
    shapes = split.of_device(mesh, model.decoder.param_shapes())
    for whole, array, own in zip(
        *map(jax.tree.leaves, (reference.params, model.params, shapes)), strict=True
    ):
        np.testing.assert_array_equal(whole, array)
        assert {x.data.shape for x in array.addressable_shards} == {own.shape}
    # Nothing but the parts of what was read is on a device when more is.
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert held[0] == 0
    assert held == sorted(held)
    assert held[-1] < total
    assert on_device(last) - before == total
    assert models.footprint(model.decoder).held == total
    layer = model.params["layers"][0]
    assert layer["attention"]["k"]["kernel"].addressable_shards[0].data.shape == (
        32,
        16,
    )
    assert layer["mlp"]["down"]["kernel"].addressable_shards[0].data.shape == (32, 32)


def test_packed_weights_are_in_parts_too(checkpoint):
    one = models.load(checkpoint, weights="int8")
    two = models.load(checkpoint, weights="int8", mesh="tensor=2")
    for whole, array in zip(
        *map(jax.tree.leaves, (one.params, two.params)), strict=True
    ):
        np.testing.assert_array_equal(whole, array)
    message = "tensor=4 does not divide the 2 groups of 32 inputs of .*o_proj.weight"
    with pytest.raises(ValueError, match=message):
        models.load(checkpoint, weights="int4", mesh="tensor=4")


def test_two_places_are_refused(checkpoint):
    with pytest.raises(ValueError, match="mesh='tensor=2' are two places: give one"):
        models.load(checkpoint, device=jax.devices()[1], mesh="tensor=2")
