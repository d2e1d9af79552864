"""EntmaxKV: read the pages that may hold the support of entmax attention."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from kvjax.attention.choices import check_choices
from kvjax.attention.partials import entmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Lists, Method, Traffic
from kvjax.methods.entmaxkv import attention, page_bounds, threshold
from kvjax.stores import buffers, contiguous, paged, step


class EntmaxKVState(NamedTuple):
    """State of :func:`entmaxkv`, one layer."""

    store: paged.Paged
    moments: paged.Moments | None  # of the Gaussian selector
    # Pages that `gaussian` wanted and the budget left out, summed over steps.
    overflow: Int[Array, "B H"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`entmaxkv`."""

    budget: int | None
    page_size: int
    selector: Literal["topk", "gaussian"]
    per: Literal["kv", "query"]
    group_reduce: selection.Reduce
    max_quantile: float
    safety_margin_z: float
    excess: float
    tau_mode: attention.TauMode
    certified: bool

    def __post_init__(self) -> None:
        budget, page_size, selector = self.budget, self.page_size, self.selector
        tau_mode, certified = self.tau_mode, self.certified
        if page_size < 1:
            raise ValueError(f"{page_size=} must be at least 1 token.")
        check_choices(self)
        if selector == "topk" and (budget is None or tau_mode != "exact"):
            raise ValueError(
                f"{budget=} and {tau_mode=}: selector='topk' needs a budget, and "
                "estimates no threshold; use selector='gaussian'."
            )
        if selector == "gaussian" and certified:
            raise ValueError(
                f"{certified=} reads by bounds: it goes with selector='topk', not "
                f"{selector=}."
            )
        if budget is not None and (budget < 2 * page_size or budget % page_size):
            raise ValueError(
                f"{budget=} must be a multiple of {page_size=} of at least two pages."
            )
        max_quantile, margin, excess = (
            self.max_quantile,
            self.safety_margin_z,
            self.excess,
        )
        if not 0 < max_quantile < 1 or max_quantile ** (1 / page_size) == 1:
            raise ValueError(
                f"{max_quantile=} must be in (0, 1), and its {page_size=}-th root "
                "below 1."
            )
        if not (margin >= 0 and excess >= 0):
            raise ValueError(
                f"safety_margin_z={margin!r} and {excess=} must be at least 0."
            )

    @property
    def is_gaussian(self) -> bool:
        """Says whether pages are chosen by an estimate of the threshold."""
        return self.selector == "gaussian"


