"""Squeezed Attention: clusters, thresholds, lists and outputs against float64 loops."""

import dataclasses
import functools
import inspect

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax import registry
from kvjax.methods.squeezed.method import squeezed
from kvjax.methods.squeezed.options import Options
from kvjax.methods.squeezed.step import chosen_slots
from kvjax.stores import contiguous

TAIL, STEPS = 4, 5
PROMPTS = (1, 5, 23, 44)
SMALL = {"budget": 12, "tail": TAIL, "clusters": 0.25, "rounds": 3}


def options_of(**given):
    parameters = inspect.signature(squeezed).parameters.values()
    return Options(**({p.name: p.default for p in parameters} | given))


@dataclasses.dataclass
class Ended:
    """A stream under some options: what `finish` made of it, and the same in loops."""

    stream: drive.Stream
    given: dict

    @functools.cached_property
    def spec(self):
        return drive.make_spec(self.stream)

    @functools.cached_property
    def method(self):
        return squeezed(**self.given)

    @functools.cached_property
    def run(self):
        return drive.run(self.method, self.spec, self.stream)

    @functools.cached_property
    def state(self):
        """After all steps: what the prompt's end made never changes."""
        return jax.tree.map(np.asarray, self.run.state)

    @property
    def in_loops(self):
        sizes = options_of(**self.given).sizes(self.spec)
        given = {k: v for k, v in self.given.items() if k != "scope"}
        return given | {"most": sizes.clusters, "most_coarse": sizes.coarse}

    @functools.cached_property
    def expected(self):
        rows = map(self.stream.row, range(len(self.stream.prompts)))
        return [oracles.Squeezed(row, **self.in_loops) for row in rows]


def rows_of(vectors):
    return np.array(vectors).reshape(-1, 8)


CASES = {
    "budget": ((4, 2), {}),
    "quantile": ((6, 2), {"sparsity": 0.6, "per": "query", "budget": 64}),
    "max": ((4, 1), {"sparsity": 0.3, "group_reduce": "max"}),
    "coarse": (
        (4, 2),
        {"sparsity": 0.4, "clusters": 0.5, "coarse": 0.2, "coarse_sparsity": 0.4},
    ),
    "coarse per query": (
        (4, 2),
        {"per": "query", "clusters": 0.5, "coarse": 0.1, "rounds": 0, "budget": 9}
        | {"threshold": 0.02},
    ),
}


@functools.cache
def ended(name):
    heads, given = CASES[name]
    return Ended(drive.make_stream(PROMPTS, STEPS, heads=heads), SMALL | given)


@pytest.mark.parametrize("name", CASES)
def test_equals_float64_loops(name):
    """Lists and outputs of every step: of rows all dense, with a cluster, with many."""
    case = ended(name)
    drive.assert_matches(case.run, case.stream, oracles.squeezed, **case.in_loops)
    assert case.run.diagnostics.exact[:, 0].all()
    assert not case.run.diagnostics.exact[:, 3].all()


@pytest.mark.parametrize("name", CASES)
def test_clusters_and_thresholds_are_those_of_loops(name):
    case = ended(name)
    state = case.state
    for b, expected in enumerate(case.expected):
        assert state.fixed[b] == expected.fixed
        np.testing.assert_allclose(state.threshold[b], expected.threshold, rtol=2e-4)
        for kv, mine in enumerate(expected.of_kv):
            stored = [j for members in mine.members for j in members]
            np.testing.assert_array_equal(state.members[b, kv, : len(stored)], stored)
            sizes = expected.sizes(kv, False)
            held = state.size[b, kv]
            np.testing.assert_array_equal(held[: len(sizes)], sizes)
            assert not held[len(sizes) :].any()
            np.testing.assert_array_equal(state.first[b, kv], np.cumsum(held) - held)
            means = state.centroids[b, kv, : len(sizes)]
            np.testing.assert_allclose(means, rows_of(mine.centroids), atol=2e-6)
            if state.coarse is None:
                continue
            above, number = state.coarse, [len(below) for below in mine.below]
            np.testing.assert_allclose(
                above.threshold[b], expected.coarse_threshold, rtol=2e-4
            )
            np.testing.assert_array_equal(above.number[b, kv, : len(number)], number)
            sizes = expected.sizes(kv, True)
            np.testing.assert_array_equal(above.size[b, kv, : len(number)], sizes)
            means = above.centroids[b, kv, : len(number)]
            np.testing.assert_allclose(means, rows_of(mine.coarse), atol=2e-6)


