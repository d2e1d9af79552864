"""SubGen's centres cover a prompt's keys; its stream is that of float64 loops."""

import dataclasses
import inspect

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax import accounting
from kvjax.methods.subgen import bound, stream
from kvjax.methods.subgen.method import subgen
from kvjax.methods.subgen.options import Options
from kvjax.stores import buffers

STREAM = {
    "window": 5,
    "num_sinks": 2,
    "per_cluster": 2,
    "samples": 4,
    "clusters": 5,
    "delta": None,
    "seed": 3,
    "norm_cap": True,
}
# With sinks, window, and two keys a token: what these options need.
BUDGET = 16
DEFAULTS = {key: p.default for key, p in inspect.signature(subgen).parameters.items()}


def check_stream(stream, **options):
    options = STREAM | options
    method = subgen(mode="stream", budget=BUDGET, **options)
    spec = drive.make_spec(stream, layer=6)
    run = drive.run(method, spec, stream)
    drive.assert_matches(run, stream, oracles.subgen_stream, layer=6, **options)
    return run


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 2), {}),
        ((2, 1), {"delta": 2.5, "norm_cap": False}),
        ((6, 3), {"delta": 1.0, "num_sinks": 0, "per_cluster": 1, "lam": 0.5}),
    ],
    ids=["greedy", "online", "crowded"],
)
def test_a_stream_equals_float64_loops(heads, options):
    """Prompts below and above what is exact; the window's ring wraps twice."""
    stream = drive.make_stream((1, 6, 8, 30), 12, heads=heads)
    stream.q[...] /= 2
    check_stream(stream, **options)


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 2), {"budget": 12, "window": 4, "num_sinks": 2}),
        ((2, 2), {"budget": 9, "window": 1, "num_sinks": 0}),
        ((4, 1), {"budget": 10, "window": 6, "num_sinks": 3}),
    ],
)
def test_centres_equal_float64_loops(heads, options):
    """Prompts below, at and above the budget, in one batch."""
    stream = drive.make_stream((1, 5, 9, 12, 40), 3, heads=heads)
    run = drive.run(subgen(**options), drive.make_spec(stream), stream)
    drive.assert_matches(run, stream, oracles.subgen_centres, **options)


def test_copies_of_a_query_have_one_answer():
    """The query heads of a group share what is kept, and what was drawn."""
    made = drive.make_stream((30,), 4, heads=(4, 2))
    made.q[:, 1::2] = made.q[:, ::2]
    for options in ({"budget": 8}, {"mode": "stream", "budget": BUDGET, **STREAM}):
        out = drive.run(subgen(**options), drive.make_spec(made), made).out
        np.testing.assert_allclose(out[:, :, 1::2], out[:, :, ::2], rtol=1e-6)
        assert np.abs(out[:, :, 2] - out[:, :, 0]).max() > 0.1


def test_what_is_not_given_is_half_of_what_is_left():
    """The window of the budget; samples of the rest; clusters all that is left then."""
    options = Options(**DEFAULTS | {"mode": "stream", "budget": 101, "num_sinks": 4})
    sizes = options.split(drive.make_spec(drive.make_stream((200,), 1)))
    assert sizes == (4, 48, 50, 1, 24)
    three = dataclasses.replace(options, per_cluster=3, samples=20)
    assert (three.newest, three.drawn, three.most) == (48, 20, 19)
    assert Options(**DEFAULTS).newest == 512


def test_a_streams_state_does_not_grow_with_the_text():
    """Neither with the prompt nor with what is generated; while it is read, it does."""
    made = drive.make_stream((9,), 5)
    method = subgen(mode="stream", budget=BUDGET, **STREAM)
    small, large = (
        drive.make_spec(made, capacity=capacity, max_new_tokens=new)
        for capacity, new in ((64, 5), (8192, 4000))
    )
    held = accounting.state_bytes(method, small)
    assert accounting.state_bytes(method, large) == held
    assert accounting.prompt_bytes(method, large) > 100 * held
    kept = accounting.state_bytes(subgen(budget=BUDGET), large)
    assert kept > accounting.state_bytes(subgen(budget=BUDGET), small)


def test_sampled_values_are_as_large_as_values_are_short(monkeypatch):
    """Beyond float16 for what it holds well, which has them in float32."""
    short = jnp.full((1, 1, 1, 4), 1e-5, jnp.float16)
    _, u = stream.paired(short, short)
    assert u.dtype == jnp.float32
    np.testing.assert_allclose(u, 25_000, rtol=0.01)
    made = drive.make_stream((30,), 1)
    method = subgen(mode="stream", budget=BUDGET, **STREAM)
    monkeypatch.setattr(buffers, "fill_value", 0.0)  # float16 has none so large
    for dtype, wide in (("float16", "float32"), ("bfloat16", "bfloat16")):
        spec = drive.make_spec(made, dtype=dtype)
        state = jax.eval_shape(lambda spec=spec: method.finish(method.init(spec)))
        assert state.k.dtype == state.folded.sample_k.dtype == dtype
        assert state.folded.value_k.dtype == state.folded.value_u.dtype == wide


