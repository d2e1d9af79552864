"""Attention to every token so far, by the model's normaliser: for the baselines."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax import cache
from kvjax.interface import CacheSpec, Diagnostics, Method, State, Traffic
from pallas_kernels.decode_attention import decode_logits
from pallas_kernels.entmax import entmax


def method() -> Method:
    """Keeps every key and value, and attends to all of them.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.cache.Contiguous`.
    """
    return Method(
        init=_init,
        prefill=_prefill,
        finish=lambda state: state,
        append=cache.extend,
        inspect_step=_inspect_step,
        traffic=_traffic,
    )


def _init(spec: CacheSpec, weights=None) -> cache.Contiguous:
    del weights
    return cache.contiguous(spec)


def _prefill(state, q, k, v, lengths) -> tuple[State, Array]:
    state = cache.extend(state, k, v, lengths)
    rotated, positions = cache.rotate_queries(state.spec, q, state.length, lengths)
    return state, cache.attend(state, rotated, positions).out.astype(q.dtype)


def _inspect_step(state, q) -> tuple[State, Array, Diagnostics]:
    rotated, positions = cache.rotate_queries(state.spec, q, state.length)
    out, lse = cache.attend(state, rotated, positions)
    slots = jnp.arange(state.spec.capacity, dtype=jnp.int32)
    attended = jnp.where(slots < state.length[:, None, None], slots, -1)
    attended = jnp.broadcast_to(attended, state.k.shape[:3])
    refreshed = jnp.ones_like(state.length, bool)
    exact = jnp.ones(q.shape[:2], bool)
    return state, out.astype(q.dtype), Diagnostics(attended, lse, refreshed, exact)


def weights(
    state: cache.Contiguous, q: Float[Array, "B Hq T D"]
) -> Float[Array, "B Hq T S"]:
    """What a step gives each token: the weights behind its output, float32.

    Reads every key, and holds all weights at once.
    """
    spec = state.spec
    rotated, positions = cache.rotate_queries(spec, q, state.length)
    logits = decode_logits(rotated, state.k, positions, sm_scale=spec.sm_scale)
    if spec.alpha == 1:
        return jax.nn.softmax(logits, axis=-1)
    return entmax(logits, alpha=spec.alpha)


def _traffic(spec: CacheSpec, length: int) -> Traffic:
    return Traffic(kv=cache.kv_bytes(spec, length), metadata=0)
