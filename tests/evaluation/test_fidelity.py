"""Agreement against SciPy, and the side-by-side transform against methods run alone."""

import functools

import drive
import numpy as np
import oracles
import pytest
from scipy import special, stats
from tiny import tiny_model

import kvjax
from kvjax import dense
from kvjax.decoding.generate import prefill
from kvjax.evaluation import fidelity

PROMPTS, STEPS = (21, 9), 5

any_model = functools.cache(tiny_model)


def test_agreement_is_scipys_divergence():
    rng = np.random.default_rng(0)
    reference, candidate = rng.normal(0, 3, (2, 2, 4, 11)).astype(np.float32)
    p, q = (special.softmax(x.astype(float), -1) for x in (reference, candidate))
    result = fidelity.agreement(reference, candidate)
    np.testing.assert_allclose(result.kl, stats.entropy(p, q, axis=-1), rtol=1e-9)
    np.testing.assert_array_equal(result.top1, p.argmax(-1) == q.argmax(-1))
    backwards = fidelity.agreement(candidate, reference)
    assert not np.allclose(backwards.kl, result.kl)  # the direction matters


def test_agreement_with_itself_is_perfect_also_where_tokens_are_impossible():
    logits = np.array([[[0.0, -np.inf, 80.0], [1.0, 2.0, 2.0]]], np.float32)
    result = fidelity.agreement(logits, logits + np.float32(3))
    np.testing.assert_allclose(result.kl, 0, atol=1e-6)
    assert result.top1.all()


def test_agreement_needs_equal_shapes():
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and \(1, 2, 4\)"):
        fidelity.agreement(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)))


def run(method, alpha=1.0):
    stream = drive.make_stream(PROMPTS, STEPS, seed=3)
    return drive.run(method, drive.make_spec(stream, alpha=alpha), stream)


def true_weights(alpha):
    """Of every step, row and query head over the tokens so far, in float64."""
    stream = drive.make_stream(PROMPTS, STEPS, seed=3)
    for b in range(len(PROMPTS)):
        row = stream.row(b)
        attention = oracles.Attention(row, alpha)
        for i, h in np.ndindex(STEPS, stream.q.shape[1]):
            t = PROMPTS[b] + i
            yield i, b, h, attention(t, h, range(t + 1))[2]


@pytest.mark.parametrize(
    ("spec", "alpha"),
    [
        ("streaming_llm:budget=8", 1.0),
        ("snapkv:budget=8,window=4", 1.0),
        ("entmaxkv:budget=8,page_size=4", 1.5),
        ("refreshkv:budget=8,stride=2,schedule=fixed", 1.0),
        ("retro:window=3+quest:budget=8,page_size=4", 1.0),
    ],
)
def test_side_by_side_measures_the_gap_between_two_runs(spec, alpha):
    candidate = kvjax.parse(spec)
    full_run, candidate_run = run(kvjax.full(), alpha), run(candidate, alpha)
    both = run(fidelity.side_by_side(kvjax.full(), candidate), alpha)
    # The model goes on with the reference's output, bit for bit.
    np.testing.assert_array_equal(both.out, full_run.out)

    gap = np.linalg.norm(candidate_run.out - full_run.out, axis=-1)  # steps, B, Hq
    error = (gap / np.linalg.norm(full_run.out, axis=-1)).mean(0)
    attended, exact = (
        candidate_run.diagnostics.attended,
        candidate_run.diagnostics.exact,
    )
    dropped, support = np.zeros((2, *error.shape))
    for i, b, h, weights in true_weights(alpha):
        lists = attended[i, b]
        seen = np.isin(np.arange(len(weights)), lists[h * len(lists) // 4])
        dropped[b, h] += weights[~seen].sum() / STEPS
        support[b, h] += (weights[seen] > 0).sum() / (weights > 0).sum() / STEPS
    found = fidelity.layers((both.state,))
    assert found.error.shape == (1, len(PROMPTS), 4)
    np.testing.assert_allclose(found.error[0], error, rtol=1e-4)
    np.testing.assert_allclose(found.dropped[0], dropped, atol=2e-6)
    np.testing.assert_allclose(found.support[0], support, rtol=1e-5)
    np.testing.assert_allclose(found.exact[0], exact.mean(0), rtol=1e-6)
    refreshed = candidate_run.diagnostics.refreshed.mean(0)
    np.testing.assert_allclose(found.refreshed[0], refreshed, rtol=1e-6)
    read = (attended >= 0).sum((2, 3)).mean(0)
    np.testing.assert_allclose(found.read[0], read, rtol=1e-6)
    assert (error[0] > 1e-3).all()  # something was left out of the long prompt
    assert (dropped[0] > 1e-3).all()


def test_a_method_beside_itself_loses_nothing():
    both = run(fidelity.side_by_side(kvjax.full(), kvjax.parse("quest:budget=64")))
    found = fidelity.layers((both.state,))
    np.testing.assert_allclose(found.error, 0, atol=1e-5)
    np.testing.assert_array_equal(found.dropped, 0)
    np.testing.assert_array_equal(found.support, 1)
    np.testing.assert_array_equal(found.exact, 1)


def test_the_reference_must_keep_every_token():
    both = fidelity.side_by_side(kvjax.parse("quest:budget=64"), kvjax.full())
    spec = drive.make_spec(drive.make_stream((4,), 1))
    with pytest.raises(ValueError, match=r"reference with state Paged .* use full"):
        both.init(spec)


def test_side_by_side_is_one_object_per_pair():
    full, candidate = kvjax.full(), kvjax.parse("tova:budget=8")
    assert fidelity.side_by_side(full, candidate) is fidelity.side_by_side(
        full, candidate
    )


def test_rows_must_agree():
    two = kvjax.full()._replace(rows=2)
    with pytest.raises(ValueError, match="reference rows=2 and candidate rows=1"):
        fidelity.side_by_side(two, kvjax.full())
    model = any_model()
    with pytest.raises(ValueError, match="rows=2 needs the newest tokens"):
        fidelity.teacher_forced(
            model.decoder, two, model.params, (), np.zeros((1, 3), np.int32)
        )


def test_teacher_forcing_feeds_the_given_tokens():
    """Also those before, where a method asks for several rows."""
    model, full = any_model(), kvjax.full()
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
    two = dense.windowed(full, 2)
    states, _, recent, *_ = prefill(
        model, two, tokens[:, :9].tolist(), max_new_tokens=4
    )
    states = fidelity.teacher_forced(
        model.decoder, two, model.params, states, tokens[:, 9:], recent
    )
    whole = prefill(model, full, tokens.tolist(), max_new_tokens=1).states
    for windowed, other in zip(states, whole, strict=True):
        one = windowed.store
        np.testing.assert_array_equal(one.length, [12, 12])
        np.testing.assert_allclose(one.k[:, :, :12], other.k[:, :, :12], atol=2e-4)
