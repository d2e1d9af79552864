"""Exact top-k by the true logits: the best any choice of `budget` tokens can do."""

from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots
from pallas_kernels.decode_attention import decode_logits


@softmax_only
def oracle_topk(*, budget: int = 1024, per: Literal["kv", "query"] = "kv") -> Method:
    """Reads every key to find the tokens with most attention, then uses only those.

    The yardstick of the methods that must guess: no other set of `budget` tokens holds
    more attention mass. It saves no key traffic, and its accounting says so. The
    prompt is attended to in full.

    Args:
        budget: tokens attended to per step and list.
        per: one list per `kv` head, ranked by the mass summed over the query heads of
            the group, or one per `query` head.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.contiguous.Contiguous`.

    State: k, v `(B, Hkv, S, D)` cache dtype; length `(B,)` int32.
    Reads per step and layer: length*D*Hkv elements of keys to choose, and budget*D
        elements of values per list, per row.
    Exact when: budget >= length.

    Raises:
        ValueError: if `budget` is below 1 or `per` is unknown.

    Source:
        The upper bound of every page- or token-selection paper, among them Quest,
        arXiv:2406.10774, Fig. 6.
    Deviations:
        none known.

    Example:
        >>> method = kvjax.oracle_topk(budget=256)
        >>> state = method.init(spec)
    """
    if budget < 1:
        raise ValueError(f"{budget=} must be at least 1 token.")
    if per not in ("kv", "query"):
        raise ValueError(f"{per=} must be 'kv' or 'query'.")

    def init(spec, weights=None):
        del weights
        return contiguous.contiguous(spec)

    def prefill(state, q, k, v, lengths):
        state = contiguous.extend(state, k, v, lengths)
        rotated, positions = contiguous.rotate_queries(
            state.spec, q, state.length, lengths
        )
        return state, contiguous.attend(state, rotated, positions).out.astype(q.dtype)

    def inspect_step(state, q):
        spec = state.spec
        rotated, positions = contiguous.rotate_queries(spec, q, state.length)
        logits = decode_logits(rotated, state.k, positions, sm_scale=spec.sm_scale)
        logits = logits[:, :, 0]  # (B, Hq, S)
        mass = jax.nn.softmax(logits, axis=-1)
        if per == "kv":
            mass = selection.reduce_group(mass, spec.num_kv_heads, "mean")
        slots = jnp.arange(spec.capacity, dtype=jnp.int32)
        is_held = slots < state.length[:, None, None]
        chosen = selection.top_k(mass, budget, is_held)  # (B, lists, N)

        grouped = logits.reshape(spec.batch, spec.num_kv_heads, spec.group, -1)
        listed = chosen.reshape(spec.batch, spec.num_kv_heads, -1, chosen.shape[-1])
        listed = jnp.broadcast_to(listed, (*grouped.shape[:3], chosen.shape[-1]))
        kept = jnp.take_along_axis(grouped, jnp.maximum(listed, 0), axis=-1)
        kept = jnp.where(listed >= 0, kept, -jnp.inf)
        lse = jax.nn.logsumexp(kept, axis=-1)
        weights = jnp.exp(kept - lse[..., None]).astype(state.v.dtype)
        per_head = chosen.reshape(spec.batch, spec.num_kv_heads, -1)
        values = buffers.gather(state.v, per_head)
        if per == "kv":
            equation = "bkgn,bknd->bkgd"
        else:
            equation = "bkgn,bkgnd->bkgd"
            values = values.reshape(*grouped.shape[:3], -1, spec.head_dim)
        out = jnp.einsum(equation, weights, values, preferred_element_type=jnp.float32)
        diagnostics = Diagnostics(
            attended=chosen,
            lse=lse.reshape(spec.batch, spec.num_q_heads, 1),
            refreshed=jnp.ones_like(state.length, bool),
            exact=kept_slots.holds_all(chosen, state.length, q.shape[1]),
        )
        return state, out.reshape(q.shape).astype(q.dtype), diagnostics

    def traffic(spec, length):
        lists = spec.group if per == "query" else 1
        values = lists * buffers.kv_bytes(spec, min(budget, length)) // 2
        return Traffic(kv=values, metadata=buffers.kv_bytes(spec, length) // 2)

    return Method(
        init=init,
        prefill=prefill,
        finish=lambda state: state,
        append=contiguous.extend,
        inspect_step=inspect_step,
        traffic=traffic,
        exact_prompt=True,
    )
