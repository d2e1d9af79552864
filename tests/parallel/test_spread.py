"""States over a mesh: whose axes are found by tracing, and what is refused.

That every method gives the same over a mesh is in the contract (`test_contract.py`).
"""

from typing import NamedTuple

import drive
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import kvjax
from kvjax import parallel, registry
from kvjax.interface import Share
from kvjax.parallel import axes
from kvjax.testing import contract, subject

STREAM = drive.make_stream((1, 5, 9, 4), 2)
SPEC = drive.make_spec(STREAM)
MESH = parallel.imagined("data=2,tensor=2")


def traced(method, spec=SPEC):
    """Layouts of a method's states, before and after the prompt ended."""
    over, found = parallel.over(method, MESH), []

    def run():
        begun = over.init(spec)
        found.extend([begun, over.finish(begun)])

    jax.eval_shape(run)
    fields = [one.state._fields[1:] for one in found]
    pairs = zip(fields, found, strict=True)
    return [dict(zip(names, one.layout.axes, strict=True)) for names, one in pairs]


def test_rows_and_heads_are_found():
    begun, ended = traced(kvjax.quest(budget=8, page_size=4))
    pages = P("data", "tensor", None, None, None)
    assert begun["pages"] == ended["pages"] == pages
    assert begun["page_min"] == P("data", "tensor", None, None)
    assert begun["length"] == P("data")


def test_rows_that_do_not_divide_are_on_all_devices():
    spec = drive.make_spec(drive.make_stream((1, 5, 9), 2))
    own = parallel.share_of(kvjax.full(), MESH, spec)
    assert own.share == Share("tensor", heads=2, rows=1)
    assert (own.batch, own.num_kv_heads, own.num_q_heads) == (3, 1, 2)
    begun, _ = traced(kvjax.full(), spec)
    assert begun["k"] == P(None, "tensor", None, None)


def test_heads_that_share_memory_stay_together():
    method = kvjax.head_budgets(kvjax.snapkv(budget=8, window=4, kernel=3))
    assert parallel.share_of(method, MESH, SPEC).share == Share("tensor", 1, 2)
    # And inside of others that say nothing of it.
    inner = kvjax.parse("dense_layers:first=0+head_budgets+snapkv:budget=40")
    assert parallel.share_of(inner, MESH, SPEC).num_kv_heads == SPEC.num_kv_heads


class Odd(NamedTuple):
    sums: jax.Array


def test_an_axis_that_is_no_multiple_of_heads_is_named():
    def init(spec):
        return Odd(jnp.zeros((spec.batch, spec.num_kv_heads + 1)))

    own = parallel.share_of(kvjax.full(), MESH, SPEC)
    message = r"state.sums is \(2, 2\), and with twice the heads \(2, 3\): no axis"
    with pytest.raises(ValueError, match=message):
        axes.of_init(MESH, init, own)


def test_what_is_of_one_device_is_refused():
    method = kvjax.offload(kvjax.quest(budget=8, page_size=4), memory="device")
    with pytest.raises(ValueError, match="has a cache beyond the device's memory, and"):
        parallel.share_of(method, MESH, SPEC)


def test_a_method_over_no_mesh_is_itself():
    method = kvjax.full()
    assert parallel.over(method, None) is method
    over = parallel.over(method, MESH)
    assert parallel.over(method, MESH) is over
    assert over.spec_text() == "full"
    with pytest.raises(ValueError, match="weights of a method are not split"):
        over.init(SPEC, weights=jnp.ones(2))


# What the methods' small options of the contract leave out, and is one for all heads.
OPTIONS = {
    "cascade": {"homogeneous_heads": True, "head_reduction": "median"},
    "hip": {"budget": 16, "num_sinks": 4, "search": "stages"}
    | {"chunks": "8", "kept": "16", "strides": "2/1"},
    "squeezed": {"clusters": 0.5, "sparsity": 0.4, "per": "query"},
    "token_select": {"threshold": 0.9},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_one_for_all_heads_is_that_of_one_device(name):
    given = subject.Subject(registry.get(name), **OPTIONS[name])
    assert contract.keeps(given, "devices_share_rows_and_heads")
