"""Top-k retrieval completed by linear attention: what is not read is estimated."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import Partial, merge, softmax_only
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.methods.topk_completion import (
    estimators,
    feature_maps,
    linear_attention,
    map_files,
    prompt_summary,
    slots_or_pages,
)
from kvjax.stores import buffers, contiguous, kept_slots, paged
from pallas_kernels.decode_attention import decode_logits
from pallas_kernels.page_scores import page_bounds
from pallas_kernels.topk import top_k


class CompletionPrompt(NamedTuple):
    """State of :func:`topk_completion` until the prompt ends, one layer."""

    store: slots_or_pages.Store
    queries: Float[Array, "B Hq W D"] | None  # the newest, rotated, a ring
    weights: Any  # of a learned map
    gain: Float[Array, "Hq"] | None  # lam of each head, if it was calibrated


class CompletionState(NamedTuple):
    """State of :func:`topk_completion` while decoding, one layer."""

    store: slots_or_pages.Store
    middle_end: Int[Array, "B"]  # the middle is [num_sinks, middle_end), no outliers
    outliers: Int[Array, "B Hkv M"] | None  # positions of keys kept exact, -1 = none
    params: Any  # of the feature map
    summary: Any  # of the middle
    gain: Float[Array, "Hq"] | None


class _Plan(NamedTuple):
    """The static sizes of one layer."""

    estimator: estimators.Estimator | None  # None: selection alone
    retrieved: int  # K, tokens a list
    outliers: int
    newest: int  # most tokens behind the middle
    charged: float  # what the summary and the map cost a step, in tokens a list


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
    _check(budget, num_sinks, tail, features, selector, page_size, per, charge, window)
    selection.check_reduce(group_reduce=group_reduce)
    if not 0 <= lam <= 1:
        raise ValueError(f"{lam=} must be in [0, 1].")
    if calibration < 1:
        raise ValueError(f"{calibration=} must be at least 1 query.")
    kind, file = feature_map, None
    if feature_map not in (*feature_maps.NAMES, "moment"):
        file = map_files.load(feature_map)
        kind = file.kind
    is_learned, is_moment = kind == "learned", kind == "moment"
    if num_outliers is None:
        num_outliers = 4 if is_learned else 0
    if not 0 <= num_outliers <= budget - num_sinks - tail:
        raise ValueError(
            f"{num_outliers=} must be in [0, {budget - num_sinks - tail}], what "
            f"{budget=} leaves after {num_sinks=} and {tail=}."
        )
    if is_moment and (num_outliers or not mass_cap):
        raise ValueError(
            f"feature_map='moment' needs mass_cap=true and num_outliers=0, not "
            f"{mass_cap=} and {num_outliers=}: its mass can be anything, and its keys "
            "have no weight of their own."
        )
    if mass_cap and per == "kv" and group_reduce == "mean":
        raise ValueError(
            f"{mass_cap=} needs the largest score of a group: with {group_reduce=} "
            "give mass_cap=false, or per='query'."
        )

    @functools.cache
    def estimator_of(num_features):
        if is_moment:
            return estimators.moment()
        if is_learned:
            return estimators.of_features(feature_maps.learned(num_features))
        return estimators.of_features(feature_maps.named(kind, num_features))

    def plan(spec, weights=None) -> _Plan:
        """Sizes that follow from shapes alone."""
        if weights is None and is_learned:
            weights = file.layer(spec.layer)[0]
        generated = spec.max_new_tokens if window is None else window
        newest = max(min(tail + generated, spec.capacity), 1)
        if budget >= spec.capacity:
            whole = _in_pages(spec.capacity + page_size - 1)  # the last page too
            return _Plan(None, whole, 0, newest, 0.0)
        room = linear_attention.num_retrieved(budget, num_sinks, tail, num_outliers)
        if lam == 0:
            room += num_outliers
            return _Plan(None, _in_pages(room), 0, newest, 0.0)

        def priced(num_features):
            estimator = estimator_of(num_features)
            return estimator, estimators.tokens(
                estimator, weights, spec, per=per, charge=charge
            )

        most = weights.keys.b_out.shape[-1] if is_learned else features
        estimator, charged = priced(most)
        for fewer in range(features - 1, 0, -1):
            if 2 * charged <= room or is_learned or is_moment:
                break
            estimator, charged = priced(fewer)
        if charged > room:
            raise ValueError(
                f"{budget=} leaves {room} tokens, and the summary of "
                f"{feature_map=} equals {charged} ({charge=}): raise the budget, or "
                "take feature_map='mean' or another charge."
            )
        retrieved = _in_pages(room - charged)
        if is_moment and not retrieved:
            raise ValueError(
                f"{budget=} leaves no token to retrieve beside sinks, tail and "
                f"summary, and the mass of {feature_map=} is bounded by those that "
                "are: raise the budget."
            )
        return _Plan(estimator, retrieved, num_outliers, newest, charged)

    def _in_pages(tokens):
        return tokens if selector == "oracle" else tokens // page_size * page_size

    def init(spec, weights=None):
        gain, weights = None, weights if is_learned else None
        if file is not None:
            from_file, gain = file.layer(spec.layer)
            weights = from_file if weights is None else weights
            map_files.check(file, weights, gain, spec)
            gain = None if gain is None else jnp.asarray(gain, jnp.float32)
        sizes = plan(spec, weights)
        if selector == "oracle":
            store = contiguous.contiguous(spec)
        else:
            store = paged.paged(spec, page_size)
        queries = None
        if sizes.estimator is None:
            return CompletionPrompt(store, None, None, None)
        if weights is not None:
            weights = jax.tree.map(jnp.asarray, weights)
        if not is_learned or sizes.outliers:
            shape = (spec.batch, spec.num_q_heads, calibration, spec.head_dim)
            queries = buffers.allocate(shape, spec.dtype)
        return CompletionPrompt(store, queries, weights, gain)

    def prefill(state, q, k, v, lengths):
        store = slots_or_pages.extend(state.store, k, v, lengths)
        rotated, positions = contiguous.rotate_queries(
            store.spec, q, store.length, lengths
        )
        out = slots_or_pages.attend_all(store, rotated, positions).out
        queries = state.queries
        if queries is not None:
            # The ring holds each slot's newest query: older must not overwrite it.
            length = store.length[:, None]
            is_newest = (positions < length) & (positions >= length - calibration)
            slots = positions % calibration
            queries = buffers.write(queries, rotated, slots, is_newest)
        return state._replace(store=store, queries=queries), out.astype(q.dtype)

    def finish(state):
        store, spec = state.store, state.store.spec
        sizes = plan(spec, state.weights)
        middle_end = jnp.maximum(store.length - tail, num_sinks)
        if sizes.estimator is None:
            return CompletionState(store, middle_end, None, None, None, None)
        made = prompt_summary.complete(
            sizes.estimator,
            sizes.outliers,
            num_sinks,
            store,
            state.queries,
            state.weights,
            middle_end,
        )
        params, outliers, summary = made
        return CompletionState(store, middle_end, outliers, params, summary, state.gain)

    def append(state, k, v):
        state = state._replace(store=slots_or_pages.extend(state.store, k, v))
        if window is None:
            return state
        # At most one token leaves the exact window a step.
        store, end = state.store, state.middle_end
        is_due = end < store.length - tail - window
        state = state._replace(middle_end=end + is_due.astype(jnp.int32))
        if state.summary is None:
            return state
        heads = store.spec.num_kv_heads
        where = jnp.broadcast_to(end[:, None, None], (end.shape[0], heads, 1))
        k, v = slots_or_pages.fetch(store, where)
        valid = jnp.broadcast_to(is_due[:, None, None], where.shape)
        estimator = plan(store.spec, _weights_of(state.params)).estimator
        if not is_learned:  # a map that was fitted to no token stands for none
            valid &= estimator.stands_for(state.summary)[..., None]
        return state._replace(
            summary=estimator.fold(state.params, state.summary, k, v, valid)
        )

    def retrieve(state, rotated, positions, sizes):
        """Positions `(B, lists, K)`, the score no other token exceeds, their pages."""
        store, spec = state.store, state.store.spec
        if selector == "pages" and sizes.retrieved < page_size:
            sizes = sizes._replace(retrieved=0)
        if not sizes.retrieved:
            lists = spec.num_kv_heads if per == "kv" else spec.num_q_heads
            none = jnp.full((spec.batch, lists, 0), -1, jnp.int32)
            return none, jnp.full((spec.batch, lists), jnp.inf, jnp.float32), None
        is_held = prompt_summary.is_middle(
            slots_or_pages.views(store)[0], num_sinks, state.middle_end, state.outliers
        )
        if per == "query":
            is_held = jnp.repeat(is_held, spec.group, axis=1)
        if selector == "oracle":
            logits = decode_logits(rotated, store.k, positions, sm_scale=spec.sm_scale)
            scores = logits[:, :, 0]
            if per == "kv":
                scores = selection.reduce_group(scores, spec.num_kv_heads, group_reduce)
            size = min(sizes.retrieved, spec.capacity)
            values, found = top_k(scores, size, where=is_held)
            return found, values[..., -1], None
        scores = spec.sm_scale * page_bounds(
            rotated[:, :, 0],
            store.page_min,
            store.page_max,
            group_reduce=group_reduce if per == "kv" else "none",
        )
        first = jnp.arange(scores.shape[-1], dtype=jnp.int32) * page_size
        touches = (first + page_size > num_sinks) & (first < state.middle_end[:, None])
        size = min(sizes.retrieved // page_size, scores.shape[-1])
        values, pages = top_k(scores, size, where=touches[:, None])
        found = paged.tokens_of(pages, page_size, state.middle_end)
        is_in = found >= num_sinks
        if state.outliers is not None:
            is_in &= jnp.take_along_axis(is_held, jnp.maximum(found, 0), axis=-1)
        return jnp.where(is_in, found, -1), values[..., -1], pages

    def always_read(state, size):
        """Positions of sinks, the newest and outliers, `(B, Hkv, N)`."""
        spec, length = state.store.spec, state.store.length
        sinks = jnp.arange(num_sinks, dtype=jnp.int32)
        newest = state.middle_end[:, None] + jnp.arange(size, dtype=jnp.int32)
        found = jnp.concatenate(
            [jnp.broadcast_to(sinks, (spec.batch, num_sinks)), newest], axis=1
        )
        found = jnp.where(found < length[:, None], found, -1)[:, None]
        found = jnp.broadcast_to(found, (spec.batch, spec.num_kv_heads, found.shape[2]))
        if state.outliers is None:
            return found
        return jnp.concatenate([found, state.outliers], axis=2)

    def inspect_step(state, q):
        store, spec = state.store, state.store.spec
        length, heads = store.length, spec.num_kv_heads
        sizes = plan(spec, _weights_of(state.params))
        estimator = sizes.estimator
        rotated, positions = contiguous.rotate_queries(spec, q, length)
        found, highest, pages = retrieve(state, rotated, positions, sizes)
        by_head = (spec.batch, heads, found.shape[1] // heads)

        # E: retrieved, sinks, everything behind the middle, outliers.
        always = always_read(state, sizes.newest)
        listed = jnp.concatenate(
            [found, jnp.repeat(always, by_head[2], axis=1)], axis=2
        )
        count = (state.middle_end - num_sinks)[:, None]
        if state.outliers is not None:
            count -= (state.outliers >= 0).sum(-1, dtype=jnp.int32)
        num_retrieved = (found >= 0).sum(-1, dtype=jnp.int32).reshape(by_head)
        num_left = count[..., None] - num_retrieved

        given = estimator, state.params, state.summary, store, rotated, positions
        if pages is not None and state.outliers is None and estimators.fused(estimator):
            exact, part = estimators.read_pages(
                *given, always, pages, num_sinks, state.middle_end, num_left
            )
        else:
            size = found.shape[2]
            exact, part = estimators.read_tokens(*given, listed, size, num_left)
        out = exact.out
        if part is not None:

            def of_heads(x):
                return jnp.repeat(x.reshape(by_head), spec.group // by_head[2], axis=2)

            if mass_cap:
                highest, left = of_heads(highest), of_heads(num_left)
                part = linear_attention.capped(part, highest, left)
            gain = jnp.full((spec.num_q_heads,), lam, jnp.float32)
            gain = gain if state.gain is None else gain * state.gain
            part = linear_attention.scaled(part, gain.reshape(heads, spec.group))
            shape = (spec.batch, spec.num_q_heads, 1)
            part = Partial(part.out.reshape(*shape, -1), part.lse.reshape(shape))
            out = merge(exact, part).out
        holds_all = kept_slots.holds_all(listed, length, spec.num_q_heads)
        diagnostics = Diagnostics(listed, exact.lse, holds_all.all(-1), holds_all)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        sizes = plan(spec)
        lists = spec.group if per == "query" else 1
        # As at the end of the run, when every generated token is there.
        read = num_sinks + sizes.retrieved + sizes.outliers + sizes.newest
        kv = lists * buffers.kv_bytes(spec, min(read, length))
        if selector == "oracle":
            metadata = buffers.kv_bytes(spec, length) // 2
        else:
            metadata = buffers.kv_bytes(spec, -(-length // page_size))
        if sizes.estimator is not None:
            weights = file.layer(spec.layer)[0] if is_learned else None
            rows = spec.batch * spec.num_kv_heads
            metadata += 4 * rows * sizes.estimator.elements(spec.head_dim)
            metadata += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
        return Traffic(kv=kv, metadata=metadata)

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=traffic,
        exact_prompt=True,
    )


def _weights_of(params):
    return params if isinstance(params, feature_maps.Learned) else None


def _check(budget, num_sinks, tail, features, selector, page_size, per, charge, window):
    known = {
        "selector": (selector, ("oracle", "pages")),
        "per": (per, ("kv", "query")),
        "charge": (charge, ("step", "request", "none")),
    }
    for name, (value, choices) in known.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}.")
    if num_sinks < 0 or tail < 0 or num_sinks + tail > budget or budget < 1:
        raise ValueError(
            f"{num_sinks=} and {tail=} must be at least 0 and together at most "
            f"{budget=} tokens, which must be positive."
        )
    for name, value in (("features", features), ("page_size", page_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if window is not None and (window < 0 or window + tail < 1):
        raise ValueError(
            f"{window=} must be at least 0, and with {tail=} at least 1: the newest "
            "token is attended to exactly."
        )
