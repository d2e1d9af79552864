"""Full attention over the whole cache: the baseline, and the oracle of the others."""

import jax.numpy as jnp

from kvjax import cache
from kvjax.interface import Diagnostics, Method, Traffic


def full() -> Method:
    """Keeps every key and value and attends to all of them.

    By the model's own normaliser: softmax, or entmax of any alpha.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.cache.Contiguous`.

    State: k, v `(B, Hkv, S, D)` cache dtype; length `(B,)` int32.
    Reads per step and layer: 2*length*D*Hkv elements of KV, per row.
    Exact when: always.

    Source:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762.
        Entmax: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", ACL
        2019, arXiv:1905.05702.
    Deviations:
        none known.

    Example:
        >>> method = kvjax.full()
        >>> state = method.init(spec)
    """

    def init(spec, weights=None):
        del weights
        return cache.contiguous(spec)

    def prefill(state, q, k, v, lengths):
        state = cache.extend(state, k, v, lengths)
        rotated, positions = cache.rotate_queries(state.spec, q, state.length, lengths)
        return state, cache.attend(state, rotated, positions).out.astype(q.dtype)

    def inspect_step(state, q):
        rotated, positions = cache.rotate_queries(state.spec, q, state.length)
        out, lse = cache.attend(state, rotated, positions)
        slots = jnp.arange(state.spec.capacity, dtype=jnp.int32)
        attended = jnp.where(slots < state.length[:, None, None], slots, -1)
        attended = jnp.broadcast_to(attended, state.k.shape[:3])
        refreshed = jnp.ones_like(state.length, bool)
        exact = jnp.ones(q.shape[:2], bool)
        diagnostics = Diagnostics(attended, lse, refreshed, exact)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        return Traffic(kv=cache.kv_bytes(spec, length), metadata=0)

    return Method(
        init=init,
        prefill=prefill,
        finish=lambda state: state,
        append=cache.extend,
        inspect_step=inspect_step,
        traffic=traffic,
    )
