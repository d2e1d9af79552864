"""Expected attention: what Gaussian queries like the prompt's would attend to."""

import drive
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.interface import CacheSpec
from kvjax.methods import expected_attention as module
from kvjax.methods.expected_attention import expected_attention
from kvjax.rope import Rope

DEFAULT = {"budget": 10, "num_sinks": 2, "future": 7, "epsilon": 0.01}


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 1), {}),
        ((2, 2), {"num_sinks": 0, "epsilon": 0.0, "future": 1}),
    ],
)
def test_equals_float64_loops(heads, options):
    """Prompts of sinks alone, below, at and above the budget, in one batch."""
    stream = drive.make_stream((1, 2, 3, 10, 11, 30), 2, heads=heads, sharpness=1.0)
    options = DEFAULT | options
    run = drive.run(expected_attention(**options), drive.make_spec(stream), stream)
    drive.assert_matches(run, stream, oracles.expected_attention, **options)


def test_statistics_are_those_of_all_queries_behind_the_sinks():
    """Of chunks with nothing in them too, and of rows shorter than the sinks."""
    stream = drive.make_stream((30, 3, 9), 1)
    method = expected_attention(**DEFAULT | {"num_sinks": 4})
    chunks = [(2, 0, 9), (0, 3, 0), (7, 0, 0), (21, 0, 0)]
    state, _ = drive.prefill(method, drive.make_spec(stream), stream, chunks)
    for row, count in enumerate((26, 0, 5)):
        queries = stream.q[row, :, 4 : 4 + count].astype(np.float64)
        if not count:
            assert not state.mean[row].any()
            assert not state.spread[row].any()
            continue
        for head in range(4):
            spread = count * np.cov(queries[head].T, bias=True)
            np.testing.assert_allclose(
                state.mean[row, head], queries[head].mean(0), atol=2e-6
            )
            np.testing.assert_allclose(state.spread[row, head], spread, atol=2e-4)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(8),
        Rope(8, kind="dynamic", factor=4.0, original_context=8),
        Rope(8, kind="yarn", factor=4.0, original_context=16),
    ],
    ids=lambda rope: rope.kind,
)
def test_the_mean_rotation_is_the_mean_of_what_it_does(rope):
    """Each position is turned as it will be when it is the newest."""
    spec = CacheSpec(2, 2, 1, 8, 32, "float32", rope)
    length, future = jnp.array([3, 20], jnp.int32), 5
    turn = module.mean_rotation(spec, length, future)
    x = np.random.default_rng(0).standard_normal((2, 2, 1, 8)).astype(np.float32)
    ahead = [length + i for i in range(future)]
    turned = [rope(jnp.asarray(x), p[:, None], p + 1) for p in ahead]
    expected = np.mean(turned, axis=0)[:, :, 0]
    found = np.einsum("bij,bhj->bhi", turn, x[:, :, 0])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_logits_are_those_of_the_mean_weight_of_random_queries():
    """log E[exp(s q . k)]: by a million draws, to the deviation of their mean."""
    rng = np.random.default_rng(0)
    spec = CacheSpec(1, 1, 1, 4, 3, "float32", Rope(4), sm_scale=0.6)
    mean, root = rng.standard_normal(4), 0.5 * rng.standard_normal((4, 4))
    keys = rng.standard_normal((3, 4)).astype(np.float32)
    store = expected_attention().init(spec).store
    store = store._replace(k=jnp.asarray(keys[None, None]))
    given = (mean[None, None, None], (root @ root.T)[None, None, None])
    given = (jnp.asarray(x, jnp.float32) for x in given)
    found = np.exp(module.expected_logits(store, *given))[0, 0, 0]
    queries = mean + rng.standard_normal((1_000_000, 4)) @ root.T
    drawn = np.exp(0.6 * queries @ keys.T.astype(np.float64))
    assert (np.abs(found - drawn.mean(0)) < 5 * drawn.std(0) / 1000).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 4}, r"num_sinks=4 must be in \[0, budget=4\)"),
        ({"num_sinks": -1}, r"num_sinks=-1 must be in \[0, budget=1024\)"),
        ({"future": 0}, "future=0 must be at least 1 position"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be at least 0 and finite"),
        ({"epsilon": float("nan")}, "epsilon=nan must be at least 0 and finite"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_values(options, message):
    with pytest.raises(ValueError, match=message):
        expected_attention(**options)


def test_defaults_are_those_of_the_official_benchmarks():
    stream = drive.make_stream((40,), 1, heads=(2, 1), sharpness=1.0)
    method = expected_attention(budget=10)
    run = drive.run(method, drive.make_spec(stream), stream)
    options = {"budget": 10, "num_sinks": 4, "future": 512, "epsilon": 0.01}
    drive.assert_matches(run, stream, oracles.expected_attention, **options)
