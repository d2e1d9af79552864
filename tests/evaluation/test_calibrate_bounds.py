"""Risk control keeps its promise: exactly for yes and no, and in 1,000 draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kvjax.evaluation.calibrate_bounds import (
    find,
    level_of,
    p_value,
    prompts_needed,
    upper_bound,
)


def by_loops(losses, at_most):
    """The p-value by its definition: one bettor after the other."""
    capital = 0.0
    for step in range(1, 33):
        own = 1 / 2 if step == 32 else 1 / 2 / 31
        for loss in losses:
            own *= 1 + step / 32 * (at_most - loss) / (1 - at_most)
        capital += own
    return min(1.0, 1 / capital) if capital > 0 else 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.02, 0.98))
def test_the_p_value_is_that_of_plain_loops(losses, at_most):
    expected = by_loops(losses, at_most)
    assert p_value(losses, at_most) == pytest.approx(expected, rel=1e-9)
    assert p_value(losses[::-1], at_most) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [1, 7, 40, 137])
@pytest.mark.parametrize("at_most", [0.02, 0.05, 0.3, 0.9])
def test_yes_and_no_pass_no_more_often_than_the_level(n, at_most):
    """Exactly: sums over the binomial distribution whose mean is the bound."""
    values = np.array([p_value(np.arange(n) < k, at_most) for k in range(n + 1)])
    chances = stats.binom.pmf(np.arange(n + 1), n, at_most)
    for level in (0.2, 0.05, 0.01, 0.002):
        assert chances[values <= level].sum() <= level
    assert (np.diff(values) >= 0).all()  # more losses never help


# --- the bound in 1,000 draws


def edge(rng, n):
    """Every candidate of every family is a hair above the bound: each pass is wrong."""
    risks = np.full((4, 5), 0.0501)
    return rng.random((4, 5, n)) < risks[..., None], risks


def rare(rng, n):
    """Most prompts lose less than the bound, a few lose everything.

    Candidates of a family fail on the same prompts.
    """
    share = 0.0402
    losses = np.where(rng.random((4, 1, n)) < share, 1.0, 0.0102)
    risks = np.full((4, 5), share + (1 - share) * 0.0102)
    return np.broadcast_to(losses, (4, 5, n)), risks


def disordered(rng, n):
    """Some of the dearer candidates lose more than the cheaper ones."""
    risks = np.tile([0.004, 0.051, 0.004, 0.2, 0.0501], (4, 1))
    return rng.random((4, 5, n)) ** (1 / risks[..., None] - 1), risks


@pytest.mark.parametrize("draw", [edge, rare, disordered])
def test_the_bound_holds_in_95_of_100_draws(draw):
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        losses, risks = draw(rng, 130)
        found = find(list(losses), at_most=0.05, confidence=0.95)
        wrong = any(
            tested.passes and risk > 0.05
            for family, tests in zip(risks, found, strict=True)
            for risk, tested in zip(family, tests, strict=False)
        )
        held += not wrong
    assert held >= 950


def test_what_loses_little_is_found():
    rng, found = np.random.default_rng(1), 0
    for _ in range(200):
        losses = np.clip(rng.gamma(2.0, 0.005, (3, 2, 150)), 0, 1)  # 0.01 on average
        tests = find(list(losses), at_most=0.05, confidence=0.95)
        found += all(tested.passes for family in tests for tested in family)
    assert found >= 190


def test_a_family_ends_where_one_fails():
    asked = []

    def family(name, *risks):
        for risk in risks:
            asked.append((name, risk))
            yield np.full(200, risk)

    found = find(
        [family("a", 0.0, 0.01, 0.3, 0.0), family("b", 0.9, 0.0), family("c")],
        at_most=0.05,
        confidence=0.9,
    )
    assert [[tested.passes for tested in tests] for tests in found] == [
        [True, True, False],
        [False],
        [],
    ]
    assert asked == [("a", 0.0), ("a", 0.01), ("a", 0.3), ("b", 0.9)]
    assert found[0][1].mean == pytest.approx(0.01)


def test_families_share_the_level():
    """What passes alone does not among many that were looked at as well."""
    losses = np.zeros(80)
    (alone,) = find([[losses]], at_most=0.05, confidence=0.95)
    many = find([[losses]] * 10, at_most=0.05, confidence=0.95)
    assert alone[0].passes
    assert not any(tests[0].passes for tests in many)
    assert level_of(0.95, 10) == pytest.approx(0.005)


@pytest.mark.parametrize("at_most", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("level", [0.05, 0.005])
def test_as_many_prompts_are_needed_as_are_said(at_most, level):
    n = prompts_needed(at_most, level)
    assert p_value(np.zeros(n), at_most) <= level
    assert n == 1 or p_value(np.zeros(n - 1), at_most) > level
    # No procedure does with fewer than so many; this one takes half the level's.
    ideal = math.log(1 / level) / -math.log(1 - at_most)
    assert ideal <= n <= math.ceil(ideal + math.log(2) / -math.log(1 - at_most))


def test_the_upper_end_is_where_the_test_begins_to_pass():
    losses = np.random.default_rng(2).beta(1, 12, 90)
    for level in (0.1, 0.01):
        upper = upper_bound(losses, level)
        assert losses.mean() < upper < 1
        assert p_value(losses, upper) <= level
        assert p_value(losses, upper - 1e-4) > level
    assert upper_bound(np.ones(30), 0.05) == 1.0
    assert upper_bound(losses, 0.01) > upper_bound(losses, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p_value([], 0.1), "non-empty vector"),
        (lambda: p_value([[0.1]], 0.1), "non-empty vector"),
        (lambda: p_value([0.1, 1.1], 0.1), r"losses from 0.1 to 1.1 must all be in"),
        (lambda: p_value([float("nan")], 0.1), r"must all be in \[0, 1\]"),
        (lambda: p_value([0.1], 1.0), r"at_most=1.0 must be in \(0, 1\)"),
        (lambda: upper_bound([0.1], 0.0), r"level=0.0 must be in \(0, 1\)"),
        (lambda: prompts_needed(0.1, 1.0), r"level=1.0 must be in \(0, 1\)"),
        (lambda: level_of(1.0, 1), r"confidence=1.0 must be in \(0, 1\)"),
        (lambda: level_of(0.9, 0), "families=0 must be at least 1"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_beyond_the_range_is_its_end():
    assert p_value([-1e-9, 1e-12], 0.5) == pytest.approx(p_value([0, 0], 0.5))
