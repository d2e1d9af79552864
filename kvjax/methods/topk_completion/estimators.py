"""The sums that complete a partial softmax, and how a step reads them.

One interface over the positive feature maps and over `moment`, whose readout is not
linear in its sums. Pure functions; the pieces are in
`kvjax.methods.topk_completion.linear_attention`.

    F  features        R  lists of a KV head, 1 or G        N  tokens listed
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial
from kvjax.interface import CacheSpec
from kvjax.methods.topk_completion import linear_attention
from kvjax.methods.topk_completion.feature_maps import FeatureMap, Prompt
from kvjax.methods.topk_completion.linear_attention import product
from kvjax.stores import paged, slots_or_pages
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_attention import Surrogate, page_attention


class Estimator(NamedTuple):
    """An estimate of attention over what is left of the middle.

    Fields:
        fit: `fit(prompt) -> params`.
        summarise: `summarise(params, k, v, valid) -> summary`, in one pass.
        fold: `fold(params, summary, k, v, valid) -> summary` with more tokens.
        stands_for: `stands_for(summary) -> (B, Hkv)`: whether for any token.
        residual: `residual(params, summary, q, k, v, valid, num_left, sm_scale) ->
            Partial`, `q (B, Hkv, G, D)` and the retrieved `k, v (B, Hkv, R, N, D)`.
        elements: numbers a KV head reads per step, for a head dim.
        feature_map: None for `moment`, whose keys have no weight of their own.
    """

    fit: Callable[[Prompt], Any]
    summarise: Callable[..., Any]
    fold: Callable[..., Any]
    stands_for: Callable[[Any], Bool[Array, "B Hkv"]]
    residual: Callable[..., Partial]
    elements: Callable[[int], int]
    feature_map: FeatureMap | None


def of_features(feature_map: FeatureMap) -> Estimator:
    """Makes the estimator of linear attention over positive features."""

    def summarise(
        params: Any,
        k: Float[Array, "B Hkv S D"],
        v: Float[Array, "B Hkv S D"],
        valid: Bool[Array, "B Hkv S"],
    ) -> linear_attention.Summary:
        def log_keys(k: Float[Array, "B Hkv N D"]) -> Float[Array, "B Hkv N F"]:
            return feature_map.log_keys(params, k)

        return linear_attention.summarise(log_keys, k, v, valid)

    def fold(
        params: Any,
        summary: linear_attention.Summary,
        k: Float[Array, "B Hkv N D"],
        v: Float[Array, "B Hkv N D"],
        valid: Bool[Array, "B Hkv N"],
    ) -> linear_attention.Summary:
        k = jnp.where(valid[..., None], k.astype(jnp.float32), 0.0)
        return linear_attention.fold(summary, feature_map.log_keys(params, k), v, valid)

    def residual(
        params: Any,
        summary: linear_attention.Summary,
        q: Float[Array, "B Hkv G D"],
        k: Float[Array, "B Hkv R N D"],
        v: Float[Array, "B Hkv R N D"],
        valid: Bool[Array, "B Hkv R N"],
        num_left: Int[Array, "B Hkv R"],
        sm_scale: float,
    ) -> Partial:
        batch, heads, lists, size, head_dim = k.shape
        ell = feature_map.log_keys(
            params, k.reshape(batch, heads, lists * size, head_dim)
        )
        ell = ell.reshape(batch, heads, lists, size, ell.shape[-1])
        g = feature_map.log_queries(params, q[:, :, :, None], sm_scale)[:, :, :, 0]
        retrieved = linear_attention.Retrieved(ell, v, valid)
        return linear_attention.residual(summary, g, retrieved, num_left)

    # Each one program, also in a step that is not jitted.
    return Estimator(
        feature_map.fit,
        summarise,
        jax.jit(fold),
        lambda summary: (summary.mass > 0).any(-1),
        jax.jit(residual, static_argnums=7),
        feature_map.elements,
        feature_map,
    )


def tokens(
    estimator: Estimator,
    weights: Any,
    spec: CacheSpec,
    *,
    per: str,
    charge: str,
    token: float,
) -> int:
    """Counts what summary and map cost a list and step, in tokens, rounded up.

    Args:
        weights: of a learned map, which the rows of a batch read together; or None.
        per: "kv", or "query": then the lists of a group share the summary.
        charge: "step"; "request", spread over the tokens it generates; or "none".
        token: bytes of one, of a KV head.
    """
    if charge == "none":
        return 0
    wide = jnp.dtype(jnp.float32).itemsize
    shared = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    shared /= spec.batch * spec.num_kv_heads
    num_bytes = wide * estimator.elements(spec.head_dim) + shared
    lists = spec.group if per == "query" else 1
    steps = max(spec.max_new_tokens, 1) if charge == "request" else 1
    return math.ceil(num_bytes / (token * lists * steps))


# --- a step: attention over what is read, and over what is not


def takes_pages(estimator: Estimator | None) -> bool:
    """Says whether :func:`read_pages` can: None, that estimates nothing, always."""
    if estimator is None:
        return True
    feature_map = estimator.feature_map
    return feature_map is not None and feature_map.directions is not None


def read_pages(
    estimator: Estimator | None,
    params: Any,
    summary: Any,
    store: paged.Paged,
    q: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    always: Int[Array, "B Hkv N"],
    pages: Int[Array, "B H K"],
    num_sinks: int,
    middle_end: Int[Array, "B"],
    num_left: Int[Array, "B Hkv R"],
) -> tuple[slots_or_pages.Store, Partial, Partial | None]:
    """Reads the retrieved pages in one pass that starts from the tokens always read.

    Args:
        estimator: for which :func:`takes_pages` holds.
        q: rotated.
        always: positions of those tokens, -1 = none; not of the middle.
        pages: retrieved; of their tokens those of the middle count.
        num_sinks, middle_end: where the middle begins and ends.

    Returns:
        The store; attention over what is read, and over the rest of the middle, which
        is None without an estimator.
    """
    spec = store.spec
    store, within = paged.bring_within(store, pages, always, num_sinks, middle_end)
    k, v = paged.read(store, always)
    out, lse = decode_attention(q, k, v, positions, always, sm_scale=spec.sm_scale)
    grouped = (spec.batch, spec.num_kv_heads, spec.group)
    feature_map = None if estimator is None else estimator.feature_map
    surrogate = whole = None
    if feature_map is not None:
        surrogate, whole = _surrogate_of(
            feature_map,
            params,
            summary,
            q.reshape(*grouped, spec.head_dim),
            spec.sm_scale,
        )
    out, lse, *sums = page_attention(
        q,
        within.pages,
        within.page_ids,
        within.last,
        initial=(out, lse),
        surrogate=surrogate,
        sm_scale=spec.sm_scale,
        first_position=within.first,
    )
    if whole is None:
        return store, Partial(out, lse), None
    values, mass = sums
    values = values.reshape(*grouped, spec.head_dim)
    part = linear_attention.subtract(whole, mass.reshape(grouped), values, num_left)
    return store, Partial(out, lse), part


def _surrogate_of(
    feature_map: FeatureMap,
    params: Any,
    summary: linear_attention.Summary,
    q: Float[Array, "B Hkv G D"],
    sm_scale: float,
) -> tuple[Surrogate, linear_attention.Readout]:
    """The weights that a summary gives tokens, and attention to all of it."""
    directions = feature_map.directions
    if directions is None:
        raise ValueError("no map whose log features are products: see takes_pages.")
    g = feature_map.log_queries(params, q[:, :, :, None], sm_scale)[:, :, :, 0]
    whole = linear_attention.read_out(summary, g)
    shares = whole.shares.reshape(q.shape[0], -1, 1, g.shape[-1])
    return Surrogate(directions(params), summary.shift, shares), whole


def read_tokens(
    estimator: Estimator | None,
    params: Any,
    summary: Any,
    store: slots_or_pages.Store,
    q: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    listed: Int[Array, "B H N"],
    num_retrieved: int,
    num_left: Int[Array, "B Hkv R"],
) -> tuple[slots_or_pages.Store, Partial, Partial | None]:
    """Gathers any listed tokens, the retrieved first; else as :func:`read_pages`."""
    spec = store.spec
    store, k, v = slots_or_pages.fetch(store, listed)
    exact = Partial(
        *decode_attention(q, k, v, positions, listed, sm_scale=spec.sm_scale)
    )
    if estimator is None:
        return store, exact, None
    heads = spec.batch, spec.num_kv_heads
    lists = listed.shape[1] // spec.num_kv_heads

    def of_retrieved(x: Array) -> Array:
        x = x[:, :, :num_retrieved]
        return x.reshape(*heads, lists, *x.shape[2:])

    part = estimator.residual(
        params,
        summary,
        q.reshape(*heads, spec.group, spec.head_dim),
        of_retrieved(k),
        of_retrieved(v),
        of_retrieved(listed) >= 0,
        num_left,
        spec.sm_scale,
    )
    return store, exact, part


# --- keys that a map overestimates


def outliers(
    feature_map: FeatureMap,
    params: Any,
    q: Float[Array, "B Hq T D"],
    is_query: Bool[Array, "B T"],
    lse: Float[Array, "B Hq T"],
    k: Float[Array, "B Hkv S D"],
    is_middle: Bool[Array, "B Hkv S"],
    num: int,
    sm_scale: float,
) -> Int[Array, "B Hkv M"]:
    """Finds the `num` tokens that the map overestimates most; -1 if there are fewer.

    By :func:`kvjax.methods.topk_completion.linear_attention.overestimates`; the lower
    position wins a tie.

    Args:
        q: rotated calibration queries.
        lse: log-sum-exp of their logits over the prompt.
        k: rotated keys of the prompt.
    """
    batch, heads = k.shape[:2]
    group = q.shape[1] // heads
    grouped = q.reshape(batch, heads, group, *q.shape[2:])
    g = feature_map.log_queries(params, grouped, sm_scale)
    lse = lse.reshape(batch, heads, group, -1)
    lse = jnp.where(is_query[:, None, None], lse, 0.0)
    positions = jnp.broadcast_to(
        jnp.arange(k.shape[2], dtype=jnp.int32), (batch, heads, k.shape[2])
    )
    first = (
        jnp.full((batch, heads, num), -jnp.inf, jnp.float32),
        jnp.full((batch, heads, num), -1, jnp.int32),
    )

    def step(
        best: tuple[Float[Array, "B Hkv M"], Int[Array, "B Hkv M"]],
        k: Float[Array, "B Hkv N D"],
        positions: Int[Array, "B Hkv N"],
        valid: Bool[Array, "B Hkv N"],
    ) -> tuple[Float[Array, "B Hkv M"], Int[Array, "B Hkv M"]]:
        k = jnp.where(valid[..., None], k.astype(jnp.float32), 0.0)
        logits = product("bhgtd,bhnd->bhgtn", grouped, k) * sm_scale
        excess = linear_attention.overestimates(
            feature_map.log_keys(params, k), g, logits, lse, is_query[:, None, None]
        )
        excess = jnp.where(valid, excess, -jnp.inf)
        scores = jnp.concatenate([best[0], excess], axis=-1)
        where = jnp.concatenate([best[1], positions], axis=-1)
        scores, chosen = jax.lax.top_k(scores, num)
        where = jnp.take_along_axis(where, chosen, axis=-1)
        return scores, jnp.where(scores == -jnp.inf, -1, where)

    return linear_attention.over_chunks(step, first, (k, positions), is_middle)[1]
