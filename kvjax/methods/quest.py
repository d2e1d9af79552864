"""Quest: read only the pages whose keys could score highest for this query."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots, paged
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
    budget_ratio: float | None = None,
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
        budget_ratio: if given, this share of the tokens so far is read where that is
            more than `budget`. RetroAttention: 0.15, with a budget of 256.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.paged.Paged`.

    State: pages `(B, Hkv, NP, P, 2*D)`; page_min, page_max `(B, Hkv, NP, D)`; all in
        the cache dtype.
    Reads per step and layer: 2*NP*D*Hkv elements of summaries and 2*budget*D*Hkv of KV
        (Hq instead of Hkv lists for per="query"), per row.
    Exact when: budget >= length.

    Raises:
        ValueError: unless `budget` is a multiple of `page_size` of at least `recent`
            pages, and `budget_ratio` in (0, 1].

    Source:
        Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM
        Inference", ICML 2024, arXiv:2406.10774, Sec. 3.4, Alg. 1.
    Deviations:
        per="kv" shares one list among the query heads of a group (RetroAttention's cost
        model); the official kernels know no groups, its evaluation is per="query". The
        paper leaves the first two layers to full attention: `dense_layers` does here.

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
    if budget_ratio is not None and not 0 < budget_ratio <= 1:
        raise ValueError(f"{budget_ratio=} must be in (0, 1], or None.")
    selection.check_reduce(group_reduce=group_reduce)

    def pages_read(length):
        """Of a number or an array of tokens so far: the most that a list holds."""
        xp = jnp if isinstance(length, jax.Array) else np
        share = xp.floor(np.float32(budget_ratio) * xp.asarray(length, np.float32))
        return xp.maximum(budget, share.astype(np.int32)) // page_size

    def select(state, q):
        scores = page_bounds(
            q[:, :, 0],
            state.page_min,
            state.page_max,
            group_reduce=group_reduce if per == "kv" else "none",
        )
        # The newest pages come first whatever they score.
        page = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        current = ((state.length - 1) // page_size)[:, None, None]
        scores = jnp.where(page > current - recent, jnp.inf, scores)
        available = paged.is_available(state)[:, None]
        if budget_ratio is None:
            return selection.top_k(scores, budget // page_size, available)
        most = int(pages_read(state.spec.capacity))
        chosen = selection.top_k(scores, most, available)
        rank = jnp.arange(chosen.shape[-1], dtype=jnp.int32)
        return jnp.where(rank < pages_read(state.length)[:, None, None], chosen, -1)

    def prefill(state, q, k, v, lengths):
        state = paged.extend(state, k, v, lengths)
        rotated, positions = contiguous.rotate_queries(
            state.spec, q, state.length, lengths
        )
        return state, paged.attend_all(state, rotated, positions).out.astype(q.dtype)

    def init(spec, weights=None):
        del weights
        return paged.paged(spec, page_size)

    def inspect_step(state, q):
        rotated, positions = contiguous.rotate_queries(state.spec, q, state.length)
        chosen = select(state, rotated)
        out, lse = page_attention(
            rotated, state.pages, chosen, positions, sm_scale=state.spec.sm_scale
        )
        attended = paged.tokens_of(chosen, page_size, state.length)
        exact = kept_slots.holds_all(attended, state.length, q.shape[1])
        diagnostics = Diagnostics(attended, lse, exact.all(-1), exact)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        num_pages = -(-length // page_size)
        most = budget // page_size
        if budget_ratio is not None:
            most = int(pages_read(length))
        read = min(most, num_pages) * page_size
        lists = spec.group if per == "query" else 1
        return Traffic(
            kv=lists * buffers.kv_bytes(spec, read),
            metadata=buffers.kv_bytes(
                spec, num_pages
            ),  # a minimum and a maximum a page
        )

    return Method(
        init=init,
        prefill=prefill,
        finish=lambda state: state,
        append=paged.extend,
        inspect_step=inspect_step,
        traffic=traffic,
        select=select,
        rewind=paged.rewind,
        exact_prompt=True,
    )