@typed
@entmax_only
def entmaxkv(
    *,
    budget: int | None = 1024,
    page_size: int = 16,
    selector: Literal["topk", "gaussian"] = "topk",
    per: Literal["kv", "query"] = "kv",
    group_reduce: selection.Reduce = "max",
    max_quantile: float = 0.995,
    safety_margin_z: float = 0.0,
    excess: float = 0.1,
    tau_mode: attention.TauMode = "exact",
    certified: bool = False,
) -> Method:
    """Keeps every key; per step reads pages that may have weight, of an entmax model.

    Entmax gives exactly 0 to what lies below its threshold: if the pages read hold all
    the rest, nothing is approximated. `Diagnostics.exact` says for which heads that is
    proved: where the bounds of all other pages are at or below the threshold.

    Two selectors. `topk` reads as many pages as the budget holds, those with the
    highest bound sum_d max(q_d * page_min_d, q_d * page_max_d). `gaussian` estimates
    the threshold from the mean and variance of each page's keys and reads the pages
    whose likely maximum exceeds it, however many, up to the budget. The page of the
    newest token is always read and counts in the budget. The prompt is attended to in
    full.

    Args:
        budget: most tokens read per step and list, a multiple of `page_size` of at
            least two pages. None, for `gaussian` alone, sets no limit. Paper's code: a
            quarter of the context.
        page_size: tokens per page. Paper's code: 16.
        selector: `topk` or `gaussian`; the latter for alpha 4/3, 1.5 and 2.
        per: one list of pages per `kv` head, or per `query` head.
        group_reduce: for per="kv", over the query heads of a group: `max` reads what
            any of them ranks highest (with `gaussian`, the union of their pages),
            `mean` goes by the mean of their bounds or margins.
        max_quantile: of `gaussian`: which quantile of a page's maximum is likely.
        safety_margin_z: of `gaussian`: lowers the threshold by so many deviations.
        excess: of `gaussian`: lowers it by this share of what it exceeds a typical
            page by.
        tau_mode: `exact` solves for the threshold of what was read. With `gaussian`
            also the estimate as it is (`fixed`), or after three steps towards the
            solution (`corrected`): weights then need not sum to 1.
        certified: goes on reading, `budget` tokens at a time, best bound first, until
            every head is proved exact: the output is that of dense entmax. With `topk`.

    Returns:
        A :class:`kvjax.Method` over :class:`EntmaxKVState`.

    State: pages `(B, Hkv, NP, P, 2*D)`; page_min, page_max `(B, Hkv, NP, D)`, all in
        the cache dtype; `gaussian` also mean, variance `(B, Hkv, NP, D)` float32. What
        is appended is kept.
    Reads per step and layer: 2*NP*D*Hkv elements of summaries and at most
        2*budget*D*Hkv of KV (Hq instead of Hkv lists for per="query"), per row; with
        `certified` as much KV as it takes.
    Exact when: the pages read hold the support, as `Diagnostics.exact` can prove;
        budget >= length; certified.

    Raises:
        ValueError: for options out of range or that do not go together; from `init`,
            for a softmax model, and for an alpha that `gaussian` does not know.

    Source:
        Duarte, Couceiro, Treviso, "EntmaxKV: Support-Aware Decoding for Entmax
        Attention", 2026, arXiv:2605.21649. Official code: deep-spin/entmaxkv@8a33875,
        the third generation, after 47baa75 and 1a1a21e.
    Deviations:
        per="kv" shares one list among the query heads of a group, by default; the
        authors' code lists pages per query head. tau_mode is `exact` by default, theirs
        `corrected`. `fixed` and `corrected` are those of 8a33875: the estimate is moved
        inside of a bracket, three times; the generations before clamp it to the pages
        first and move it once, without a bracket, so that weights can vanish or blow
        up. Margins are plain constants, as there; the generations before overrode them
        by the mean deviation of the whole batch. A budget counts the newest page, as
        there. Left out: ALiBi and its mixture of pages, the dense step where a row of
        the batch is short. The certificate and `certified` are ours. The paper's text
        could not be consulted, only its abstract and code.

    Example:
        >>> method = kvjax.entmaxkv(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(
        budget,
        page_size,
        selector,
        per,
        group_reduce,
        max_quantile,
        safety_margin_z,
        excess,
        tau_mode,
        certified,
    )
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=step.finish_unchanged,
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=True,
        listed=None if certified else Lists(functools.partial(listed, options)),
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> EntmaxKVState:
    """Makes an empty store in pages."""
    del weights
    if options.is_gaussian:
        threshold.gaussian_beta(spec.alpha)
    store = paged.paged(spec, options.page_size)
    lists = spec.num_kv_heads if options.per == "kv" else spec.num_q_heads
    return EntmaxKVState(
        store,
        paged.moments(store) if options.is_gaussian else None,
        jnp.zeros((spec.batch, lists), jnp.int32),
    )


def prefill(
    options: Options,
    state: EntmaxKVState,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[EntmaxKVState, Float[Array, "B Hq T D"]]:
    """Attends to everything."""
    store, chunk = step.read_chunk(state.store, q, k, v, lengths)
    return update(state, store, k.shape[2]), chunk.out


def append(
    options: Options,
    state: EntmaxKVState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> EntmaxKVState:
    """Writes the next token."""
    return update(state, paged.extend(state.store, k, v), k.shape[2])


def update(state: EntmaxKVState, store: paged.Paged, added: int) -> EntmaxKVState:
    """Returns the state with a store that has at most `added` new tokens."""
    moments = state.moments
    if moments is not None:
        moments = paged.update_moments(moments, store, added)
    return state._replace(store=store, moments=moments)


def inspect_step(
    options: Options, state: EntmaxKVState, q: Float[Array, "B Hq 1 D"]
) -> tuple[EntmaxKVState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the listed pages, and proves what it can."""
    store = state.store
    spec, length = store.spec, store.length
    page_size, num_pages = options.page_size, store.pages.shape[2]
    rotated, _ = contiguous.rotate_queries(spec, q, length)
    row = rotated[:, :, 0]
    historical = page_bounds.is_historical(length, num_pages, page_size)
    bounds = page_bounds.score_bounds(
        row, store.page_min, store.page_max, sm_scale=spec.sm_scale
    )
    tau_hat = None
    if state.moments is not None:
        scores, tau_hat = score_by_margin(
            options, store, state.moments, row, historical
        )
    else:
        scores = score_by_bound(options, store, bounds, historical)
    size = num_pages
    if options.budget is not None:
        size = min(options.budget // page_size, num_pages)
    ids, count = page_bounds.list_pages(scores, length, page_size=page_size, size=size)
    if options.is_gaussian:
        left_out = (scores > -jnp.inf).sum(-1, dtype=jnp.int32) - (count - 1)
        state = state._replace(overflow=state.overflow + left_out)

    sm_scale, alpha = spec.sm_scale, spec.alpha
    if options.certified:
        attended_pages, ids, exact = attention.attend_certified(
            row, store.pages, bounds, ids, length, sm_scale=sm_scale, alpha=alpha
        )
        out, value = attended_pages.out, attended_pages.value
    else:
        store, there = paged.bring(store, ids)
        state = state._replace(store=store)
        attended_pages = attention.attend_pages(
            row,
            there.pages,
            there.page_ids,
            there.length,
            sm_scale=sm_scale,
            alpha=alpha,
            tau_mode=options.tau_mode,
            tau_hat=tau_hat,
        )
        out, value = attended_pages.out, attended_pages.value
        if options.tau_mode == "exact":
            out, value = attention.fastest(
                attended_pages,
                rotated,
                there.pages,
                there.page_ids,
                there.positions,
                sm_scale=sm_scale,
                alpha=alpha,
            )
        exact = page_bounds.certificate(
            bounds, ids, attended_pages.tau, length, alpha=alpha, page_size=page_size
        )
        # An estimated threshold proves nothing.
        exact &= options.tau_mode == "exact"
    attended = paged.tokens_of(ids, page_size, length)
    diagnostics = step.diagnose(attended, value[..., None], length)
    return (
        state,
        out[:, :, None].astype(q.dtype),
        diagnostics._replace(exact=exact),
    )


def listed(options: Options, spec: CacheSpec, length: int) -> int:
    """Counts the pages that the lists of a KV head hold at most."""
    most = -(-length // options.page_size)
    if options.budget is not None:
        most = min(options.budget // options.page_size, most)
    return most * (spec.group if options.per == "query" else 1)


def score_by_bound(
    options: Options,
    store: paged.Paged,
    bounds: Float[Array, "B Hq NP"],
    historical: Bool[Array, "B NP"],
) -> Float[Array, "B H NP"]:
    """Scores pages for each list by the bounds of its heads."""
    if options.per == "query":
        return bounds
    if options.group_reduce == "max":
        # A constant added to a head's scores changes none of its weights, nor may
        # it change which head of the group is served first.
        before = jnp.where(historical[:, None], bounds, -jnp.inf)
        best = before.max(-1, keepdims=True)
        # Every head's best ties with the others', exactly: fused with the scale,
        # the difference of two equal bounds is the rounding of one.
        below = bounds - jnp.where(best == -jnp.inf, 0.0, best)
        bounds = jnp.where(bounds == best, 0.0, below)
    return selection.reduce_group(bounds, store.spec.num_kv_heads, options.group_reduce)


def score_by_margin(
    options: Options,
    store: paged.Paged,
    moments: paged.Moments,
    row: Float[Array, "B Hq D"],
    historical: Bool[Array, "B NP"],
) -> tuple[Float[Array, "B H NP"], Float[Array, "B Hq"]]:
    """Scores pages that reach the estimated threshold, -inf for others.

    Returns:
        The scores, and that threshold.
    """
    spec, alpha = store.spec, store.spec.alpha
    mean, deviation = page_bounds.score_moments(row, *moments, sm_scale=spec.sm_scale)
    middle, spread = page_bounds.global_moments(mean, deviation, historical)
    tokens = options.page_size * historical.sum(-1).astype(jnp.float32)
    tau_hat = threshold.estimate_threshold(
        middle[..., None], spread[..., None], tokens[:, None, None], alpha=alpha
    )
    margins = page_bounds.gaussian_margins(
        mean,
        deviation,
        tau_hat,
        historical,
        alpha=alpha,
        page_size=options.page_size,
        max_quantile=options.max_quantile,
        safety_margin_z=options.safety_margin_z,
        excess=options.excess,
    )
    if options.per == "kv":
        margins = selection.reduce_group(
            margins, spec.num_kv_heads, options.group_reduce
        )
    return jnp.where(margins > 0, margins, -jnp.inf), tau_hat


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the pages of a step, and of the summaries of all pages."""
    budget, page_size = options.budget, options.page_size
    num_pages = -(-length // page_size)
    lists = spec.group if options.per == "query" else 1
    most = num_pages
    if budget is not None and not options.certified:
        most = min(budget // page_size, num_pages)
    metadata = buffers.vector_bytes(spec, 2 * num_pages)
    if options.is_gaussian:
        wide = jnp.dtype(jnp.float32).itemsize
        metadata = metadata // jnp.dtype(spec.dtype).itemsize * wide
    kv = lists * buffers.row_bytes(spec, most * page_size, "both")
    return Traffic(kv, metadata)
