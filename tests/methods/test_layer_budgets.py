"""Layers have budgets of their own that add up: a pyramid, or any list."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kvjax
from kvjax.interface import with_layer
from kvjax.methods.full import full
from kvjax.methods.layer_budgets import layer_budgets, pyramid
from kvjax.methods.snapkv import snapkv
from kvjax.methods.tova import tova
from kvjax.stores.buffers import kv_bytes

WHOLE = 1 << 20  # a capacity that bounds nothing


@pytest.mark.parametrize("layers", [1, 2, 7, 30, 32])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("beta", [1.0, 2.0, 20.0])
def test_a_pyramid_falls_linearly_and_keeps_the_total(layers, page, beta):
    certain = 32 if page == 1 else 0
    budgets = pyramid(256, layers, beta=beta, certain=certain, page=page)
    assert sum(budgets) == 256 * layers
    assert all(b % page == 0 and b >= certain + page for b in budgets)
    shared = 256 - certain
    upper = max(shared / beta, page)
    line = np.linspace(2 * shared - upper, upper, layers) if layers > 1 else [shared]
    assert np.abs(np.subtract(budgets, certain) - line).max() <= page


@pytest.mark.parametrize("most", [150, 256, 300, 10_000])
def test_no_layer_gets_more_than_the_capacity(most):
    """Unless all do: what is over goes to the upper layers."""
    budgets = pyramid(256, 8, beta=20.0, certain=8, most=most)
    assert sum(budgets) == 256 * 8
    assert max(budgets) <= max(most, 256)
    if most <= 256:
        assert set(budgets) == {256}


def test_defaults_of_the_official_code():
    """Budget 128, a window of 8, 32 layers: from 234 + 8 down to 6 + 8."""
    method = layer_budgets(kvjax.parse("snapkv:budget=128,window=8"))
    stream = drive.make_stream((9,), 1)
    kinds = []
    for layer in range(32):
        spec = drive.make_spec(stream, 4096, layer=layer, num_layers=32)
        kinds.append(jax.eval_shape(method.init, spec).kind.number)
    assert (kinds[0], kinds[-1]) == (242, 14)
    assert sum(kinds) == 128 * 32


def test_each_layer_is_its_method():
    """The list, and what a step reads; the first of four is the widest."""
    stream = drive.make_stream((30, 4), 3)
    options = {"window": 3, "kernel": 3, "pooling": "max", "group_reduce": "max"}
    inner = ",".join(f"{key}={value}" for key, value in options.items())
    spec = f"layer_budgets:beta=4+snapkv:budget=9,{inner}"
    method, total = kvjax.parse(spec), 0
    for layer, budget in [(0, 13), (3, 5)]:
        cache = drive.make_spec(stream, layer=layer, num_layers=4)
        run = drive.run(method, cache, stream)
        drive.assert_matches(run, stream, oracles.snapkv, budget=budget, **options)
    for layer in range(4):
        cache = drive.make_spec(stream, layer=layer, num_layers=4)
        total += method.traffic(cache, 30).kv
    alone = kvjax.parse(spec.partition("+")[2])
    assert total == 4 * alone.traffic(cache, 30).kv
    assert repr(method) == f"Method({spec!r})"


def test_a_list_is_taken_as_it_is():
    stream = drive.make_stream((20,), 4)
    wide, narrow = tova(budget=9), tova(budget=5)
    method = layer_budgets([wide, narrow, full(), narrow])
    assert not method.rewind
    states = []
    for layer, budget in enumerate((9, 5, None, 5)):
        spec = drive.make_spec(stream, layer=layer, num_layers=4)
        if layer in (1, 2):
            run = drive.run(method, spec, stream)
            options = {} if budget is None else {"budget": budget}
            oracle = oracles.full if budget is None else oracles.tova
            drive.assert_matches(run, stream, oracle, **options)
        states.append(jax.tree.structure(with_layer(method.init(spec), 0)))
    # Layers of one method share their programs, and only they do.
    assert states[1] == states[3]
    assert len(set(states)) == 3


def test_budgets_can_be_spelled_out():
    method = kvjax.parse("layer_budgets:budgets=7/5/4+tova:budget=64")
    stream = drive.make_stream((20,), 4)
    read = []
    for layer in range(3):
        spec = drive.make_spec(stream, layer=layer, num_layers=3)
        read.append(method.traffic(spec, 20).kv)
    assert read == [kv_bytes(spec, budget) for budget in (7, 5, 4)]
    run = drive.run(method, spec, stream)
    drive.assert_matches(run, stream, oracles.tova, budget=4)


def test_tokens_are_taken_back_by_the_layers_method():
    stream = drive.make_stream((6,), 2)
    method = layer_budgets([full(), full()])
    spec = drive.make_spec(stream, layer=1, num_layers=2)
    state, _ = drive.prefill(method, spec, stream)
    taken = method.rewind(state, jnp.array([2], jnp.int32), 2)
    assert int(taken.state.length[0]) == 4


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layer_budgets(snapkv()), "by a call, which hides its budget: make it"),
        (
            lambda: kvjax.parse("layer_budgets+full"),
            ": full has no budget .*: wrap a me",
        ),
        (lambda: kvjax.parse("layer_budgets:beta=0.5+snapkv"), "beta=0.5 must be fini"),
        (lambda: kvjax.parse("layer_budgets:beta=nan+snapkv"), "beta=nan must be fini"),
        (
            lambda: kvjax.parse("layer_budgets:budgets=a+snapkv"),
            "budgets='a' must be w",
        ),
        (
            lambda: kvjax.parse("layer_budgets:budgets=40/8+snapkv:window=16"),
            "smallest budget cannot have 8: snapkv: budget=8 must exceed window=16",
        ),
        (
            lambda: kvjax.parse("layer_budgets+subgen").init(
                drive.make_spec(drive.make_stream((9,), 1), num_layers=2)
            ),
            "subgen has beside its window .* these follow the budget: give it window=",
        ),
        (lambda: layer_budgets([]), r"\[\] must be a method, or a list of methods"),
        (lambda: layer_budgets(["snapkv"]), "'snapkv'] must be a method, or a list o"),
        (lambda: layer_budgets([full()], budgets="3"), "budgets='3' are those of one"),
        (
            lambda: layer_budgets([full(), full()._replace(rows=2)]),
            r"layers of \[1, 2\] rows a step cannot be in one model",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "layer", "layers", "message"),
    [
        ("layer_budgets+snapkv", 3, 0, "num_layers=0 with layer=3: .*layer_specs"),
        ("layer_budgets:budgets=99/98+snapkv", 1, 3, "2 layers were given .* has 3:"),
        (None, 0, 4, "2 layers were given and the model has 4: give one for each"),
        (None, 2, 0, "2 layers were given and the model has a layer 2: give one"),
    ],
)
def test_every_layer_needs_one(method, layer, layers, message):
    made = layer_budgets([full(), full()]) if method is None else kvjax.parse(method)
    stream = drive.make_stream((4,), 1)
    spec = drive.make_spec(stream, layer=layer, num_layers=layers)
    for call in (made.init, lambda spec: made.traffic(spec, 4)):
        with pytest.raises(ValueError, match=message):
            call(spec)
