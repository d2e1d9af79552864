"""Filters against an independent NumPy implementation; what a row may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.decoding.sampling import (
    Sampling,
    active,
    filter_logits,
    row_keys,
    sample,
    validate,
)


def probs(row, tokens):
    weights = np.exp(row[tokens] - row[tokens].max())
    return weights / weights.sum()


def reference_probs(logits, seen, sampling):
    """Token by token, in float64, from the definitions."""
    out = []
    for row, was_seen in zip(np.asarray(logits, np.float64), seen, strict=True):
        row = row.copy()
        for token in range(len(row)):
            if was_seen[token]:
                penalty = sampling.repetition_penalty
                row[token] = (
                    row[token] / penalty if row[token] > 0 else row[token] * penalty
                )
        row = row / sampling.temperature
        alive = sorted(range(len(row)), key=lambda token: -row[token])
        if sampling.top_k:
            alive = alive[: sampling.top_k]

        if sampling.top_p < 1:
            kept, mass = [], 0.0
            for token, p in zip(alive, probs(row, alive), strict=True):
                if kept and mass >= sampling.top_p:
                    break
                kept.append(token)
                mass += p
            alive = kept
        p = probs(row, alive)
        alive = [
            t for t, q in zip(alive, p, strict=True) if q >= sampling.min_p * p.max()
        ]
        full = np.zeros(len(row))
        full[alive] = probs(row, alive)
        out.append(full)
    return np.array(out)


CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, repetition_penalty=1.7),
    # All at once, where another order would keep other tokens.
    Sampling(0.7, top_k=9, top_p=0.8, min_p=0.12, repetition_penalty=1.4),
    Sampling(2.0, top_k=20, top_p=0.9, min_p=0.3, repetition_penalty=0.6),
]


@pytest.fixture
def logits():
    return np.random.default_rng(3).normal(0, 2, (3, 40)).astype(np.float32)


@pytest.fixture
def seen():
    return np.random.default_rng(4).random((3, 40)) < 0.4


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_filtered_distribution_is_the_definition(sampling, logits, seen):
    filtered = filter_logits(jnp.asarray(logits), jnp.asarray(seen), active(sampling))
    probs = jax.nn.softmax(filtered, axis=-1)
    np.testing.assert_allclose(
        probs, reference_probs(logits, seen, sampling), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_filters_agree_with_transformers(sampling, logits, seen):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(logits)
    # The penalty of the library reads token ids: pad each row with one it has seen.
    longest = seen.sum(1).max()
    ids = [np.resize(np.flatnonzero(row), longest) for row in seen]
    chain = [
        warpers.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)),
        warpers.TemperatureLogitsWarper(float(sampling.temperature)),
    ]
    if sampling.top_k:
        chain.append(warpers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(warpers.TopPLogitsWarper(sampling.top_p))
    chain.append(warpers.MinPLogitsWarper(sampling.min_p))
    for warper in chain:
        scores = warper(torch.from_numpy(np.array(ids)), scores)
    ours = filter_logits(jnp.asarray(logits), jnp.asarray(seen), active(sampling))
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-5, atol=1e-5)


def test_ties_with_the_last_kept_token_are_kept():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    for sampling in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.7)):
        kept = jnp.isfinite(filter_logits(logits, None, active(sampling)))
        assert kept.tolist() == [[True, True, True, False]]


def test_samples_follow_the_distribution(logits, seen):
    sampling = Sampling(1.3, top_k=8, top_p=0.9)
    draws = 4000
    expected = reference_probs(logits[:1], seen[:1], sampling)[0]
    tokens = sample(
        row_keys(0, draws), jnp.tile(logits[:1], (draws, 1)), None, active(sampling)
    )
    counts = np.bincount(tokens, minlength=expected.size) / draws
    assert (counts[expected == 0] == 0).all()
    # Five standard deviations of a binomial count.
    slack = 5 * np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts - expected) <= slack + 1e-12).all()


def test_greedy_takes_the_largest_and_uses_no_random_numbers(logits, seen):
    greedy = active(Sampling(0.0, top_k=3, top_p=0.5, min_p=0.5))
    assert greedy == Sampling(None, None, None, None, None)
    tokens = sample(None, jnp.asarray(logits), None, greedy)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    program = str(jax.make_jaxpr(lambda x: sample(None, x, None, greedy))(logits))
    assert "sort" not in program
    assert "random" not in program


def test_repetition_penalty_applies_to_greedy():
    logits = jnp.array([[3.0, 2.0, -1.0], [-1.0, -3.0, -1.5]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    tokens = sample(None, logits, seen, active(Sampling(repetition_penalty=2.0)))
    assert tokens.tolist() == [1, 2]  # 3 / 2 < 2, and -1 * 2 < -1.5


def test_a_row_depends_on_its_own_key_and_logits_only(logits):
    sampling = active(Sampling(1.0, top_p=0.9))
    together = sample(row_keys(7, 3), jnp.asarray(logits), None, sampling)
    for row in range(3):
        other = np.array(logits)
        other[[r for r in range(3) if r != row]] = 0.0
        tokens = sample(row_keys(7, 5)[:3], jnp.asarray(other), None, sampling)
        assert tokens[row] == together[row]


def test_rows_with_equal_logits_draw_differently():
    logits = jnp.zeros((16, 50))
    tokens = sample(row_keys(0, 16), logits, None, active(Sampling(1.0)))
    assert len(set(tokens.tolist())) > 4


def test_values_do_not_compile_again(logits):
    traced = []

    @jax.jit
    def step(*arguments):
        traced.append(arguments)
        return sample(*arguments)

    for temperature, top_p in ((1.0, 0.9), (0.5, 0.2), (1.7, 0.99)):
        step(row_keys(0, 3), logits, None, active(Sampling(temperature, top_p=top_p)))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.1), "temperature=-0.1 must be 0, which is greedy"),
        (Sampling(temperature=float("nan")), "temperature=nan must be 0"),
        (Sampling(top_k=-1), "top_k=-1 must be an integer of at least 0"),
        (Sampling(top_k=2.5), "top_k=2.5 must be an integer"),
        (Sampling(top_p=0.0), r"top_p=0.0 must be in \(0, 1\]"),
        (Sampling(top_p=1.1), r"top_p=1.1 must be in \(0, 1\]"),
        (Sampling(min_p=-0.5), r"min_p=-0.5 must be in \[0, 1\]"),
        (Sampling(temperature=1e-38), "temperature=1e-38 must be 0, .* or in"),
        (Sampling(top_k=1 << 31), "top_k=2147483648 must be an integer .* below"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty=0.0 must be in"),
        (Sampling(repetition_penalty=1e39), r"repetition_penalty=1e\+39 must be in"),
    ],
)
def test_values_out_of_range_are_named(sampling, message):
    with pytest.raises(ValueError, match=message):
        validate(sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=1e-46),  # 0 in float32
        Sampling(temperature=1e-30),
        Sampling(temperature=1.0, min_p=1.0, top_p=1e-46, top_k=(1 << 31) - 1),
    ],
)
def test_however_narrow_the_likeliest_token_stays(sampling, logits):
    validate(sampling)
    tokens = sample(row_keys(0, 3), jnp.asarray(logits), None, active(sampling))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_the_defaults_are_valid_and_greedy():
    validate(Sampling())
    assert active(Sampling()) == Sampling(None, None, None, None, None)
