"""Random eviction: sinks, the newest tokens of the prompt, and the rest by chance."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from kvjax.attention import heads
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, Traffic
from kvjax.stores import contiguous, kept_prompt, step

LARGEST_SEED = 2**31 - 1


class RandomPrompt(NamedTuple):
    """State of :func:`random` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    layer: Int[Array, "B"]  # its number, in every row: layers draw apart


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`random`."""

    budget: int
    num_sinks: int
    window: int
    seed: int

    def __post_init__(self) -> None:
        budget, num_sinks, window = self.budget, self.num_sinks, self.window
        seed = self.seed
        if num_sinks < 0 or window < 1:
            raise ValueError(
                f"{num_sinks=} must be at least 0 and {window=} at least 1 token."
            )
        if budget <= num_sinks + window:
            raise ValueError(
                f"{budget=} must exceed {num_sinks=} and {window=} together; raise "
                "the budget."
            )
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"{seed=} must be in [0, {LARGEST_SEED}].")


@typed
@softmax_only
def random(
    *, budget: int = 1024, num_sinks: int = 4, window: int = 32, seed: int = 0
) -> Method:
    """Keeps sinks, the newest prompt tokens and a random choice; and all later tokens.

    The floor of any comparison: no score that is worth its reading may lose to it. The
    prompt is attended to in full. Every KV head of every layer draws for itself, each
    token with the same chance. A draw is a function of seed, layer, head, the prompt's
    length and the position: the same whatever the chunks, the batch and the machine;
    a larger budget keeps what a smaller one does.

    Args:
        budget: prompt tokens kept per KV head. Generated tokens come on top.
        num_sinks: first tokens of the prompt, always kept.
        window: newest tokens of the prompt, always kept; as many as SnapKV's.
        seed: of the draws.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`kvjax.stores.kept_slots.Kept`
        after `finish`.

    State: k, v `(B, Hkv, budget + max_new_tokens, D)` cache dtype; positions int32.
        While the prompt runs: the whole cache.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, and as many
        positions, per row.
    Exact when: budget >= prompt length.

    Raises:
        ValueError: unless num_sinks >= 0, window >= 1 and their sum is below budget.

    Source:
        Wang et al., "Random Attention: Rethinking KV Cache Eviction for Efficient
        Reasoning", 2026, arXiv:2609.03430, of generated tokens. RandomPress of kvpress,
        arXiv:2510.00636, of a prompt's.
    Deviations:
        The prompt is thinned, and generated tokens stay; Random Attention does it the
        other way round. kvpress protects no token. Rows of equal length draw alike, so
        that a row's result is no matter of its place in a batch.

    Example:
        >>> method = kvjax.random(budget=256, seed=1)
        >>> state = method.init(spec)
    """
    options = Options(budget, num_sinks, window, seed)
    scores = functools.partial(importance, options)
    return Method(
        init=init,
        prefill=prefill,
        finish=functools.partial(kept_prompt.finish, scores, budget),
        append=kept_prompt.append,
        inspect_step=kept_prompt.inspect_step,
        traffic=functools.partial(traffic, options),
        importance=scores,
        exact_prompt=True,
    )


def init(spec: CacheSpec, weights: Any = None) -> RandomPrompt:
    """Makes a store of the whole prompt that knows the layer's number."""
    del weights
    layer = jnp.full((spec.batch,), spec.layer, jnp.int32)
    return RandomPrompt(contiguous.contiguous(spec), layer)


def prefill(
    state: RandomPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[RandomPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything."""
    store, out = step.prefill(state.store, q, k, v, lengths)
    return state._replace(store=store), out


def importance(options: Options, state: RandomPrompt) -> Float[Array, "B Hkv S"]:
    """Draws a number in [0, 1) for each token that is not certain to stay."""
    store = state.store
    # (B, 1, 1), (Hkv, 1), (S,): what a draw depends on, mixed in turn.
    row = mix(jnp.asarray(options.seed, jnp.uint32), state.layer[:, None, None])
    number = jnp.arange(store.spec.num_kv_heads, dtype=jnp.int32)[:, None]
    number += heads.first(store.spec)
    head = mix(mix(row, number), store.length[:, None, None])
    drawn = mix(head, jnp.arange(store.spec.capacity, dtype=jnp.int32))
    # What float32 holds exactly.
    scores = (drawn >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    return kept_prompt.with_certain(
        scores, store.length, num_sinks=options.num_sinks, window=options.window
    )


def mix(state: UInt[Array, "*#B"], word: Int[Array, "*#B"]) -> UInt[Array, "*_"]:
    """Mixes a word into 32 bits of state by MurmurHash3's finaliser.

    Of one state no two words give the same. Integers alone: equal on every device.
    """
    bits = state ^ word.astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)) + jnp.uint32(0x9E3779B9)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    return kept_prompt.traffic(options.budget, spec, length)
