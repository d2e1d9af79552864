"""What completes a partial softmax: sums over the middle, and how a step reads them.

One interface over the positive feature maps and over `moment`, whose readout is not
linear in its sums. Pure functions; the pieces are in
`kvjax.methods.topk_completion.linear_attention`.

    F  features        R  lists of a KV head, 1 or G        N  tokens listed
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial
from kvjax.interface import CacheSpec
from kvjax.methods.topk_completion import linear_attention, slots_or_pages
from kvjax.methods.topk_completion.feature_maps import (
    FeatureMap,
    Prompt,
    key_moments,
    mean_query,
)
from kvjax.methods.topk_completion.linear_attention import NOISE, product
from kvjax.stores import paged
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_attention import Surrogate, page_attention

TRUST = 1.0  # radius of `moment`, in deviations of the logits


class Estimator(NamedTuple):
    """Attention over what is left of the middle, estimated.

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
    """Linear attention over positive features."""

    def summarise(params, k, v, valid):
        def log_keys(k):
            return feature_map.log_keys(params, k)

        return linear_attention.summarise(log_keys, k, v, valid)

    def fold(params, summary, k, v, valid):
        k = jnp.where(valid[..., None], k.astype(jnp.float32), 0.0)
        return linear_attention.fold(summary, feature_map.log_keys(params, k), v, valid)

    def residual(params, summary, q, k, v, valid, num_left, sm_scale):
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
    estimator: Estimator, weights: Any, spec: CacheSpec, *, per: str, charge: str
) -> int:
    """What summary and map cost a list and step, in tokens of the cache, rounded up.

    Args:
        weights: of a learned map, which the rows of a batch read together; or None.
        per: "kv", or "query": then the lists of a group share the summary.
        charge: "step"; "request", spread over the tokens it generates; or "none".
    """
    if charge == "none":
        return 0
    wide = jnp.dtype(jnp.float32).itemsize
    shared = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    shared /= spec.batch * spec.num_kv_heads
    num_bytes = wide * estimator.elements(spec.head_dim) + shared
    token = 2 * spec.head_dim * jnp.dtype(spec.dtype).itemsize
    lists = spec.group if per == "query" else 1
    steps = max(spec.max_new_tokens, 1) if charge == "request" else 1
    return math.ceil(num_bytes / (token * lists * steps))


# --- a step: attention over what is read, and over what is not


def fused(estimator: Estimator | None) -> bool:
    """Whether :func:`read_pages` can: None, that estimates nothing, always."""
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
) -> tuple[Partial, Partial | None]:
    """The retrieved pages in one pass, that starts from the tokens read in any case.

    Args:
        estimator: for which :func:`fused` holds.
        q: rotated.
        always: positions of those tokens, -1 = none; not of the middle.
        pages: retrieved; of their tokens those of the middle count.
        num_sinks, middle_end: where the middle begins and ends.

    Returns:
        Attention over what is read, and over the rest of the middle; None without an
        estimator.
    """
    spec = store.spec
    k, v = slots_or_pages.fetch(store, always)
    initial = decode_attention(q, k, v, positions, always, sm_scale=spec.sm_scale)
    grouped = (spec.batch, spec.num_kv_heads, spec.group)
    surrogate = whole = None
    if estimator is not None:
        surrogate, whole = _surrogate_of(
            estimator.feature_map,
            params,
            summary,
            q.reshape(*grouped, spec.head_dim),
            spec.sm_scale,
        )
    out, lse, *sums = page_attention(
        q,
        store.pages,
        pages,
        middle_end[:, None] - 1,
        initial=initial,
        surrogate=surrogate,
        sm_scale=spec.sm_scale,
        first_position=num_sinks,
    )
    if estimator is None:
        return Partial(out, lse), None
    values, mass = sums
    values = values.reshape(*grouped, spec.head_dim)
    part = linear_attention.without(whole, mass.reshape(grouped), values, num_left)
    return Partial(out, lse), part


