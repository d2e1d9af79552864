"""EntmaxKV reads the newest page and those that may hold the support, and proves it."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax import accounting
from kvjax.evaluation.claims.measure import steps as measure_steps
from kvjax.interface import Traffic
from kvjax.methods.entmaxkv.method import entmaxkv
from kvjax.stores import page_statistics

PROMPTS, STEPS = (1, 27, 28), 6
TOPK = {"budget": 12, "page_size": 4}
GAUSSIAN = {"budget": None, "page_size": 4, "selector": "gaussian"}


def clustered(prompts, steps, **options):
    """Keys near a centre of their page's own: pages differ, as Gaussians tell."""
    stream = drive.make_stream(prompts, steps, **options)
    rng = np.random.default_rng(7)
    batch, heads, total, size = stream.k.shape
    centres = 2 * rng.standard_normal((batch, heads, -(-total // 4), size))
    keys = np.repeat(centres, 4, axis=2)[:, :, :total] + 0.3 * stream.k
    return stream._replace(k=keys.astype(np.float32))


def check(stream, alpha, chunks=None, **options):
    spec = drive.make_spec(stream, alpha=alpha)
    run = drive.run(entmaxkv(**options), spec, stream, chunks)
    drive.assert_matches(run, stream, oracles.entmaxkv, alpha=alpha, **options)
    return run


def filled(stream, alpha, **options):
    """The state after the prompt: the same for all options of one selector."""
    spec = drive.make_spec(stream, alpha=alpha)
    return drive.prefill(entmaxkv(**options), spec, stream)


def decode(state, stream, **options):
    """All steps, from a state that stays as it is."""
    method = entmaxkv(**options)

    @jax.jit
    def steps(state, inputs):
        return jax.lax.scan(lambda s, x: drive.step(method, s, x), state, inputs)

    state, (out, diagnostics) = steps(state, drive.step_inputs(stream))
    diagnostics = jax.tree.map(np.asarray, diagnostics)
    return drive.Run([], np.asarray(out)[:, :, :, 0], diagnostics, state)


def counts(run):
    """Tokens read in each list, at each step."""
    return (run.diagnostics.attended >= 0).sum(-1)


@pytest.mark.parametrize(
    ("alpha", "options"),
    [
        (1.5, TOPK),
        (1.5, GAUSSIAN),
        (4 / 3, GAUSSIAN | {"per": "query", "excess": 0.4, "safety_margin_z": 0.2}),
        (
            2.0,
            GAUSSIAN | {"budget": 12, "group_reduce": "mean", "max_quantile": 0.9999},
        ),
    ],
)
def test_equals_float64_loops(alpha, options):
    """Prompts that end before, at and after a page, in chunks that split pages."""
    stream = clustered(PROMPTS, STEPS, sharpness=1.0)
    run = check(stream, alpha, [(0, 9, 25), (1, 18, 3)], **options)
    length = np.array(PROMPTS)[:, None] + np.arange(STEPS) + 1
    is_all = counts(run) == length.T[:, :, None]
    assert is_all[:4, 0].all()
    assert not is_all[:, 1:].all()
    if options is GAUSSIAN:  # as many pages as it takes: not the same everywhere
        assert len(np.unique(counts(run)[:, 1])) > 2
    overflow = np.asarray(run.state.overflow)
    assert (overflow > 0).any() == (options.get("group_reduce") == "mean")


def test_certified_is_dense_entmax_and_leaves_pages_unread():
    """To rounding, at every step and head, with a proof; a proof costs no output."""
    stream = clustered((5, 61, 90), 4, sharpness=1.0)
    options = {"budget": 8, "page_size": 4}
    state, _ = filled(stream, 1.5, **options)
    run = decode(state, stream, **options, certified=True)
    assert run.diagnostics.exact.all()
    # Exact, and attention over exactly what was read: so nothing left out had weight.
    drive.assert_consistent(run, stream, alpha=1.5)
    read = counts(run)
    assert (read[:, 2] < 90).all()
    assert (read[:, 2] > 8).any()
    poor = decode(state, stream, **options)
    drive.assert_consistent(poor, stream, alpha=1.5)
    proved = poor.diagnostics.exact
    assert proved.any()
    assert not proved[:, 2].all()
    gap = np.abs(poor.out - run.out).max(-1)
    assert (gap[proved] < 1e-5).all()
    assert (gap[~proved] > 1e-3).any()
    # What was read first is part of what was read in the end.
    for before, after in zip(
        poor.diagnostics.attended.reshape(-1, 8),
        run.diagnostics.attended.reshape(poor.diagnostics.attended[..., 0].size, -1),
        strict=True,
    ):
        assert set(before) <= {*after, -1}


def test_estimated_thresholds_give_what_they_say():
    """`fixed`: mass as it comes; `corrected` ends nearer to `exact`; neither proves."""
    stream = clustered((29,), 3, heads=(2, 1), sharpness=1.0)
    state, _ = filled(stream, 1.5, **GAUSSIAN)
    runs = {
        mode: decode(state, stream, **GAUSSIAN, tau_mode=mode)
        for mode in ("exact", "fixed", "corrected")
    }
    error = {
        mode: np.abs(run.out - runs["exact"].out).max() for mode, run in runs.items()
    }
    assert error["corrected"] < 0.3 * error["fixed"]
    assert error["fixed"] > 1e-2
    for mode in ("fixed", "corrected"):
        assert not runs[mode].diagnostics.exact.any()
        np.testing.assert_array_equal(
            runs[mode].diagnostics.attended, runs["exact"].diagnostics.attended
        )


@pytest.mark.parametrize("tau_mode", ["fixed", "corrected"])
def test_rows_of_one_page_have_nothing_to_estimate_and_are_exact(tau_mode):
    stream = clustered((0, 2, 29), 4, sharpness=1.0)
    state, _ = filled(stream, 2.0, **GAUSSIAN)
    exact = decode(state, stream, **GAUSSIAN)
    found = decode(state, stream, **GAUSSIAN, tau_mode=tau_mode)
    np.testing.assert_allclose(found.out[:, 0], exact.out[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.out[:2, 1], exact.out[:2, 1], atol=1e-5)
    lse = found.diagnostics.lse
    np.testing.assert_allclose(lse[:, 0], exact.diagnostics.lse[:, 0], atol=1e-5)
    assert np.isfinite(found.out).all()


def test_the_bests_of_a_groups_heads_tie_and_the_lower_page_is_read():
    """Room for one page besides the newest, exactly, whatever the compiler fuses."""
    with measure_steps.optimised():  # else nothing is fused
        run = check(drive.make_stream((41,) * 12, 2), 2.0, budget=8, page_size=4)
    assert (counts(run) <= 8).all()


def test_statistics_from_appends_are_those_from_scratch():
    """Of complete pages, to the bit; and appending writes in place."""
    prompts, steps = (0, 3, 16), 9
    stream = clustered(prompts, steps, heads=(2, 1))
    method = entmaxkv(**GAUSSIAN)
    spec = drive.make_spec(stream, capacity=26, alpha=1.5)
    state, _ = drive.prefill(method, spec, stream)
    _, k, v = drive.step_inputs(stream)
    append = jax.jit(method.append, donate_argnums=0)
    append = append.lower(state, k[0], v[0]).compile()
    held = accounting.state_bytes(method, spec)
    assert append.memory_analysis().alias_size_in_bytes == held
    for i in range(steps):
        state = append(state, k[i], v[i])
    keys = state.store.pages[..., : spec.head_dim]
    expected = jax.jit(page_statistics.page_statistics)(keys)
    for b, length in enumerate(prompts):
        whole = (length + steps) // 4
        for made, scratch in zip(state.moments, expected[2:], strict=True):
            assert whole > 1
            np.testing.assert_array_equal(made[b, :, :whole], scratch[b, :, :whole])


def test_traffic_is_a_bound():
    spec = drive.make_spec(drive.make_stream((64,), 0), dtype=jnp.bfloat16, alpha=1.5)
    token = 2 * 2 * 8 * 2  # bytes: key and value, KV heads, elements, bfloat16

    def bytes_of(**options):
        return entmaxkv(page_size=4, **options).traffic(spec, 62)

    assert bytes_of(budget=12) == Traffic(12 * token, 16 * token)
    assert bytes_of(budget=12, per="query") == Traffic(24 * token, 16 * token)
    assert bytes_of(budget=12, certified=True) == Traffic(64 * token, 16 * token)
    # Means and variances are float32.
    assert bytes_of(budget=12, selector="gaussian") == Traffic(12 * token, 32 * token)
    assert bytes_of(budget=None, selector="gaussian") == Traffic(64 * token, 32 * token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budget": 16},
            "budget=16 must be a multiple of page_size=16 of at least two",
        ),
        ({"budget": 40}, "budget=40 must be a multiple of page_size=16"),
        ({"page_size": 0}, "page_size=0"),
        ({"budget": None}, "budget=None .* selector='topk' needs a budget"),
        ({"tau_mode": "fixed"}, "tau_mode='fixed': .* use selector='gaussian'"),
        ({"selector": "best"}, "selector='best' must be one of topk, gaussian"),
        ({"per": "head"}, "per='head' must be one of kv, query"),
        ({"selector": "gaussian", "certified": True}, "goes with selector='topk'"),
        ({"group_reduce": "sum"}, "group_reduce='sum' must be one of mean, max"),
        ({"max_quantile": 1.0}, r"max_quantile=1.0 must be in \(0, 1\)"),
        ({"max_quantile": 1 - 2**-53}, "page_size=16-th root below 1"),
        ({"safety_margin_z": float("nan")}, "safety_margin_z=nan and"),
        ({"excess": -0.1}, "safety_margin_z=0.0 and excess=-0.1 must be at least 0"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        entmaxkv(**options)


def test_the_gaussian_selector_knows_three_orders():
    method = entmaxkv(selector="gaussian")
    spec = drive.make_spec(drive.make_stream((4,), 1), alpha=1.7)
    with pytest.raises(ValueError, match=r"alpha=1.7: .* 4/3, 1.5 and 2; use selector"):
        method.init(spec)
    entmaxkv().init(spec)
