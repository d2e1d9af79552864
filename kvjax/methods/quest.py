"""Quest: read only the pages whose keys could score highest for this query."""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Lists, Method, Traffic
from kvjax.stores import buffers, contiguous, paged, step
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_scores import page_bounds

Per = Literal["kv", "query"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`quest`."""

    budget: int
    page_size: int
    per: Per
    group_reduce: selection.Reduce
    recent: int
    budget_ratio: float | None

    def __post_init__(self) -> None:
        budget, page_size = self.budget, self.page_size
        recent, per, budget_ratio = self.recent, self.per, self.budget_ratio
        if page_size < 1:
            raise ValueError(f"{page_size=} must be at least 1 token.")
        if budget < 1 or budget % page_size:
            raise ValueError(f"{budget=} must be a positive multiple of {page_size=}.")
        if not 1 <= recent <= budget // page_size:
            raise ValueError(
                f"{recent=} must be in [1, {budget // page_size}], the pages of "
                f"{budget=} at {page_size=}."
            )
        if per not in ("kv", "query"):
            raise ValueError(f"{per=} must be 'kv' or 'query'.")
        if budget_ratio is not None and not 0 < budget_ratio <= 1:
            raise ValueError(f"{budget_ratio=} must be in (0, 1], or None.")
        selection.check_reduce(group_reduce=self.group_reduce)

    def pages_read(self, length: int) -> int:
        """Returns how many pages a list holds at most, `length` tokens so far."""
        if self.budget_ratio is None:
            return self.budget // self.page_size
        share = np.floor(np.float32(self.budget_ratio) * np.float32(length))
        return max(self.budget, int(share)) // self.page_size


@typed
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
        the cache dtype. What is appended is kept.
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
    options = Options(budget, page_size, per, group_reduce, recent, budget_ratio)
    return Method(
        init=functools.partial(init, options),
        prefill=step.prefill,
        finish=step.finish_unchanged,
        append=paged.extend,
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        select=functools.partial(select, options),
        rewind=paged.rewind,
        exact_prompt=True,
        listed=Lists(functools.partial(listed, options)),
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> paged.Paged:
    """Makes an empty store in pages."""
    del weights
    return paged.paged(spec, options.page_size)


def select(
    options: Options, state: paged.Paged, q: Float[Array, "B Hq 1 D"]
) -> Int[Array, "B H K"]:
    """Chooses the newest pages, then those of the highest bound, best first."""
    scores = page_bounds(
        q[:, :, 0],
        state.page_min,
        state.page_max,
        group_reduce=options.group_reduce if options.per == "kv" else "none",
    )
    # The newest pages come first whatever they score.
    page = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    current = ((state.length - 1) // options.page_size)[:, None, None]
    scores = jnp.where(page > current - options.recent, jnp.inf, scores)
    available = paged.is_available(state)[:, None]
    most = options.pages_read(state.spec.capacity)
    chosen = selection.top_slots(scores, most, available)
    if options.budget_ratio is None:
        return chosen
    share = jnp.floor(
        jnp.float32(options.budget_ratio) * state.length.astype(jnp.float32)
    )
    number = jnp.maximum(options.budget, share.astype(jnp.int32)) // options.page_size
    rank = jnp.arange(chosen.shape[-1], dtype=jnp.int32)
    return jnp.where(rank < number[:, None, None], chosen, -1)


def inspect_step(
    options: Options, state: paged.Paged, q: Float[Array, "B Hq 1 D"]
) -> tuple[paged.Paged, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the chosen pages."""
    rotated, _ = contiguous.rotate_queries(state.spec, q, state.length)
    chosen = select(options, state, rotated)
    state, there = paged.bring(state, chosen)
    out, lse = page_attention(
        rotated,
        there.pages,
        there.page_ids,
        there.positions,
        sm_scale=state.spec.sm_scale,
    )
    attended = paged.tokens_of(chosen, options.page_size, state.length)
    diagnostics = step.diagnose(attended, lse, state.length)
    return state, out.astype(q.dtype), diagnostics


def listed(options: Options, spec: CacheSpec, length: int) -> int:
    """Counts the pages that the lists of a KV head hold at most."""
    num_pages = -(-length // options.page_size)
    most = min(options.pages_read(length), num_pages)
    return most * (spec.group if options.per == "query" else 1)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the pages of a step, and of the extremes of all pages."""
    num_pages = -(-length // options.page_size)
    read = min(options.pages_read(length), num_pages) * options.page_size
    lists = spec.group if options.per == "query" else 1
    return Traffic(
        kv=lists * buffers.row_bytes(spec, read, "both"),
        metadata=buffers.vector_bytes(spec, 2 * num_pages),  # a minimum, a maximum
    )
