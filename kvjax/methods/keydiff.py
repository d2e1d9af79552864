"""KeyDiff: the prompt's tokens with the keys least like all the others stay."""

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
def keydiff(*, budget: int = 1024) -> Method:
    """Keeps the prompt tokens whose keys differ most from the mean, and later tokens.

    The score of a key is minus its cosine with the anchor, the mean of all keys scaled
    to length 1; keys that stand out tend to receive most attention. No query is asked,
    nothing is protected. The prompt is attended to in full.

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
        Park, Jones, Morse, Goel, Lee, Lott, "KeyDiff: Key Similarity-Based KV Cache
        Eviction for Long-Context LLM Inference in Resource-Constrained Environments",
        2025, arXiv:2504.15364.
    Deviations:
        The prompt is read whole and thinned once, and generated tokens stay, as in
        kvpress; the paper evicts block by block while it reads, in constant memory, and
        while it generates. Its text could not be consulted, only its abstract and
        kvpress.

    Example:
        >>> method = kvjax.keydiff(budget=256)
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
    """Scores a token the higher the less its key is like the mean of all keys."""
    store = state.store
    slots = jnp.arange(store.spec.capacity, dtype=jnp.int32)
    is_held = slots < store.length[:, None, None]
    # Rotated, as they are cached. Slots without a token may hold anything.
    keys = floats(store.k).astype(jnp.float32)
    keys = jnp.where(is_held[..., None], keys, 0.0)
    norms = jnp.linalg.norm(keys, axis=-1, keepdims=True)
    tiny = jnp.finfo(jnp.float32).tiny
    directions = keys / jnp.maximum(norms, tiny)
    # mu(K) but for its length, which a cosine does not see.
    anchor = directions.sum(axis=2, keepdims=True)
    anchor /= jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), tiny)
    scores = (directions * anchor).sum(-1)
    return kept_prompt.with_certain(-scores, store.length)


def traffic(budget: int, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    return kept_prompt.traffic(budget, spec, length)
