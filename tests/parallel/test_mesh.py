"""Meshes: what is named, what is there, and how a model's heads fit."""

import jax
import pytest
from tiny import tiny_config

from kvjax import parallel
from models import llama
from models.llama import LlamaDecoder


def test_axes_are_named():
    assert parallel.parse("tensor=4") == (1, 4)
    assert parallel.parse("data=2, tensor=3,seq=1") == (2, 3)
    mesh = parallel.make("data=2,tensor=2")
    assert dict(mesh.shape) == {"data": 2, "tensor": 2, "copies": 1}
    assert mesh.devices.ravel().tolist() == jax.devices()[:4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mesh='' must name axes .*; '' is neither"),
        ("4", "mesh='4' must name axes and their devices, as tensor=4 or data=2,"),
        ("heads=2", "'heads=2' is neither"),
        ("tensor=two", "'tensor=two' is neither"),
        ("tensor=0", "'tensor=0' is not at least 1"),
        ("data=2,data=2", "'data=2' is there twice"),
        ("tensor=2,seq=4", "seq=4 would split a cache by its tokens"),
        ("data=3,tensor=5", "'data=3,tensor=5' needs 15 devices, and there are 4 of"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parallel.make(text)


def test_heads_divide_devices_or_devices_heads():
    """Where a model has fewer KV heads, groups of devices hold the same ones."""
    mesh = parallel.imagined("data=2,tensor=8")
    for heads, expected in ((8, (8, 1)), (16, (8, 1)), (2, (2, 4)), (1, (1, 8))):
        shape = parallel.fitted(mesh, heads).shape
        assert (shape["tensor"], shape["copies"]) == expected
    message = "tensor=8 does not share out 3 KV heads: give a divisor of them, or a"
    with pytest.raises(ValueError, match=message):
        parallel.fitted(mesh, 3)
    other = jax.make_mesh((2, 2), ("x", "y"))
    with pytest.raises(
        ValueError, match=r"axes \('x', 'y'\), not .* by kvjax.parallel"
    ):
        parallel.fitted(other, 2)


def test_a_matrix_that_devices_do_not_divide_is_refused():
    decoder = LlamaDecoder(tiny_config(mlp_width=50))
    with pytest.raises(ValueError, match="tensor=4 does not divide the 50 numbers of"):
        llama.over(decoder, parallel.imagined("tensor=4"))


def test_exchanges_are_read_from_a_program():
    """Of every kind, in tuples and begun asynchronously."""
    text = """
      %x.1 = f32[2,1,32]{2,1,0} all-reduce(%a), channel_id=1
      ROOT %y = (f32[4]{0}, pred[3]{0}) all-reduce(%b, %c), channel_id=2
      %z = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%d), channel_id=3
      %w = f32[2]{0} add(%x, %all-reduce.3)
    """
    found = parallel.compiled(text)
    assert found == [("all-reduce", 256), ("all-reduce", 19), ("all-gather", 20)]
    assert parallel.Exchange("all-reduce", 400, 4).sent == 600
    assert parallel.Exchange("all-gather", 400, 4).sent == 300
