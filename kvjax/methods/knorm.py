"""Key norms: the prompt's tokens with the shortest keys stay."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, Traffic
from kvjax.stores import kept_prompt
from pallas_kernels.shared.quantized import floats


@typed
@softmax_only
def knorm(*, budget: int = 1024) -> Method:
    """Keeps the prompt tokens whose keys are shortest, and all later tokens.

    Keys of low norm tend to receive most attention: no query is asked, and nothing is
    protected. The prompt is attended to in full.

    Args:
        budget: prompt tokens kept per KV head. Generated tokens come on top.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`kvjax.stores.kept_slots.Kept`
        after `finish`.

    State: k, v `(B, Hkv, budget + max_new_tokens, D)` cache dtype; positions int32.
        While the prompt runs: the whole cache.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, and as many
        positions, per row.
    Exact when: budget >= prompt length.

    Raises:
        ValueError: if `budget` is below 1.

    Source:
        Devoto, Zhao, Scardapane, Minervini, "A Simple and Effective L2 Norm-Based
        Strategy for KV Cache Compression", EMNLP 2024, arXiv:2406.11430.
    Deviations:
        Every layer evicts; the authors leave the first two whole, as `dense_layers`
        does. They also evict while they generate; here generated tokens stay, as in
        kvpress. The paper's text could not be consulted, only its abstract.

    Example:
        >>> method = kvjax.knorm(budget=256)
        >>> state = method.init(spec)
    """
    if budget < 1:
        raise ValueError(f"{budget=} must be at least 1 token.")
    return Method(
        init=kept_prompt.init,
        prefill=kept_prompt.prefill,
        finish=functools.partial(kept_prompt.finish, importance, budget),
        append=kept_prompt.append,
        inspect_step=kept_prompt.inspect_step,
        traffic=functools.partial(traffic, budget),
        importance=importance,
        exact_prompt=True,
    )


def importance(state: kept_prompt.Prompt) -> Float[Array, "B Hkv S"]:
    """Scores a token the higher the shorter its key is."""
    store = state.store
    # Rotations keep lengths: that of the key before it is the same.
    norms = jnp.linalg.norm(floats(store.k).astype(jnp.float32), axis=-1)
    return kept_prompt.with_certain(-norms, store.length)


def traffic(budget: int, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    return kept_prompt.traffic(budget, spec, length)