def _surrogate_of(feature_map, params, summary, q, sm_scale):
    """The weights that a summary has tokens by, and what the queries make of it all."""
    g = feature_map.log_queries(params, q[:, :, :, None], sm_scale)[:, :, :, 0]
    whole = linear_attention.read_out(summary, g)
    shares = whole.shares.reshape(q.shape[0], -1, 1, g.shape[-1])
    return Surrogate(feature_map.directions(params), summary.shift, shares), whole


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
) -> tuple[Partial, Partial | None]:
    """As :func:`read_pages`, of any listed tokens, the retrieved first, gathered."""
    spec = store.spec
    k, v = slots_or_pages.fetch(store, listed)
    exact = Partial(
        *decode_attention(q, k, v, positions, listed, sm_scale=spec.sm_scale)
    )
    if estimator is None:
        return exact, None
    heads = spec.batch, spec.num_kv_heads
    lists = listed.shape[1] // spec.num_kv_heads

    def of_retrieved(x):
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
    return exact, part


# --- moments of the keys


class Tilt(NamedTuple):
    """Where `moment` expands: weights exp(w . k), keys about a centre."""

    query: Float[Array, "B Hkv D"]  # w, of x; 0 for plain moments
    centre: Float[Array, "B Hkv D"]  # subtracted from keys: the same, but for rounding


class Moments(NamedTuple):
    """Sums over the middle, h = exp(w . (k - centre) - shift)."""

    shift: Float[Array, "B Hkv"]  # c; 0 of an empty middle
    h0: Float[Array, "B Hkv"]  # sum h
    h1: Float[Array, "B Hkv D"]  # sum h k, k about the centre
    hv: Float[Array, "B Hkv D"]  # sum h v
    hvk: Float[Array, "B Hkv D D"]  # sum h v k'
    hkk: Float[Array, "B Hkv D D"]  # sum h k k'


def moment(*, tilted: bool = True, trust: float = TRUST) -> Estimator:
    """Second-order expansion of log Z and of the mean value about one query.

    MomentKV's moments with the retrieved tokens taken out: no positive feature map, so
    the output may leave the hull of the values; always with a cap on the mass.
    """

    def fit(prompt):
        centre, _ = key_moments(prompt.k, prompt.is_middle)
        query = mean_query(prompt.x, prompt.is_query)
        return Tilt(query if tilted else jnp.zeros_like(query), centre)

    return Estimator(
        fit,
        summarise_moments,
        jax.jit(fold_moments),
        lambda sums: sums.h0 > 0,
        jax.jit(functools.partial(residual_moments, trust=trust), static_argnums=7),
        lambda d: 2 * d * d + 4 * d + 2,
        None,
    )


def fold_moments(
    params: Tilt,
    sums: Moments,
    k: Float[Array, "B Hkv N D"],
    v: Float[Array, "B Hkv N D"],
    valid: Bool[Array, "B Hkv N"],
) -> Moments:
    """The sums with more tokens."""
    k, v = (jnp.where(valid[..., None], x.astype(jnp.float32), 0.0) for x in (k, v))
    k = jnp.where(valid[..., None], k - params.centre[:, :, None], 0.0)
    ell = jnp.where(valid, product("bhd,bhnd->bhn", params.query, k), -jnp.inf)
    held = jnp.where(sums.h0 > 0, sums.shift, -jnp.inf)
    highest = jnp.maximum(held, ell.max(-1))
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)
    h = jnp.exp(ell - shift[..., None])
    kept = jnp.exp(held - shift)
    hk, hv = h[..., None] * k, h[..., None] * v
    return Moments(
        shift,
        kept * sums.h0 + h.sum(-1),
        kept[..., None] * sums.h1 + hk.sum(2),
        kept[..., None] * sums.hv + hv.sum(2),
        kept[..., None, None] * sums.hvk + product("bhnd,bhne->bhde", hv, k),
        kept[..., None, None] * sums.hkk + product("bhnd,bhne->bhde", hk, k),
    )


