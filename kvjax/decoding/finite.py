"""Logits that are no numbers: found on the device, told on the host in one line.

A model overflows where its dtype ends, float16 at 65,504, and its logits are NaN from
then on. Nothing that is chosen or scored by them means anything.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.interface import DecoderLM


class NotFiniteError(ValueError):
    """An error of a model whose logits are not finite.

    Attributes:
        place: of the method among several that ran, 0 if it is alone.
    """

    place: int = 0


def is_finite(logits: Float[Array, "*B V"]) -> Bool[Array, "*B"]:
    """Returns where logits have no NaN, no +inf, and not only -inf.

    A single -inf is a token that a model excludes, and no fault.
    """
    return jnp.isfinite(logits.max(-1))


def log_prob(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """Returns log-probabilities of the targets, NaN where logits are not finite."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    found = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(is_finite(logits), found, jnp.nan)


def likelihood(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """Returns :func:`log_prob`, and whether each target is the likeliest token."""
    return log_prob(logits, targets), jnp.argmax(logits, axis=-1) == targets


def check(decoder: Any, log_probs: Float[np.ndarray, "*B"], where: str) -> None:
    """Raises NotFiniteError if :func:`log_prob` was asked of what is not finite."""
    if np.isnan(log_probs).any():
        raise not_finite(decoder, where)


def check_rows(decoder: DecoderLM, log_probs: Float[np.ndarray, "B n"]) -> None:
    """Raises NotFiniteError, naming the first token, if a row's are no numbers."""
    broken = np.isnan(log_probs)
    if broken.any():
        token = int(broken.any(0).argmax())
        row = int(broken[:, token].argmax())
        raise not_finite(decoder, f"at token {token + 1} of row {row}")


def not_finite(decoder: DecoderLM, where: str) -> NotFiniteError:
    """Returns the error that names the dtype and what can be done."""
    dtype = jnp.dtype(decoder.cache_spec(1, 1).dtype).name
    remedy = "the weights are damaged, or too large for any dtype"
    if dtype == "float16":
        remedy = "float16 ends at 65,504, use --dtype bfloat16 or --dtype float32"
    elif dtype == "bfloat16":
        remedy = "use --dtype float32, and if that does not help, other weights"
    return NotFiniteError(f"logits are not finite {where} in {dtype}: {remedy}.")