@pytest.mark.parametrize("name", ["budget", "quantile", "coarse"])
def test_members_are_a_permutation(name):
    """The identity from the fixed tokens on, rising inside a cluster; keys go along."""
    case = ended(name)
    state = case.state
    keys = oracles.Attention(case.stream.row(3)).k
    for b, fixed in enumerate(state.fixed):
        assert fixed == max(PROMPTS[b] - TAIL, 0)
        np.testing.assert_array_equal(state.size[b].sum(-1), fixed)
        for kv, members in enumerate(state.members[b]):
            np.testing.assert_array_equal(np.sort(members), np.arange(members.size))
            np.testing.assert_array_equal(
                members[fixed:], np.arange(fixed, members.size)
            )
            for first, size in zip(state.first[b, kv], state.size[b, kv], strict=True):
                assert (np.diff(members[first : first + size]) > 0).all()
    held = PROMPTS[3] + STEPS
    for kv, members in enumerate(state.members[3]):
        np.testing.assert_allclose(
            state.store.k[3, kv, :held], keys[kv, members[:held]], atol=1e-5
        )


def test_a_row_has_no_more_clusters_than_alone():
    """Shares are of the row's own tokens: 19 of 23 are fixed, a quarter is 4."""
    state = ended("budget").state
    assert state.centroids.shape[2] > 4
    assert (state.size[2, :, :4] > 0).any()
    assert not state.size[2, :, 4:].any()


