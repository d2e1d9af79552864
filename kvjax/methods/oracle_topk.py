"""Exact top-k by the true logits: the best any choice of `budget` tokens can do."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax import dense
from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, step
from pallas_kernels.decode_attention import decode_logits


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`oracle_topk`."""

    budget: int
    per: Literal["kv", "query"]

    def __post_init__(self) -> None:
        budget, per = self.budget, self.per
        if budget < 1:
            raise ValueError(f"{budget=} must be at least 1 token.")
        if per not in ("kv", "query"):
            raise ValueError(f"{per=} must be 'kv' or 'query'.")


@typed
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

    State: k, v `(B, Hkv, S, D)` cache dtype; length `(B,)` int32. What is appended is
        kept.
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
    options = Options(budget, per)
    return dense.method()._replace(
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        rewind=None,
    )


def inspect_step(
    options: Options, state: contiguous.Contiguous, q: Float[Array, "B Hq 1 D"]
) -> tuple[contiguous.Contiguous, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the tokens of most mass."""
    spec = state.spec
    rotated, positions = contiguous.rotate_queries(spec, q, state.length)
    logits = decode_logits(rotated, state.k, positions, sm_scale=spec.sm_scale)
    logits = logits[:, :, 0]  # (B, Hq, S)
    mass = jax.nn.softmax(logits, axis=-1)
    if options.per == "kv":
        mass = selection.reduce_group(mass, spec.num_kv_heads, "mean")
    slots = jnp.arange(spec.capacity, dtype=jnp.int32)
    is_held = slots < state.length[:, None, None]
    chosen = selection.top_slots(mass, options.budget, is_held)  # (B, lists, N)

    grouped = logits.reshape(spec.batch, spec.num_kv_heads, spec.group, -1)
    listed = chosen.reshape(spec.batch, spec.num_kv_heads, -1, chosen.shape[-1])
    listed = jnp.broadcast_to(listed, (*grouped.shape[:3], chosen.shape[-1]))
    kept = jnp.take_along_axis(grouped, jnp.maximum(listed, 0), axis=-1)
    kept = jnp.where(listed >= 0, kept, -jnp.inf)
    lse = jax.nn.logsumexp(kept, axis=-1)
    weights = jnp.exp(kept - lse[..., None]).astype(state.v.dtype)
    per_head = chosen.reshape(spec.batch, spec.num_kv_heads, -1)
    values = buffers.gather(state.v, per_head)
    if options.per == "kv":
        equation = "bkgn,bknd->bkgd"
    else:
        equation = "bkgn,bkgnd->bkgd"
        values = values.reshape(*grouped.shape[:3], -1, spec.head_dim)
    out = jnp.einsum(equation, weights, values, preferred_element_type=jnp.float32)
    lse = lse.reshape(spec.batch, spec.num_q_heads, 1)
    diagnostics = step.diagnose(chosen, lse, state.length)
    # Every key was read, whatever it was read for.
    diagnostics = diagnostics._replace(refreshed=jnp.ones_like(state.length, bool))
    return state, out.reshape(q.shape).astype(q.dtype), diagnostics


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the chosen values, and of all keys."""
    lists = spec.group if options.per == "query" else 1
    read = min(options.budget, length)
    values = lists * buffers.row_bytes(spec, read, "values")
    return Traffic(kv=values, metadata=buffers.row_bytes(spec, length, "keys"))
