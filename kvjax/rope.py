"""Rotary position embeddings, with every scaling the Llama family uses.

Frequencies are static NumPy; only `dynamic` depends on the running length. The
pairing is that of the Hugging Face checkpoints: element d turns with d + D/2.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for RoPE.")
        if self.kind not in _FREQUENCIES:
            raise ValueError(
                f"rope kind {self.kind!r} is unknown; known: {', '.join(_FREQUENCIES)}."
            )
        if self.kind != "default" and self.factor < 1:
            raise ValueError(f"rope factor={self.factor} must be at least 1.")
        if self.kind in ("dynamic", "llama3", "yarn") and self.original_context < 1:
            raise ValueError(
                f"rope kind {self.kind!r} needs original_context >= 1, got "
                f"{self.original_context}."
            )
        if len(self.factors) != (self.head_dim // 2 if self.kind == "factors" else 0):
            raise ValueError(
                f"rope kind {self.kind!r} with head_dim={self.head_dim} got "
                f"{len(self.factors)} factors; only 'factors' takes them, "
                "head_dim / 2 of them."
            )
        if not all(factor > 0 and math.isfinite(factor) for factor in self.factors):
            raise ValueError("every rope factor must be finite and above 0.")

    def __call__(
        self,
        x: Float[Array, "B H T D"],
        positions: Int[Array, "B T"],
        length: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H T D"]:
        """Rotates `x` at `positions` in float32; the result has x's dtype.

        `length` is the number of tokens in the row once this call's are in. Only
        `dynamic` looks at it: frequencies stretch once it exceeds `original_context`.
        """
        if self.kind == "none":
            return x
        inverse = _FREQUENCIES[self.kind](self)
        if self.kind == "dynamic" and length is not None:
            inverse = _dynamic(self, length)[:, None, None, :]
        angle = positions[:, None, :, None].astype(jnp.float32) * inverse
        scale = np.float32(self.attention_scale())
        cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)

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


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _default(rope: Rope) -> np.ndarray:
    exponent = np.arange(0, rope.head_dim, 2, dtype=np.float32) / rope.head_dim
    return (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)


def _linear(rope: Rope) -> np.ndarray:
    return _default(rope) / np.float32(rope.factor)


def _dynamic(rope: Rope, length: Int[Array, "B"]) -> Float[Array, "B half"]:
    # NTK-aware: the base grows with the running length beyond the original context.
    seen = jnp.maximum(length, rope.original_context).astype(jnp.float32)
    stretch = rope.factor * seen / rope.original_context - (rope.factor - 1)
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
