"""Top-k retrieval completed by linear attention: what is not read is estimated."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import heads, selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Lists, Method, Traffic
from kvjax.methods.topk_completion import map_files, prompt_summary
from kvjax.methods.topk_completion.options import Options, allot
from kvjax.methods.topk_completion.step import (
    CompletionState,
    inspect_step,
    learned_weights,
)
from kvjax.stores import buffers, contiguous, paged, slots_or_pages
from kvjax.stores import step as shared_step


class CompletionPrompt(NamedTuple):
    """State of :func:`topk_completion` until the prompt ends, one layer."""

    store: slots_or_pages.Store
    queries: Float[Array, "B Hq W D"] | None  # the newest, rotated, a ring
    weights: Any  # of a learned map
    gain: Float[Array, "Hq"] | None  # lam of each head, if it was calibrated


@typed
@softmax_only
def topk_completion(
    *,
    budget: int = 1024,
    num_sinks: int = 4,
    tail: int = 16,
    feature_map: str = "anchor",
    features: int = 16,
    selector: Literal["oracle", "pages"] = "oracle",
    page_size: int = 16,
    per: Literal["kv", "query"] = "kv",
    group_reduce: selection.Reduce = "max",
    mass_cap: bool = True,
    lam: float = 1.0,
    num_outliers: int | None = None,
    charge: Literal["step", "request", "none"] = "step",
    window: int | None = None,
    calibration: int = 512,
) -> Method:
    """Reads the top-k tokens, and estimates the rest by linear attention.

    The first `num_sinks` and the last `tail` tokens of the prompt and all generated
    ones are attended to exactly. Of the middle between, a step retrieves K tokens; one
    summary of fixed size, made at the prompt's end, stands for the others: sums of
    positive features phi_k(k) and phi_k(k) v, from which the features of the retrieved
    tokens are subtracted. Numerators and denominators are added, then divided once.
    The prompt is attended to in full.

    The budget is in token equivalents: K is what sinks, tail, outliers, summary and map
    leave of it. With `lam=0` nothing is estimated and K is larger: selection alone.

    Args:
        budget: tokens read per step and list, generated ones not counted.
        num_sinks: first prompt tokens, that are always read. Paper: 4.
        tail: last prompt tokens, that are always read. Paper: 16.
        feature_map: `anchor`, `anchor_hard`, `mean`, `rank1`, `rank1_tilted`, `favor`,
            or `moment`, fitted to each prompt; or a learned one: a file made by
            `kvjax distill`, or `embedded-softmax`, whose map ships with it.
        features: most features of `anchor` and `favor`: fewer where the summary would
            take more than half of what the budget leaves.
        selector: `oracle` ranks all keys by their logits, as the paper does, and saves
            no key traffic; `pages` ranks pages by the bound of :func:`kvjax.quest`.
        page_size: tokens per page, of `pages`.
        per: one list for the query heads of a `kv` head, or one per `query` head.
        group_reduce: `max` or `mean` of the scores over a group, for per="kv".
        mass_cap: bounds the estimated mass by what unread tokens can have, whose scores
            are below those read. Paper: off.
        lam: gain of the estimate in [0, 1]; times that of the head, if the file of the
            map was calibrated. Paper: 1.
        num_outliers: tokens of the middle whose weight the map overestimates most, kept
            exact. None is 4 for a learned map and 0 for others. Paper: 0.
        charge: the summary and the map count in the budget at every `step`; once per
            `request`, spread over its generated tokens; or not at all.
        window: if given, only so many generated tokens stay exact; older ones join the
            middle, whose summary they enter; where the prompt left none to fit the map
            to, or outliers took all, they can only be retrieved. Paper: None.
        calibration: newest prompt queries that maps are fitted to.

    Returns:
        A :class:`kvjax.Method` over :class:`CompletionState`.

    State: k, v `(B, Hkv, S, D)`, or quest's pages for selector="pages"; summary `(B,
        Hkv, F, D + 2)` and the map's arrays, float32; outliers, middle_end int32.
        What is appended is kept; behind a `window` it joins the middle.
    Reads per step and layer: 2*(num_sinks + tail + K + generated)*D*Hkv elements of KV
        (K from Hq lists for per="query"), the summary and the map's arrays in float32,
        and to choose length*D*Hkv elements of keys (`oracle`) or 2*NP*D*Hkv of page
        summaries, per row.
    Exact when: budget >= capacity; K >= the tokens of the middle, or of the pages that
        it touches.

    Raises:
        ValueError: for options out of range or that do not go together; from `init`, if
            the budget does not hold the summary, or a file is of another model.

    Source:
        Hoshi, Miyashita, Deguchi, "Top-K Retrieval with Fixed-Size Linear-Attention
        Completion: Backbone- and KV-Format-Preserving Attention for KV-Cache Read
        Reduction", 2026, arXiv:2604.05438v1; v2: "Residual-Mass Accounting for
        Partial-KV Decoding". Retrieval is exhaustive there, an oracle.
    Deviations:
        The maps that need no training, mass_cap, num_outliers, window, lam per head and
        selector="pages" are ours. The summary is float32 whatever the cache, and
        charged as such, with the map; the paper counts it in the cache's dtype, without
        the map.

    Example:
        >>> method = kvjax.topk_completion(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(
        budget,
        num_sinks,
        tail,
        feature_map,
        features,
        selector,
        page_size,
        per,
        group_reduce,
        mass_cap,
        lam,
        num_outliers,
        charge,
        window,
        calibration,
    )
    return Method(
        init=functools.partial(init, options),
        prefill=prefill,
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=True,
        listed=Lists(functools.partial(listed, options)),
        estimates=True,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> CompletionPrompt:
    """Makes an empty store, with room for the queries that maps are fitted to."""
    gain, weights = None, weights if options.is_learned else None
    if options.file is not None:
        from_file, gain = options.file.layer(spec.layer)
        weights = from_file if weights is None else weights
        map_files.check(options.file, weights, gain, spec)
        gain = None if gain is None else heads.own(spec, jnp.asarray(gain, jnp.float32))
    sizes = allot(options, spec, weights)
    if options.selector == "oracle":
        store = contiguous.contiguous(spec)
    else:
        store = paged.paged(spec, options.page_size)
    if sizes.estimator is None:
        return CompletionPrompt(store, None, None, None)
    if weights is not None:
        weights = jax.tree.map(lambda x: heads.own(spec, jnp.asarray(x)), weights)
    queries = None
    if not options.is_learned or sizes.outliers:
        shape = (spec.batch, spec.num_q_heads, options.calibration, spec.head_dim)
        queries = buffers.allocate(shape, spec.dtype)
    return CompletionPrompt(store, queries, weights, gain)


def prefill(
    state: CompletionPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[CompletionPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything, and keeps the newest queries."""
    store, chunk = shared_step.read_chunk(state.store, q, k, v, lengths)
    queries = state.queries
    if queries is not None:
        queries = buffers.write_newest(
            queries, chunk.rotated, chunk.positions, store.length
        )
    return state._replace(store=store, queries=queries), chunk.out


def finish(options: Options, state: CompletionPrompt) -> CompletionState:
    """Fits the map, and sums up the middle of the prompt."""
    store, num_sinks = state.store, options.num_sinks
    sizes = allot(options, store.spec, state.weights)
    middle_end = jnp.maximum(store.length - options.tail, num_sinks)
    if sizes.estimator is None:
        return CompletionState(store, middle_end, None, None, None, None)
    params, outliers, summary = prompt_summary.complete(
        sizes.estimator,
        sizes.outliers,
        num_sinks,
        store,
        state.queries,
        state.weights,
        middle_end,
    )
    return CompletionState(store, middle_end, outliers, params, summary, state.gain)


def append(
    options: Options,
    state: CompletionState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> CompletionState:
    """Writes the next token; with a `window`, folds the one that leaves it."""
    state = state._replace(store=slots_or_pages.extend(state.store, k, v))
    if options.window is None:
        return state
    # At most one token leaves the exact window a step.
    store, end = state.store, state.middle_end
    is_due = end < store.length - options.tail - options.window
    state = state._replace(middle_end=end + is_due.astype(jnp.int32))
    estimator = allot(options, store.spec, learned_weights(state.params)).estimator
    if estimator is None:
        return state
    shape = (end.shape[0], store.spec.num_kv_heads, 1)
    where = jnp.broadcast_to(end[:, None, None], shape)
    valid = jnp.broadcast_to(is_due[:, None, None], where.shape)
    store, k, v = slots_or_pages.fetch(store, jnp.where(valid, where, -1))
    if not options.is_learned:  # a map that was fitted to no token stands for none
        valid &= estimator.stands_for(state.summary)[..., None]
    return state._replace(
        store=store,
        summary=estimator.fold(state.params, state.summary, k, v, valid),
    )


def listed(options: Options, spec: CacheSpec, length: int) -> int:
    """Counts the tokens that the lists of a KV head hold at most, or their pages."""
    sizes = allot(options, spec)
    lists = spec.group if options.per == "query" else 1
    size = 1 if options.selector == "oracle" else options.page_size
    pages = -(-length // size)
    retrieved = lists * min(sizes.retrieved // size, pages)
    sinks = -(-options.num_sinks // size)
    # The newest may begin with the last token of a page.
    newest = (sizes.newest + size - 2) // size + 1
    return min(retrieved + sinks + newest + sizes.outliers, pages)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    sizes = allot(options, spec)
    lists = spec.group if options.per == "query" else 1
    read = options.num_sinks + sizes.retrieved + sizes.outliers + sizes.newest
    kv = lists * options.token_bytes(spec) * min(read, length)
    if options.selector == "oracle":
        metadata = buffers.row_bytes(spec, length, "keys")
    else:
        metadata = buffers.vector_bytes(spec, 2 * -(-length // options.page_size))
    if sizes.estimator is not None:
        weights = options.weights_of(spec.layer)
        rows = spec.batch * spec.num_kv_heads
        metadata += 4 * rows * sizes.estimator.elements(spec.head_dim)
        metadata += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    return Traffic(kv=kv, metadata=metadata)
