"""Quest: read only the pages whose keys could score highest for this query."""

from typing import Literal

import jax.numpy as jnp

from kvjax import cache, paging, selection
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.partials import softmax_only
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_scores import page_bounds


@softmax_only
def quest(
    *,
    budget: int = 1024,
    page_size: int = 16,
    per: Literal["kv", "query"] = "kv",
    group_reduce: selection.Reduce = "mean",
    recent: int = 1,
) -> Method:
    """Keeps every key; per step reads page summaries, then `budget` tokens.

    Page score (Sec. 3.4): sum_d max(q_d * page_min_d, q_d * page_max_d), an upper bound
    of q . k over the page. The newest pages are always read and count in the budget.
    The prompt is attended to in full.

    The paper leaves the first two layers dense: `dense_layers:first=2+quest:...`.

    Args:
        budget: tokens read per step and list, a multiple of `page_size`. Paper:
            256-4096.
        page_size: tokens per page. Paper: 16.
        per: one list of pages per `kv` head, or per `query` head.
        group_reduce: `mean` or `max` of the scores over a group, for per="kv".
        recent: newest pages that are always read. Official: 1.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.paging.Paged`.

    State: pages `(B, Hkv, NP, P, 2*D)`; page_min, page_max `(B, Hkv, NP, D)`; all in
        the cache dtype.
    Reads per step and layer: 2*NP*D*Hkv elements of summaries and 2*budget*D*Hkv of KV
        (Hq instead of Hkv lists for per="query"), per row.
    Exact when: budget >= length.

    Raises:
        ValueError: unless `budget` is a multiple of `page_size` of at least `recent`
            pages.

    Source:
        Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM
        Inference", ICML 2024, arXiv:2406.10774, Sec. 3.4, Alg. 1.
    Deviations:
        per="kv" shares one list among the query heads of a group (RetroAttention's cost
        model); the official kernels know no groups, its evaluation is per="query".

    Example:
        >>> method = kvjax.quest(budget=256)
        >>> state = method.init(spec)
    """
    if page_size < 1:
        raise ValueError(f"{page_size=} must be at least 1 token.")
    if budget < 1 or budget % page_size:
        raise ValueError(f"{budget=} must be a positive multiple of {page_size=}.")
    if not 1 <= recent <= budget // page_size:
        raise ValueError(
            f"{recent=} must be in [1, {budget // page_size}], the pages of {budget=} "
            f"at {page_size=}."
        )
    if per not in ("kv", "query"):
        raise ValueError(f"{per=} must be 'kv' or 'query'.")
    selection.check_reduce(group_reduce=group_reduce)

    def select(state, rotated):
        scores = page_bounds(
            rotated[:, :, 0],
            state.page_min,
            state.page_max,
            group_reduce=group_reduce if per == "kv" else "none",
        )
        # The newest pages come first whatever they score.
        page = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        current = ((state.length - 1) // page_size)[:, None, None]
        scores = jnp.where(page > current - recent, jnp.inf, scores)
        available = paging.is_available(state)[:, None]
        return selection.top_k(scores, budget // page_size, available)

    def prefill(state, q, k, v, lengths):
        state = paging.extend(state, k, v, lengths)
        rotated, positions = cache.rotate_queries(state.spec, q, state.length, lengths)
        return state, paging.attend_all(state, rotated, positions).out.astype(q.dtype)

    def init(spec, weights=None):
        del weights
        return paging.paged(spec, page_size)

    def inspect_step(state, q):
        rotated, positions = cache.rotate_queries(state.spec, q, state.length)
        chosen = select(state, rotated)
        out, lse = page_attention(
            rotated, state.pages, chosen, positions, sm_scale=state.spec.sm_scale
        )
        attended = paging.tokens_of(chosen, page_size, state.length)
        exact = cache.holds_all(attended, state.length, q.shape[1])
        diagnostics = Diagnostics(attended, lse, state.length <= budget, exact)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        num_pages = -(-length // page_size)
        read = min(budget // page_size, num_pages) * page_size
        lists = spec.group if per == "query" else 1
        return Traffic(
            kv=lists * cache.kv_bytes(spec, read),
            metadata=cache.kv_bytes(spec, num_pages),  # a minimum and a maximum a page
        )

    return Method(
        init=init,
        prefill=prefill,
        finish=lambda state: state,
        append=paging.extend,
        inspect_step=inspect_step,
        traffic=traffic,
    )
