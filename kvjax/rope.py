"""Rotary position embeddings, with every scaling the Llama family uses.

Frequencies are static NumPy, float32 as in the checkpoints' own library; only `dynamic`
depends on the running length. Their products with positions are exact, however far the
position: integers of 64 bits, in fractions of a turn, that wrap as angles do. The
pairing is that of the Hugging Face checkpoints: element d turns with d + D/2.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

_LARGEST = 1e30  # of any number: its products are not infinite yet
_NUMBERS = (
    *("theta", "factor", "original_context", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
)


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotation by position: call it on queries or keys.

    Attributes:
        head_dim: elements per head, even.
        theta: base of the frequencies.
        kind: `default`, `linear`, `dynamic`, `llama3`, `yarn` or `factors`; or `none`,
            which returns its input, of layers without positions.
        factor: how far the context is stretched (not for `default` and `factors`).
        original_context: tokens of the unstretched model (not for `default`).
        low_freq_factor, high_freq_factor: the band of `llama3`.
        beta_fast, beta_slow, truncate: the ramp of `yarn`.
        attention_factor: scale on the rotated vectors (`yarn`); None derives it.
        mscale, mscale_all_dim: the alternative spelling of that scale.
        factors: what divides each frequency (`factors`), `head_dim / 2` of them.
    """

    head_dim: int
    theta: float = 10_000.0
    kind: Literal[
        "default", "linear", "dynamic", "llama3", "yarn", "factors", "none"
    ] = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even for RoPE, and at least 2."
            )
        if self.kind not in _FREQUENCIES:
            raise ValueError(
                f"rope kind {self.kind!r} is unknown; known: {', '.join(_FREQUENCIES)}."
            )
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not -_LARGEST <= value <= _LARGEST:
                raise ValueError(f"rope {name}={value} must be in [-1e30, 1e30].")
        if self.theta < 1:
            raise ValueError(f"rope theta={self.theta} must be at least 1.")
        if self.kind != "default" and self.factor < 1:
            raise ValueError(f"rope factor={self.factor} must be at least 1.")
        _check_stretch(self)
        if len(self.factors) != (self.head_dim // 2 if self.kind == "factors" else 0):
            raise ValueError(
                f"rope kind {self.kind!r} with head_dim={self.head_dim} got "
                f"{len(self.factors)} factors; only 'factors' takes them, "
                "head_dim / 2 of them."
            )
        if not all(1 / _LARGEST <= factor <= _LARGEST for factor in self.factors):
            raise ValueError("every rope factor must be finite and above 0.")

    def __call__(
        self,
        x: Float[Array, "B H T D"],
        positions: Int[Array, "B T"],
        length: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H T D"]:
        """Rotates `x` at `positions` in float32; the result has x's dtype.

        Positions are those of int32, negative ones turn back; the angles at all of
        them are right to some 3e-7.

        `length` is the number of tokens in the row once this call's are in. Only
        `dynamic` looks at it: frequencies stretch once it exceeds `original_context`.
        """
        if self.kind == "none":
            return x
        steps = _static_steps(self)
        if self.kind == "dynamic" and length is not None:
            steps = _steps(_dynamic(self, length)[:, None, None, :])
        angle = _angles(steps, positions[:, None, :, None])
        scale = np.float32(self.attention_scale())
        cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)

    @property
    def static_until(self) -> float:
        """The longest length, in tokens, at which earlier rotations still hold.

        Infinite but for `dynamic`, whose frequencies stretch with the running length
        beyond `original_context`: keys rotated before are then not those of now.
        """
        return float(self.original_context) if self.kind == "dynamic" else math.inf

    def attention_scale(self) -> float:
        """The factor on rotated queries and keys: 1 but for `yarn`."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        # YaRN Eq. 22: the softmax temperature, folded into the rotation.
        if self.mscale and self.mscale_all_dim:
            return _yarn_scale(self.factor, self.mscale) / _yarn_scale(
                self.factor, self.mscale_all_dim
            )
        return _yarn_scale(self.factor)


def _check_stretch(rope: Rope) -> None:
    kind = rope.kind
    if kind in ("dynamic", "llama3", "yarn") and rope.original_context < 1:
        raise ValueError(
            f"rope kind {kind!r} needs original_context >= 1, got "
            f"{rope.original_context}."
        )
    if kind == "dynamic" and rope.head_dim < 4:
        raise ValueError(
            f"rope kind {kind!r} needs head_dim >= 4, got {rope.head_dim}."
        )
    if kind == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
        raise ValueError(
            f"rope low_freq_factor={rope.low_freq_factor} must be above 0 and below "
            f"high_freq_factor={rope.high_freq_factor}."
        )
    is_ramp = rope.beta_fast > 0 and rope.beta_slow > 0 and rope.theta > 1
    if kind == "yarn" and not is_ramp:
        raise ValueError(
            f"rope kind {kind!r} needs beta_fast={rope.beta_fast} and "
            f"beta_slow={rope.beta_slow} above 0, theta={rope.theta} above 1."
        )


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _default(rope: Rope) -> np.ndarray:
    exponent = np.arange(0, rope.head_dim, 2, dtype=np.float32) / rope.head_dim
    return (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)


def _linear(rope: Rope) -> np.ndarray:
    return _default(rope) / np.float32(rope.factor)


def _dynamic(rope: Rope, length: Int[Array, "B"]) -> Float[Array, "B half"]:
    # NTK-aware: the base grows with the running length beyond the original context.
    beyond = jnp.maximum(length - int(rope.original_context), 0).astype(jnp.float32)
    stretch = 1 + rope.factor * beyond / rope.original_context
    base = rope.theta * stretch ** (rope.head_dim / (rope.head_dim - 2))
    exponent = np.arange(0, rope.head_dim, 2, dtype=np.float32) / rope.head_dim
    return 1.0 / base[:, None] ** exponent


def _llama3(rope: Rope) -> np.ndarray:
    inverse = _default(rope)
    wavelength = 2 * math.pi / inverse
    low = rope.original_context / rope.low_freq_factor
    high = rope.original_context / rope.high_freq_factor
    ramp = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (1 - ramp) * inverse / rope.factor + ramp * inverse
    slow = np.where(wavelength > low, inverse / rope.factor, mixed)
    return np.where(wavelength < high, inverse, slow).astype(np.float32)


def _yarn(rope: Rope) -> np.ndarray:
    def dimension(rotations):  # where a frequency turns `rotations` times in context
        turns = math.log(rope.original_context / (rotations * 2 * math.pi))
        return rope.head_dim * turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    half = np.arange(rope.head_dim // 2, dtype=np.float32)
    interpolate = np.clip((half - low) / (high - low), 0, 1)
    inverse = _default(rope)
    blend = inverse / rope.factor * interpolate + inverse * (1 - interpolate)
    return blend.astype(np.float32)


def _factors(rope: Rope) -> np.ndarray:
    return _default(rope) / np.asarray(rope.factors, np.float32)


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
    "none": _default,  # not asked for
}


# --- angles


class _Steps(NamedTuple):
    """The turns of a position, modulo 1, in units of 2**-64: two words of 32 bits."""

    high: UInt[Array | np.ndarray, "*#B half"]
    low: UInt[Array | np.ndarray, "*#B half"]


# 1 / (2 pi), in units of 2**-130.
_PER_RADIAN = 0xA2F9836E4E441529FC2757D1F534DDC0


@functools.cache
def _static_steps(rope: Rope) -> _Steps:
    """The steps of float32 frequencies, to the last of their 64 bits."""
    frequencies = map(Fraction, _FREQUENCIES[rope.kind](rope).tolist())
    steps = [round(f * _PER_RADIAN / 2**66) % 2**64 for f in frequencies]
    words = np.array([divmod(step, 2**32) for step in steps], np.uint32)
    return _Steps(*words.T)


def _steps(frequencies: Float[Array, "*B half"]) -> _Steps:
    """The steps of float32 frequencies in (0, 1] that are known on the device only."""
    bits = lax.bitcast_convert_type(frequencies, jnp.uint32)
    # frequency = fraction * 2**-31 * 2**-by, the top bit of `fraction` set.
    fraction = ((bits & 0x7FFFFF) | 0x800000) << 8
    by = 127 - (bits >> 23)
    first, second = map(np.uint32, divmod(round(Fraction(_PER_RADIAN, 2**65)), 2**32))
    carried = _high_product(fraction, second)
    low = carried + fraction * first
    high = _high_product(fraction, first) + (low < carried).astype(jnp.uint32)
    for part in (jnp.minimum(by, 31), jnp.clip(by, 31, 62) - 31):
        low = (low >> part) | ((high << 1) << (31 - part))
        high = high >> part
    return _Steps(high, low)


def _angles(
    steps: _Steps, positions: Int[Array, "B 1 T 1"]
) -> Float[Array, "B 1 T half"]:
    """Returns position times frequency but for whole turns, radians in [-pi, pi]."""
    positions = positions.astype(jnp.int32)
    far = lax.bitcast_convert_type(jnp.abs(positions), jnp.uint32)
    # The upper word of the product; what overflows are whole turns.
    turned = far * steps.high + _high_product(far, steps.low)
    signed = lax.bitcast_convert_type(turned, jnp.int32).astype(jnp.float32)
    angle = signed * np.float32(2 * math.pi / 2**32)
    return jnp.where(positions < 0, -angle, angle)


def _high_product(
    a: UInt[Array, "*#B"], b: UInt[Array | np.ndarray | np.uint32, "*#B"]
) -> UInt[Array, "*_"]:
    """The upper 32 bits of the products, which have 64."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    other = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (other >> 16)
