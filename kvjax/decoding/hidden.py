"""Hidden states of each row's newest token, while prompts of any lengths are read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.interface import DecoderLM


def no_hidden(decoder: DecoderLM, batch: int) -> Float[Array, "B E"]:
    """Returns what stands for hidden states before the first token of a prompt."""
    return jnp.zeros((batch, decoder.width), decoder.cache_spec(1, 1).dtype)


@jax.jit
def newer(
    newest: Float[Array, "B E"],
    lengths: Int[Array, "B"],
    previous: Float[Array, "B E"] | None,
) -> Float[Array, "B E"]:
    """Hidden states of rows that the chunk has a token of; `previous` of the others."""
    if previous is None:
        return newest
    return jnp.where((lengths > 0)[:, None], newest, previous)


def last_hidden(
    hidden: Float[Array, "B T E"],
    lengths: Int[Array, "B"],
    previous: Float[Array, "B E"] | None,
) -> Float[Array, "B E"]:
    """Of each row's newest token; `previous` where this chunk has none of the row."""
    index = jnp.maximum(lengths - 1, 0)[:, None, None]
    return newer(jnp.take_along_axis(hidden, index, axis=1)[:, 0], lengths, previous)