@pytest.mark.parametrize("name", ["budget", "quantile", "coarse per query"])
def test_lists_are_of_whole_clusters_but_for_the_last(name):
    """Distinct, at most the budget, nothing listed behind the first empty place."""
    case = ended(name)
    sizes = options_of(**case.given).sizes(case.spec)
    attended = case.run.diagnostics.attended
    lists = attended.shape[2] // case.state.size.shape[1]
    for i, b, h in np.ndindex(attended.shape[:3]):
        listed = attended[i, b, h, : sizes.fixed]
        there = listed[listed >= 0]
        assert (listed[: len(there)] >= 0).all()
        assert len(set(there.tolist())) == len(there) <= case.given["budget"]
        members = case.expected[b].of_kv[h // lists].members
        touched = [m for m in members if set(m) & set(there.tolist())]
        parts = [m for m in touched if not set(m) <= set(there.tolist())]
        assert len(parts) <= (len(there) == sizes.fixed)
        for cut in parts:  # its earlier tokens are there
            kept = there[np.isin(there, cut)].tolist()
            assert kept == cut[: len(kept)]


@pytest.mark.parametrize("name", ["max", "coarse per query"])
def test_what_is_not_clustered_is_always_read(name):
    case = ended(name)
    attended = case.run.diagnostics.attended
    for i, b in np.ndindex(attended.shape[:2]):
        for listed in attended[i, b]:
            dense = range(max(PROMPTS[b] - TAIL, 0), PROMPTS[b] + i + 1)
            assert set(dense) <= set(listed.tolist())


def test_a_key_a_cluster_is_the_true_top_by_weight():
    """Nothing is estimated then: the list is of the largest softmax weights."""
    stream = drive.make_stream((30,), 3, heads=(2, 2), seed=4)
    given = SMALL | {"clusters": 1.0, "rounds": 0, "budget": 7, "tail": 2}
    case = Ended(stream, given)
    keys, queries = (getattr(oracles.Attention(stream.row(0)), x) for x in "kq")
    for i, h in np.ndindex(3, 2):
        logits = keys[h, :28] @ queries[h, 30 + i]
        best = np.argsort(-logits)[:7]
        listed = case.run.diagnostics.attended[i, 0, h]
        assert set(listed[:7].tolist()) == set(best.tolist())
    np.testing.assert_array_equal(case.state.size[0], 1)


def test_equal_scores_leave_the_fixed_tokens_unread():
    """Nothing is above the quantile of what is all the same; without one, all is."""
    stream = drive.make_stream((40,), 2, heads=(2, 2))
    stream.q[:] = 0.0
    given = SMALL | {"sparsity": 0.5, "budget": 64}
    case = Ended(stream, given)
    listed = case.run.diagnostics.attended
    np.testing.assert_array_equal((listed >= 0).sum(-1)[0, 0], TAIL + 1)
    full = drive.run(squeezed(**given | {"sparsity": 0.0}), case.spec, stream)
    assert full.diagnostics.exact.all()


def test_the_threshold_leaves_its_share_unread():
    """By the means that it was made of, at most 1 - sparsity of the keys are above."""
    case = ended("quantile")
    for b in (2, 3):
        per_key = np.array(case.expected[b].per_key(False))
        above = (per_key > (1 + 1e-5) * case.state.threshold[b]).mean()
        assert 0.2 < above <= 1 - 0.6


def test_equal_heads_of_a_group_choose_as_one():
    """A list a KV head is then that of each of its query heads; of two, the mean."""
    stream = drive.make_stream((40,), 3, heads=(4, 2), seed=6)
    stream.q[:, 1::2] = stream.q[:, ::2]
    given = SMALL | {"sparsity": 0.5}
    one, each = (Ended(stream, given | {"per": per}) for per in ("kv", "query"))
    shared, own = (x.run.diagnostics.attended for x in (one, each))
    for h in range(4):
        for a, b in zip(shared[:, 0, h // 2], own[:, 0, h], strict=True):
            assert set(a.tolist()) == set(b.tolist())
    np.testing.assert_allclose(one.run.out, each.run.out, atol=1e-5)


def test_a_row_alone_is_the_row_in_a_batch():
    """Neither its clusters nor its thresholds depend on others, or on their lengths."""
    case, b = ended("coarse"), 2
    rows = [x[b : b + 1] for x in case.stream[:3]]
    alone = drive.Stream(*rows, PROMPTS[b : b + 1], STEPS)
    one = drive.run(case.method, drive.make_spec(alone, case.spec.capacity), alone)
    np.testing.assert_array_equal(one.state.size[0], case.state.size[b])
    for state in (one.state, one.state.coarse):
        whole = case.state if state is one.state else case.state.coarse
        np.testing.assert_allclose(state.threshold[0], whole.threshold[b], rtol=1e-5)
    np.testing.assert_array_equal(
        np.sort(one.diagnostics.attended[:, 0], -1),
        np.sort(case.run.diagnostics.attended[:, b], -1),
    )
    np.testing.assert_allclose(one.out[:, 0], case.run.out[:, b], atol=1e-5)


def test_chunks_change_nothing():
    """The ring of queries has the newest of them, in whatever chunks they came."""
    case = ended("quantile")
    chunks = [(1, 2, 9, 20), (0, 0, 1, 1), (0, 3, 13, 23)]
    run = drive.run(case.method, case.spec, case.stream, chunks)
    np.testing.assert_array_equal(run.state.members, case.state.members)
    np.testing.assert_allclose(run.state.threshold, case.state.threshold, rtol=1e-5)
    drive.assert_matches(run, case.stream, oracles.squeezed, **case.in_loops)


def test_large_logits_stay_finite():
    """Several hundred, which no exponential holds: thresholds and lists are there."""
    stream = drive.make_stream((40,), 3, heads=(2, 2), seed=8, sharpness=300.0)
    case = Ended(stream, SMALL | {"sparsity": 0.5})
    logits = oracles.Attention(stream.row(0))
    assert (logits.q[0] @ logits.k[0].T).max() * 8**-0.5 > 500
    assert np.isfinite(case.state.threshold).all()
    assert np.isfinite(case.run.out).all()
    # A threshold that is not a number would leave all of them unread.
    assert (case.run.diagnostics.attended[..., 0] >= 0).all()


# --- coarse clusters


def test_coarse_clusters_drop_nothing_that_both_levels_keep():
    """Fewer share the softmax then, so that scores below a kept one can only rise."""
    stream = drive.make_stream((60,), 2, heads=(2, 2), seed=3)
    given = SMALL | {"clusters": 0.5, "budget": 64, "threshold": 0.0}
    two = options_of(**given, coarse=0.2, coarse_sparsity=0.01)
    one = options_of(**given)
    state = finished(squeezed(**given, coarse=0.2, coarse_sparsity=0.01), stream)
    spec = state.store.spec
    q = jnp.asarray(stream.q[:, :, 60:61])
    rotated, _ = contiguous.rotate_queries(spec, q, state.store.length + 1)

    @functools.partial(jax.jit, static_argnums=0)
    def slots(options, state):
        return chosen_slots(options, options.sizes(spec), state, rotated)

    def chosen(options, state, threshold, coarse=None):
        state = state._replace(threshold=jnp.full((1,), threshold))
        above = None
        if coarse is not None:
            above = state.coarse._replace(threshold=jnp.full((1,), coarse))
        found = slots(options, state._replace(coarse=above))
        return [set(head[head >= 0].tolist()) for head in np.asarray(found[0])]

    alone, passed = chosen(one, state, 0.03), 0
    assert chosen(two, state, 0.03, 0.0) == alone  # every coarse cluster passes
    kept, both = chosen(two, state, 0.0, 0.02), chosen(two, state, 0.03, 0.02)
    for single, below, found in zip(alone, kept, both, strict=True):
        assert below < set(range(56))
        assert single & below <= found <= below
        passed += len(found - single)
    assert passed


# --- thresholds over the whole model, and what is sealed


def finished(method, stream, chunks=None):
    state, _ = drive.prefill(method, drive.make_spec(stream), stream, chunks)
    return jax.jit(method.finish)(state)


@pytest.mark.parametrize("coarse", [None, 0.1])
def test_a_threshold_over_layers_is_their_quantile_together(coarse):
    """That of all keys of all lists of all layers; another than each layer's own."""
    given = SMALL | {"sparsity": 0.6, "per": "query", "coarse": coarse}
    method = squeezed(**given, scope="model")
    layers = [
        Ended(drive.make_stream((44, 3), 1, seed=seed, sharpness=sharp), given)
        for seed, sharp in ((1, 1.0), (2, 6.0))
    ]
    states = tuple(finished(method, layer.stream) for layer in layers)
    settled = jax.jit(method.hooks.settle)(states)
    assert jax.tree.structure(settled) == jax.tree.structure(states)
    per_key = [layer.expected[0].per_key(False) for layer in layers]
    expected = np.quantile(np.concatenate(per_key), 0.6)
    own = [np.quantile(one, 0.6) for one in per_key]
    assert abs(own[0] / own[1] - 1) > 0.1
    for before, state, alone in zip(states, settled, own, strict=True):
        np.testing.assert_allclose(state.threshold[0], expected, rtol=2e-4)
        assert state.threshold[1] == 0  # of a row without a cluster
        np.testing.assert_allclose(before.threshold[0], alone, rtol=2e-4)
    if coarse is not None:
        per_key = [layer.expected[0].per_key(True) for layer in layers]
        expected = np.quantile(np.concatenate(per_key), 0.5)
        for state in settled:
            np.testing.assert_allclose(state.coarse.threshold[0], expected, rtol=2e-4)


def test_only_quantiles_over_the_model_ask_for_all_layers():
    assert squeezed(sparsity=0.7, scope="model").hooks.settle is not None
    assert squeezed(coarse=0.01, scope="model").hooks.settle is not None
    for given in ({"sparsity": 0.7}, {"scope": "model"}, {"threshold": 0.1}):
        assert squeezed(**given).hooks.settle is None
    assert finished(squeezed(**SMALL, sparsity=0.5), ended("max").stream).scores is None


def test_a_sealed_prompt_is_clustered_once():
    """More of it is read exactly, behind the clusters, and stays outside of them."""
    stream = drive.make_stream((30, 9), 4, heads=(4, 2), seed=5)
    method = squeezed(**SMALL, sparsity=0.5)
    spec = drive.make_spec(stream, max_new_tokens=stream.steps + 6)
    state = method.init(spec)
    inputs = drive.chunk(stream, [0, 0], [24, 3], size=24)
    state, _ = jax.jit(method.prefill)(state, *inputs)
    ended_there = jax.jit(method.finish)(state)
    sealed = jax.jit(method.hooks.seal)(state)
    again = [jax.tree.leaves(x) for x in (ended_there, sealed)]
    for a, b in zip(*again, strict=True):
        np.testing.assert_array_equal(a, b)
    more = drive.chunk(stream, [24, 3], [6, 6], size=8)
    read, out = jax.jit(method.prefill)(sealed, *more)
    for b, start in enumerate((24, 3)):
        exact = oracles.full(stream.row(b)).out[start : start + 6]
        drive.assert_rows_close(out[b, :, :6].swapaxes(0, 1), exact)
    ended_later = method.finish(read)
    for a, b in zip(ended_later[1:], sealed[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    step = jax.jit(functools.partial(drive.step, method))
    for i in range(4):
        inputs = [x[i] for x in drive.step_inputs(stream)]
        ended_later, (_, found) = step(ended_later, inputs)
        for b, first in enumerate((20, 0)):
            for listed in found.attended[b]:
                dense = range(first, stream.prompts[b] + i + 1)
                assert set(dense) <= set(listed.tolist())


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"tail": 0}, "tail=0 must be at least 1"),
        ({"rounds": -1}, "rounds=-1 must be at least 0"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\), or None"),
        ({"sparsity": float("nan")}, r"sparsity=nan must be in \[0, 1\)"),
        ({"threshold": -0.1}, "threshold=-0.1 must be at least 0 and finite"),
        ({"threshold": float("nan")}, "threshold=nan must be at least 0"),
        ({"threshold": 0.1, "sparsity": 0.5}, "threshold=0.1 and sparsity=0.5 both"),
        ({"clusters": 0.0}, r"clusters=0.0 must be in \(0, 1\]"),
        ({"clusters": 1.5}, r"clusters=1.5 must be in \(0, 1\]"),
        ({"coarse": 0.05}, "coarse=0.05 must be above 0 and below clusters=0.05"),
        ({"coarse_sparsity": 0.5}, "coarse_sparsity=0.5 is of coarse .* coarse=None"),
        (
            {"coarse": 0.01, "coarse_sparsity": 1.0},
            r"coarse_sparsity=1.0 must be in \[0, 1\)",
        ),
        ({"per": "head"}, "per='head' must be one of kv, query"),
        ({"group_reduce": "sum"}, "group_reduce='sum' must be one of mean, max"),
        ({"scope": "all"}, "scope='all' must be one of layer, model"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        squeezed(**options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("refresh+squeezed", "wrap"),
        ("retro+squeezed", "wrap"),
        ("head_budgets+squeezed", "."),
        ("decode_eviction+squeezed", "."),
        ("duo+squeezed:sparsity=0.5,scope=model", "decides over all layers"),
    ],
)
def test_transforms_that_do_not_fit_say_so(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        registry.parse(spec)
    assert "\n" not in str(error.value)
