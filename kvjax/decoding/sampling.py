"""Choosing the next token: greedy, or sampled after the usual filters.

The order and meaning of the filters are those of the transformers library: repetition
penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


class Sampling(NamedTuple):
    """The way to choose the next token.

    Attributes:
        temperature: divides the logits; 0 is greedy, and then only
            `repetition_penalty` has an effect.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides positive logits, multiplies negative ones, of the
            tokens that are already in the row, prompt included.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


# Of a temperature and a penalty: logits divided by it remain float32 numbers.
LEAST, MOST = 1e-30, 1e30


def validate(sampling: Sampling) -> None:
    """Raises ValueError unless every field is a number in its range."""
    if not isinstance(sampling, Sampling):
        raise ValueError(
            f"sampling={shown(sampling)} must be a kvjax.decoding.sampling.Sampling."
        )
    for name, value in sampling._asdict().items():
        is_number = isinstance(value, int | float | np.integer | np.floating)
        if not is_number or isinstance(value, bool):
            raise ValueError(
                f"{name}={shown(value)} must be a number; the default is "
                f"{Sampling._field_defaults[name]}."
            )
    temperature, top_k, top_p, min_p, penalty = sampling
    if not (temperature == 0 or LEAST <= temperature <= MOST):
        raise ValueError(
            f"{temperature=} must be 0, which is greedy, or in [{LEAST}, {MOST}]."
        )
    if not 0 <= top_k < 1 << 31 or int(top_k) != top_k:
        raise ValueError(
            f"{top_k=} must be an integer of at least 0, below 2**31; 0 keeps all."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must be in (0, 1]; 1 keeps all tokens.")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{min_p=} must be in [0, 1]; 0 keeps all tokens.")
    if not LEAST <= penalty <= MOST:
        raise ValueError(
            f"repetition_penalty={penalty} must be in [{LEAST}, {MOST}]; 1 is none."
        )


def shown(value: Any) -> str:
    """Returns a value as messages show it: on one line, and cut if it is long."""
    return f"{' '.join(repr(value).split()):.80}"


def active(sampling: Sampling) -> Sampling:
    """Returns a sampling as arrays, with None for every filter that does nothing.

    None is structure, a value is data: under `jax.jit` another temperature does not
    compile again, and greedy decoding contains no sort and no random numbers.
    """
    temperature, top_k, top_p, min_p, penalty = sampling
    sampled = temperature > 0
    arrays: dict[str, Any] = {
        "temperature": np.float32(temperature) if sampled else None,
        "top_k": np.int32(top_k) if sampled and top_k else None,
        "top_p": np.float32(top_p) if sampled and top_p < 1 else None,
        "min_p": np.float32(min_p) if sampled and min_p > 0 else None,
        "repetition_penalty": np.float32(penalty) if penalty != 1 else None,
    }
    return Sampling(**arrays)


def row_keys(seed: int, batch: int) -> Key[Array, "B"]:
    """Returns a random key a row: a row depends on `seed` and its index only."""
    return keys_of(seed, np.arange(batch))


def keys_of(seed: int, indices: Int[np.ndarray, "B"]) -> Key[Array, "B"]:
    """Returns the random keys of the rows with these indices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def sample(
    keys: Key[Array, "B"] | None,
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    sampling: Sampling,
) -> Int[Array, "B"]:
    """Returns the next token of each row.

    Args:
        keys: one random key a row, not used twice; None if greedy.
        logits: float32.
        seen: tokens already in the row; None without a repetition penalty.
        sampling: from :func:`active`.
    """
    logits = filter_logits(logits, seen, sampling)
    if keys is None or sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def mentioned(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> Bool[np.ndarray, "B V"]:
    """Marks the tokens that each prompt has, for a repetition penalty."""
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen


def filter_logits(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, sampling: Sampling
) -> Float[Array, "B V"]:
    """Returns logits whose softmax :func:`sample` draws from; filtered ones are -inf.

    Tokens exactly as likely as the last one a filter keeps are kept too.
    """
    temperature, top_k, top_p, min_p, penalty = sampling
    if penalty is not None and seen is not None:
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalised, logits)
    if temperature is not None:
        logits = logits / temperature
    if top_k is not None or top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        least = descending[:, -1:]
        if top_k is not None:
            last = jnp.clip(top_k, 1, logits.shape[-1]) - 1
            least = jnp.take_along_axis(
                descending, jnp.broadcast_to(last, least.shape), axis=-1
            )
            descending = jnp.where(descending < least, -jnp.inf, descending)
        if top_p is not None:
            # A token stays while those likelier than it have less than top_p together.
            probs = jax.nn.softmax(descending, axis=-1)
            kept = jnp.cumsum(probs, axis=-1) - probs < top_p
            kept = kept.at[..., 0].set(True)  # whatever float32 makes of a small top_p
            kept = kept & (descending >= least)
            least = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if min_p is not None:
        least = logits.max(-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