def summarise_moments(
    params: Tilt,
    k: Float[Array, "B Hkv S D"],
    v: Float[Array, "B Hkv S D"],
    valid: Bool[Array, "B Hkv S"],
) -> Moments:
    """The sums over the valid tokens, in one pass."""
    rows = jnp.zeros(k.shape[:2], jnp.float32)
    vector = jnp.zeros((*k.shape[:2], k.shape[3]), jnp.float32)
    matrix = jnp.zeros((*vector.shape, k.shape[3]), jnp.float32)
    first = Moments(rows, rows, vector, vector, matrix, matrix)

    def step(sums, k, v, valid):
        return fold_moments(params, sums, k, v, valid)

    return linear_attention.over_chunks(step, first, (k, v), valid)


def residual_moments(
    params: Tilt,
    sums: Moments,
    q: Float[Array, "B Hkv G D"],
    k: Float[Array, "B Hkv R N D"],
    v: Float[Array, "B Hkv R N D"],
    valid: Bool[Array, "B Hkv R N"],
    num_left: Int[Array, "B Hkv R"],
    sm_scale: float,
    trust: float = TRUST,
) -> Partial:
    """Estimated attention over the middle without the retrieved tokens.

    With d = x - w: log Z = log h0 + c + mu + var/2, and the mean value vb + min(1,
    trust/sqrt(var)) cov, after the retrieved tokens' terms are taken out of every sum.
    """
    batch, heads, group, head_dim = q.shape
    lists = k.shape[2]
    x = (q.astype(jnp.float32) * sm_scale).reshape(batch, heads, lists, -1, head_dim)
    d = x - params.query[:, :, None, None]
    k, v = (jnp.where(valid[..., None], y.astype(jnp.float32), 0.0) for y in (k, v))
    k = jnp.where(valid[..., None], k - params.centre[:, :, None, None], 0.0)
    ell = product("bhd,bhrnd->bhrn", params.query, k) - sums.shift[:, :, None, None]
    h = jnp.where(valid, jnp.exp(ell), 0.0)

    # Of the retrieved, only what meets d: no matrix a list.
    along = product("bhrpd,bhrnd->bhrpn", d, k)
    h0 = sums.h0[:, :, None] - h.sum(-1)
    is_left = (num_left > 0) & (h0 > NOISE * sums.h0[:, :, None])
    mass = jnp.where(is_left, h0, 1.0)[..., None]  # (B, Hkv, R, 1)
    h1 = product("bhrpd,bhd->bhrp", d, sums.h1) - (h[:, :, :, None] * along).sum(-1)
    hv = sums.hv[:, :, None] - product("bhrn,bhrnd->bhrd", h, v)
    hvk = product("bhde,bhrpe->bhrpd", sums.hvk, d) - product(
        "bhrpn,bhrnd->bhrpd", h[:, :, :, None] * along, v
    )
    hkk = product("bhrpd,bhde,bhrpe->bhrp", d, sums.hkk, d)
    hkk = hkk - (h[:, :, :, None] * along**2).sum(-1)
    mu = h1 / mass
    var = jnp.maximum(hkk / mass - mu**2, 0.0)
    middle = hv / mass  # vb
    cov = hvk / mass[..., None] - middle[:, :, :, None] * mu[..., None]
    step = jnp.where(
        var > trust**2, trust * jax.lax.rsqrt(jnp.maximum(var, 1e-30)), 1.0
    )
    out = middle[:, :, :, None] + step[..., None] * cov
    # Every logit x . k has the centre's in it.
    base = product("bhrpd,bhd->bhrp", x, params.centre)
    lse = jnp.log(mass) + sums.shift[:, :, None, None] + base + mu + var / 2
    is_left = jnp.broadcast_to(is_left[..., None], lse.shape)
    out = jnp.where(is_left[..., None], out, 0.0).reshape(batch, heads, group, -1)
    lse = jnp.where(is_left, lse, -jnp.inf).reshape(batch, heads, group)
    return Partial(out, lse)


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
    """The `num` tokens that the map overestimates most; -1 where there are fewer.

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

    def step(best, k, positions, valid):
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