def test_half_precision_is_near_the_loops():
    """Sinks and window as they are; behind them whatever is drawn by rounded keys."""
    made = drive.make_stream((9, 40), 6, dtype="bfloat16")
    made.q[...] /= 2
    method = subgen(mode="stream", budget=BUDGET, **STREAM | {"lam": 0.0})
    run = drive.run(method, drive.make_spec(made, dtype="bfloat16"), made)
    drive.assert_consistent(run, made, "bfloat16")
    whole = subgen(mode="stream", budget=BUDGET, **STREAM)
    estimated = drive.run(whole, drive.make_spec(made, dtype="bfloat16"), made)
    np.testing.assert_allclose(
        estimated.diagnostics.lse, run.diagnostics.lse, atol=1e-5
    )
    assert np.isfinite(estimated.out).all()
    assert np.abs(estimated.out - run.out).max() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "budget=1 must be at least 2"),
        ({"num_sinks": -1}, r"num_sinks=-1 must be in \[0, 1023\), for budget=1024"),
        ({"budget": 8, "num_sinks": 7}, r"num_sinks=7 must be in \[0, 7\)"),
        ({"window": 0}, r"window=0 must be in \[1, 1023\], what budget=1024 leaves"),
        ({"budget": 8, "window": 8}, r"window=8 must be in \[1, 7\], .*raise the bud"),
        (
            {"budget": 8, "window": 5, "num_sinks": 2, "mode": "stream"},
            r"window=5 must be in \[1, 4\], what budget=8 leaves after num_sinks=2",
        ),
        ({"per_cluster": 0}, "per_cluster=0 must be at least 1"),
        ({"mode": "stream", "samples": 0}, "samples=0 must be at least 1"),
        ({"mode": "stream", "clusters": -2}, "clusters=-2 must be at least 1"),
        (
            {"budget": 8, "mode": "stream", "samples": 3, "clusters": 3},
            "budget=8 leaves 4 tokens beside sinks and window, and samples=3 and 3 "
            "clusters of per_cluster=1 keys, two a token, need 4.5; raise the budget",
        ),
        (
            {"budget": 8, "mode": "stream", "per_cluster": 5},
            "leaves 4 tokens .* samples=2 and 1 clusters of per_cluster=5 .* need 4.5",
        ),
        ({"mode": "stream", "delta": 0.0}, "delta=0.0 must be positive and finite"),
        ({"mode": "stream", "delta": float("inf")}, "delta=inf must be positive and"),
        ({"lam": 1.5}, r"lam=1.5 must be in \[0, 1\]"),
        ({"lam": float("nan")}, r"lam=nan must be in \[0, 1\]"),
        ({"mode": "tree"}, "mode='tree' must be one of centres, stream"),
        ({"samples": 3}, "samples=3 is of mode='stream', not of mode='centres'"),
        ({"clusters": 3}, "clusters=3 is of mode='stream', not of mode='centres'"),
        ({"delta": 3.0}, "delta=3.0 is of mode='stream', not of mode='centres'"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 4294967296\)"),
        ({"seed": 2**32}, r"seed=4294967296 must be in \[0, 4294967296\)"),
        ({"seed": 1.5}, "seed=1.5 must be of type int"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_values_and_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        subgen(**options)


# --- the bound


def test_the_theorems_samples_are_no_fewer_than_the_tokens_where_it_is_empty():
    """4,096 tokens: sublinear while 2 delta |x| is below log n, here 8.3 nats."""
    wanted = bound.log_samples(jnp.asarray([0.5, 2.0, 8.0]), 4096, error=1.0)
    expected = np.log(np.log(4096)) + np.array([1, 4, 16])
    np.testing.assert_allclose(wanted, expected, rtol=1e-6)
    assert (np.asarray(wanted) < np.log(4096)).tolist() == [True, True, False]
    near = bound.log_samples(jnp.asarray(2.0), 4096, error=0.1)
    np.testing.assert_allclose(near - wanted[1], 2 * np.log(10), rtol=1e-5)


@pytest.mark.parametrize(("tokens", "error"), [(2, 1.0), (100, 0.0)])
def test_no_bound_for_no_text_and_no_error(tokens, error):
    with pytest.raises(ValueError, match=f"tokens={tokens} must .* error={error} posi"):
        bound.log_samples(jnp.zeros(()), tokens, error)
