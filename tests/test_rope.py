"""Rotations against float64 loops and their defining identities."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax.rope import _FREQUENCIES, Rope, _dynamic


def _apply(rope, x, positions, length=None):
    x = jnp.asarray(x, jnp.float32)[None, None]
    positions = jnp.asarray([positions], jnp.int32)
    length = None if length is None else jnp.asarray([length], jnp.int32)
    return np.asarray(rope(x, positions, length))[0, 0]


def _turn(x, position, inverse, scale=1.0):
    """Element i with element i + D/2, by position * inverse[i]."""
    half = len(x) // 2
    out = np.zeros(len(x))
    for i in range(half):
        angle = position * inverse[i]
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out * scale


def _check(rope, inverse, scale=1.0, length=None):
    x = np.random.default_rng(0).standard_normal((4, rope.head_dim))
    positions = [0, 1, 7, 1000]
    expected = [
        _turn(row, p, inverse, scale) for row, p in zip(x, positions, strict=True)
    ]
    actual = _apply(rope, x, positions, length)
    np.testing.assert_allclose(actual, expected, atol=3e-4)


def _plain(head_dim, theta):
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_default(theta):
    _check(Rope(8, theta), _plain(8, theta))
    x = np.random.default_rng(1).standard_normal((3, 6))
    expected = [
        oracles.rotate(row, p, theta) for row, p in zip(x, (2, 3, 99), strict=True)
    ]
    np.testing.assert_allclose(
        _apply(Rope(6, theta), x, (2, 3, 99)), expected, atol=2e-5
    )


def test_linear_divides_positions():
    inverse = [f / 4 for f in _plain(8, 1e4)]
    _check(Rope(8, kind="linear", factor=4.0), inverse)


@pytest.mark.parametrize("length", [None, 50, 100, 101, 350])
def test_dynamic_stretches_the_base_beyond_the_context(length):
    rope = Rope(8, kind="dynamic", factor=2.0, original_context=100)
    seen = max(length or 0, 100)
    base = 1e4 * (2.0 * seen / 100 - 1) ** (8 / 6)
    _check(rope, _plain(8, base), length=length)


def test_earlier_rotations_hold_up_to_a_length():
    """Keys rotated at one length are those of another, up to `static_until`."""
    x, at = jnp.ones((1, 1, 1, 8)), jnp.array([[40]])

    def turned(rope, length):
        return np.asarray(rope(x, at, jnp.array([length])))

    dynamic = Rope(8, kind="dynamic", factor=2.0, original_context=100)
    assert dynamic.static_until == 100
    assert (turned(dynamic, 50) == turned(dynamic, 100)).all()
    assert (turned(dynamic, 50) != turned(dynamic, 101)).any()
    for kind in ("default", "linear", "llama3", "yarn", "none"):
        rope = Rope(8, kind=kind, factor=2.0, original_context=100)
        assert rope.static_until == math.inf
        assert (turned(rope, 50) == turned(rope, 10_000)).all()


def test_llama3_keeps_the_fast_and_stretches_the_slow():
    rope = Rope(
        64,
        5e5,
        "llama3",
        factor=8.0,
        original_context=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    inverse = []
    for f in _plain(64, 5e5):
        turns = 8192 * f / (2 * math.pi)  # in the original context
        share = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        inverse.append(share * f + (1 - share) * f / 8.0)
    kinds = [i / f for i, f in zip(inverse, _plain(64, 5e5), strict=True)]
    assert min(kinds) == pytest.approx(1 / 8)
    assert max(kinds) == 1.0
    assert any(1 / 8 < kind < 1 for kind in kinds)
    _check(rope, inverse)


def test_yarn_blends_and_warms_the_softmax():
    rope = Rope(64, 1e4, "yarn", factor=4.0, original_context=4096)
    inverse = []
    plain = _plain(64, 1e4)

    def pair_with(turns):  # the pair that turns so often in the original context
        return 64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(1e4))

    first, last = math.floor(pair_with(32.0)), math.ceil(pair_with(1.0))
    for i, f in enumerate(plain):
        stretched = min(max((i - first) / (last - first), 0.0), 1.0)
        inverse.append(stretched * f / 4.0 + (1 - stretched) * f)
    _check(rope, inverse, scale=0.1 * math.log(4.0) + 1.0)


def test_factors_divide_the_frequencies():
    factors = (1.0, 1.5, 3.0, 8.0)
    inverse = [f / by for f, by in zip(_plain(8, 1e4), factors, strict=True)]
    _check(Rope(8, kind="factors", factors=factors), inverse)


def test_logits_depend_on_distance_only():
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 16))
    near = _apply(Rope(16), q, [5]) @ _apply(Rope(16), k, [2]).T
    far = _apply(Rope(16), q, [105]) @ _apply(Rope(16), k, [102]).T
    other = _apply(Rope(16), q, [105]) @ _apply(Rope(16), k, [101]).T
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert abs(near - other).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, r"head_dim=7 must be even"),
        ({"head_dim": 8, "kind": "linear", "factor": 0.5}, r"factor=0.5 must be"),
        (
            {"head_dim": 8, "kind": "yarn", "factor": 2.0},
            r"needs original_context >= 1",
        ),
        ({"head_dim": 8, "kind": "factors"}, "kind 'factors' .* got 0 factors"),
        ({"head_dim": 8, "factors": (1.0,) * 4}, "kind 'default' .* got 4 factors"),
        (
            {"head_dim": 4, "kind": "factors", "factors": (1.0, math.nan)},
            "must be finite and above 0",
        ),
        (
            {"head_dim": 4, "kind": "factors", "factors": (1.0, 0.0)},
            "must be finite and above 0",
        ),
        ({"head_dim": 8, "theta": 0.5}, "theta=0.5 must be at least 1"),
        ({"head_dim": 8, "theta": math.inf}, r"theta=inf must be in \[-1e30"),
        ({"head_dim": 0}, "head_dim=0 must be even"),
        ({"head_dim": 8, "kind": "longrope"}, r"'longrope' is unknown; known: default"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Rope(**options)


# --- far positions

# 2 pi to 60 digits, of which float64 has 16.
TURN = Fraction("6.283185307179586476925286766559005768394338798750211641949889")
FAR = (0, 1, 1023, 131_071, 2**24, 2**24 + 1, 50_000_017, 2**31 - 1, -1, -(2**31))
KINDS = {
    "default": Rope(64),
    "theta": Rope(128, 5e6),
    "linear": Rope(64, kind="linear", factor=3.0),
    "dynamic": Rope(64, kind="dynamic", factor=2.0, original_context=100),
    "llama3": Rope(64, 5e5, "llama3", factor=8.0, original_context=8192),
    "yarn": Rope(64, 1e4, "yarn", factor=4.0, original_context=4096),
    "factors": Rope(4, kind="factors", factors=(0.3, 7.0)),
}


def _sines(frequencies, position):
    """Of the exact products of integers and float32 frequencies, to float64."""
    angles = [position * Fraction(float(f)) % TURN for f in frequencies]
    return np.array([(math.cos(a), math.sin(a)) for a in map(float, angles)]).T


def _turned_unit(rope, positions, length=None):
    """Cosines and sines of every pair at every position."""
    half = rope.head_dim // 2
    unit = np.zeros((len(positions), rope.head_dim))
    unit[:, :half] = 1
    found = _apply(rope, unit, positions, length) / rope.attention_scale()
    return found[:, :half], found[:, half:]


@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_exact_at_every_position_of_int32(kind):
    """A float32 product has no digit left of most of these: errors of up to 2."""
    rope = KINDS[kind]
    cos, sin = _turned_unit(rope, FAR)
    for row, position in enumerate(FAR):
        expected = _sines(_FREQUENCIES[rope.kind](rope), position)
        np.testing.assert_allclose((cos[row], sin[row]), expected, atol=1e-6)


@pytest.mark.parametrize("length", [90, 101, 40_000, 2**31 - 1])
@pytest.mark.parametrize("stretch", [2.0, 1e9])
def test_dynamic_angles_are_exact_too(length, stretch):
    """Their frequencies, of 1 to 1e-13, are known on the device only."""
    rope = Rope(64, kind="dynamic", factor=stretch, original_context=100)
    cos, sin = _turned_unit(rope, FAR, length)
    frequencies = np.asarray(_dynamic(rope, jnp.array([length], jnp.int32)))[0]
    for row, position in enumerate(FAR):
        expected = _sines(frequencies, position)
        np.testing.assert_allclose((cos[row], sin[row]), expected, atol=1e-6)


@pytest.mark.parametrize("start", [2**24, 2**30, 2**31 - 200])
def test_logits_depend_on_distance_only_wherever_they_are(start):
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 7, 64))
    at = np.array([0, 1, 2, 3, 50, 99, 100])
    near = _apply(Rope(64), q, at) @ _apply(Rope(64), k, at).T
    far = _apply(Rope(64), q, at + start) @ _apply(Rope(64), k, at + start).T
    np.testing.assert_allclose(near, far, atol=2e-5)
