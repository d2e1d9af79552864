"""Feature maps of completion: phi_q(q) . phi_k(k) ~ exp(q . k), everything in logs.

A map is three functions: `fit` to a prompt, log features of keys and of queries. All
but `learned` are fitted to each prompt's own keys and newest queries, with no training.
Formulas as in arXiv:2604.05438 (learned), RESA (rank1), Performer (favor); the anchors
are ours. x is a query times sm_scale.

    F  features        X  queries, any number        T  queries of one head
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.methods.topk_completion.linear_attention import (
    CHUNK,
    over_chunks,
    product,
    summarise,
)

KMEANS_ROUNDS = 10


class Prompt(NamedTuple):
    """The part of a prompt that a map is fitted to."""

    k: Float[Array, "B Hkv S D"]  # rotated
    is_middle: Bool[Array, "B Hkv S"]  # keys the summary will stand for
    x: Float[Array, "B Hkv X D"]  # queries of the group's heads, times sm_scale
    is_query: Bool[Array, "B X"]


class FeatureMap(NamedTuple):
    """One kind of map; `params` is a pytree of arrays, per row and KV head.

    Fields:
        fit: `fit(prompt) -> params`.
        log_keys: `log_keys(params, k (B, Hkv, N, D)) -> (B, Hkv, N, F)`, float32.
        log_queries: `log_queries(params, q (B, Hkv, G, T, D), sm_scale) -> (..., F)`.
        elements: numbers a KV head reads per step of params and summary, for a head
            dim.
        directions: `directions(params) -> (B, Hkv, F, D)`, if log features of keys are
            products with these and nothing else: a kernel can make them. Or None.
    """

    fit: Callable[[Prompt], Any]
    log_keys: Callable[[Any, Array], Array]
    log_queries: Callable[[Any, Array, float], Array]
    elements: Callable[[int], int]
    directions: Callable[[Any], Array] | None = None


# --- statistics of a prompt


def mean_query(
    x: Float[Array, "B Hkv X D"], valid: Bool[Array, "B X"]
) -> Float[Array, "B Hkv D"]:
    """Averages the valid queries; 0 if there is none."""
    count = jnp.maximum(valid.sum(-1), 1).astype(jnp.float32)
    x = jnp.where(valid[:, None, :, None], x.astype(jnp.float32), 0.0)
    return x.sum(2) / count[:, None, None]


def key_moments(
    k: Float[Array, "B Hkv S D"], valid: Bool[Array, "B Hkv S"], chunk: int = CHUNK
) -> tuple[Float[Array, "B Hkv D"], Float[Array, "B Hkv D D"]]:
    """Computes mean and covariance of the valid keys, zeros if there is none."""
    count = jnp.maximum(valid.sum(-1), 1).astype(jnp.float32)

    def total(carry: Array, k: Array, valid: Array) -> Float[Array, "B Hkv D"]:
        return carry + jnp.where(valid[..., None], k.astype(jnp.float32), 0.0).sum(2)

    zeros = jnp.zeros((*k.shape[:2], k.shape[3]), jnp.float32)
    mean = over_chunks(total, zeros, (k,), valid, chunk) / count[..., None]

    def squares(carry: Array, k: Array, valid: Array) -> Float[Array, "B Hkv D D"]:
        centred = k.astype(jnp.float32) - mean[:, :, None]
        centred = jnp.where(valid[..., None], centred, 0.0)
        return carry + product("bhsd,bhse->bhde", centred, centred)

    zeros = jnp.zeros((*mean.shape, k.shape[3]), jnp.float32)
    second = over_chunks(squares, zeros, (k,), valid, chunk)
    return mean, second / count[..., None, None]


def tilted_means(
    centres: Float[Array, "B Hkv F D"],
    k: Float[Array, "B Hkv S D"],
    valid: Bool[Array, "B Hkv S"],
    chunk: int = CHUNK,
) -> Float[Array, "B Hkv F D"]:
    """Averages the keys by softmax(w_f . k): gradients of the log partition at w_f."""
    sums = summarise(functools.partial(_linear, centres), k, k, valid, chunk)
    mass = jnp.where(sums.mass > 0, sums.mass, 1.0)
    return sums.values / mass[..., None]


def _linear(
    centres: Float[Array, "B Hkv F D"], k: Float[Array, "B Hkv N D"]
) -> Float[Array, "B Hkv N F"]:
    return product("bhfd,bhnd->bhnf", centres, k)


def kmeans(
    x: Float[Array, "B Hkv X D"],
    valid: Bool[Array, "B X"],
    metric: Float[Array, "B Hkv D D"],
    num: int,
    rounds: int = KMEANS_ROUNDS,
) -> Float[Array, "B Hkv F D"]:
    """Finds `num` centres of the valid queries, d2(x, y) = (x - y)' metric (x - y).

    Lloyd's rounds from evenly spaced queries: no random choice. A centre that no query
    is nearest to stays where it is.
    """
    count = valid.sum(-1)
    x = jnp.where(valid[:, None, :, None], x.astype(jnp.float32), 0.0)
    order = jnp.argsort(~valid, axis=-1, stable=True)  # the valid ones first
    rank = (jnp.arange(num) * jnp.maximum(count, 1)[:, None]) // num
    first = jnp.take_along_axis(order, rank, axis=-1)
    centres = jnp.take_along_axis(x, first[:, None, :, None], axis=2)

    def one_round(
        _: Int[Array, ""], centres: Float[Array, "B Hkv F D"]
    ) -> Float[Array, "B Hkv F D"]:
        # |x|^2 is common to all centres.
        pulled = product("bhfd,bhde->bhfe", centres, metric)
        near = product("bhxd,bhfd->bhxf", x, pulled)
        near = near - (pulled * centres).sum(-1)[:, :, None] / 2
        mine = jax.nn.one_hot(near.argmax(-1), num, dtype=jnp.float32)
        mine = jnp.where(valid[:, None, :, None], mine, 0.0)
        size = mine.sum(2)[..., None]
        means = product("bhxf,bhxd->bhfd", mine, x) / jnp.maximum(size, 1.0)
        return jnp.where(size > 0, means, centres)

    return jax.lax.fori_loop(0, rounds, one_round, centres)


# --- tangent planes: `mean`, `rank1`, `rank1_tilted`, and the anchors made of many


class Tangents(NamedTuple):
    """ell_f = w_f . k, g_f = (x - w_f) . slope_f."""

    centres: Float[Array, "B Hkv F D"] | None  # w; None is 0
    slopes: Float[Array, "B Hkv F D"]


class Anchors(NamedTuple):
    """Tangents of many queries, and how a query is shared out among them."""

    centres: Float[Array, "B Hkv F D"]  # w
    slopes: Float[Array, "B Hkv F D"]  # kbar, tilted means
    pulled: Float[Array, "B Hkv F D"]  # beta Cov w


def tangent_keys(params: Tangents | Anchors, k: Float[Array, "B Hkv N D"]) -> Array:
    """Computes ell = w . k."""
    if params.centres is None:
        return jnp.zeros((*k.shape[:3], params.slopes.shape[2]), jnp.float32)
    return _linear(params.centres, k)


def tangent_directions(params: Tangents | Anchors) -> Float[Array, "B Hkv F D"]:
    """The w of :func:`tangent_keys`."""
    return jnp.zeros_like(params.slopes) if params.centres is None else params.centres


def tangent_queries(
    params: Tangents | Anchors, q: Float[Array, "B Hkv G T D"], sm_scale: float
) -> Float[Array, "B Hkv G T F"]:
    """Computes g = (x - w) . slope."""
    g = product("bhgtd,bhfd->bhgtf", q, params.slopes) * sm_scale
    if params.centres is None:
        return g
    return g - (params.centres * params.slopes).sum(-1)[:, :, None, None]


def anchor_queries(
    params: Anchors,
    q: Float[Array, "B Hkv G T D"],
    sm_scale: float,
    hard: bool = False,
) -> Float[Array, "B Hkv G T F"]:
    """Computes g = (x - w) . kbar + log pi.

    pi = softmax(-beta d2 / 2), or with `hard` the nearest anchor alone.
    """
    # Of d2 = x'Cx - 2 x'Cw + w'Cw the first is common to all anchors.
    near = product("bhgtd,bhfd->bhgtf", q, params.pulled) * sm_scale
    near = near - (params.centres * params.pulled).sum(-1)[:, :, None, None] / 2
    if hard:
        best = jax.nn.one_hot(near.argmax(-1), near.shape[-1], dtype=jnp.bool_)
        log_share = jnp.where(best, 0.0, -jnp.inf)
    else:
        log_share = jax.nn.log_softmax(near, axis=-1)
    return tangent_queries(params, q, sm_scale) + log_share


def anchors_at(
    centres: Float[Array, "B Hkv F D"],
    k: Float[Array, "B Hkv S D"],
    valid: Bool[Array, "B Hkv S"],
    beta: float = 1.0,
    chunk: int = CHUNK,
) -> Anchors:
    """The anchor map of given query anchors over the valid keys."""
    _, covariance = key_moments(k, valid, chunk)
    pulled = beta * product("bhfd,bhde->bhfe", centres, covariance)
    return Anchors(centres, tilted_means(centres, k, valid, chunk), pulled)


def _tangent_map(
    fit: Callable[[Prompt], Any],
    log_queries: Callable[[Any, Array, float], Array],
    elements: Callable[[int], int],
) -> FeatureMap:
    return FeatureMap(fit, tangent_keys, log_queries, elements, tangent_directions)


def mean() -> FeatureMap:
    """Makes a map of F = 1: every key weighs the same, all as their mean."""

    def fit(prompt: Prompt) -> Tangents:
        average, _ = key_moments(prompt.k, prompt.is_middle)
        return Tangents(None, average[:, :, None])

    return _tangent_map(fit, tangent_queries, lambda d: 2 * d + 2)


def rank1(*, tilted: bool) -> FeatureMap:
    """Makes a map of F = 1: weights of the mean query; `tilted` has their mean key."""

    def fit(prompt: Prompt) -> Tangents:
        centre = mean_query(prompt.x, prompt.is_query)[:, :, None]
        if tilted:
            return Tangents(centre, tilted_means(centre, prompt.k, prompt.is_middle))
        average, _ = key_moments(prompt.k, prompt.is_middle)
        return Tangents(centre, average[:, :, None])

    return _tangent_map(fit, tangent_queries, lambda d: 3 * d + 2)


def anchor(features: int, *, hard: bool = False, beta: float = 1.0) -> FeatureMap:
    """Makes a map exact at F queries, tangent planes between: never too much mass."""

    def fit(prompt: Prompt) -> Anchors:
        _, covariance = key_moments(prompt.k, prompt.is_middle)
        centres = kmeans(prompt.x, prompt.is_query, covariance, features)
        return anchors_at(centres, prompt.k, prompt.is_middle, beta)

    queries = functools.partial(anchor_queries, hard=hard)
    return _tangent_map(fit, queries, lambda d: 4 * features * d + 2 * features)


# --- random features


class Favor(NamedTuple):
    """FAVOR+ after exact re-centring and balancing."""

    mean_key: Float[Array, "B Hkv D"]
    mean_query: Float[Array, "B Hkv D"]  # of x
    balance: Float[Array, "B Hkv D"]  # psi
    directions: Float[Array, "B Hkv F D"]


def orthogonal_directions(
    key: Array, features: int, head_dim: int
) -> Float[Array, "F D"]:
    """Draws Gaussian rows, orthogonal in blocks of D, with norms drawn as chi(D)."""
    turn, lengths = jax.random.split(key)
    blocks = -(-features // head_dim)
    square = jax.random.normal(turn, (blocks, head_dim, head_dim), jnp.float32)
    q, r = jnp.linalg.qr(square)
    # Without the signs of r, q is not uniform: its first column always points one way.
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    rows = (q * sign[:, None]).reshape(-1, head_dim)[:features]
    norms = jax.random.normal(lengths, (features, head_dim), jnp.float32)
    return rows * jnp.linalg.norm(norms, axis=-1, keepdims=True)


def favor_keys(params: Favor, k: Float[Array, "B Hkv N D"]) -> Float[Array, "..."]:
    """Computes ell = xbar.(k - kbar) + w.kt - |kt|^2/2 - log(F)/2.

    kt = (k - kbar) / psi.
    """
    centred = k.astype(jnp.float32) - params.mean_key[:, :, None]
    turned = centred / params.balance[:, :, None]
    ell = product("bhnd,bhfd->bhnf", turned, params.directions)
    common = product("bhnd,bhd->bhn", centred, params.mean_query)
    common = common - (turned**2).sum(-1) / 2
    return ell + common[..., None] - jnp.log(ell.shape[-1]).astype(jnp.float32) / 2


def favor_queries(
    params: Favor, q: Float[Array, "B Hkv G T D"], sm_scale: float
) -> Float[Array, "..."]:
    """Computes g = x.kbar + w.xt - |xt|^2/2 - log(F)/2.

    xt = (x - xbar) psi.
    """
    x = q.astype(jnp.float32) * sm_scale
    turned = (x - params.mean_query[:, :, None, None]) * params.balance[
        :, :, None, None
    ]
    g = product("bhgtd,bhfd->bhgtf", turned, params.directions)
    common = product("bhgtd,bhd->bhgt", x, params.mean_key) - (turned**2).sum(-1) / 2
    return g + common[..., None] - jnp.log(g.shape[-1]).astype(jnp.float32) / 2


def favor(features: int, *, seed: int = 0) -> FeatureMap:
    """Makes positive random features (FAVOR+), centred and balanced: a baseline."""

    def fit(prompt: Prompt) -> Favor:
        mean_key, covariance = key_moments(prompt.k, prompt.is_middle)
        centre = mean_query(prompt.x, prompt.is_query)
        away = jnp.square(prompt.x.astype(jnp.float32) - centre[:, :, None])
        of_queries = mean_query(away, prompt.is_query)
        of_keys = jnp.diagonal(covariance, axis1=-2, axis2=-1)
        # psi = (E kt^2 / E xt^2)^(1/4) makes |psi xt|^2 + |kt/psi|^2 least.
        known = (of_keys > 0) & (of_queries > 0)
        ratio = jnp.where(known, of_keys, 1.0) / jnp.where(known, of_queries, 1.0)
        shape = (*mean_key.shape[:2], features, mean_key.shape[-1])
        rows = orthogonal_directions(jax.random.key(seed), features, mean_key.shape[-1])
        return Favor(mean_key, centre, ratio**0.25, jnp.broadcast_to(rows, shape))

    return FeatureMap(
        fit,
        favor_keys,
        favor_queries,
        lambda d: 2 * features * d + 2 * features + 3 * d,
    )


# --- the learned map


class Mlp(NamedTuple):
    """log phi = Wo g1 + bo, g1 = g0 + alpha (W2 GELU(W1 g0 + b1) + b2), g0 = Ws z + bs.

    One network for each of the leading axes.
    """

    w_in: Float[Array, "*H D E"]
    b_in: Float[Array, "*H E"]
    w_up: Float[Array, "*H E M"]
    b_up: Float[Array, "*H M"]
    w_down: Float[Array, "*H M E"]
    b_down: Float[Array, "*H E"]
    gate: Float[Array, "*H"]  # alpha, 0 at first: ReZero
    w_out: Float[Array, "*H E F"]
    b_out: Float[Array, "*H F"]


class Learned(NamedTuple):
    """Networks of one layer, for all rows."""

    keys: Mlp  # Hkv of them
    queries: Mlp  # (Hkv, G)


def mlp_features(mlp: Mlp, z: Float[Array, "*B N D"]) -> Float[Array, "*B N F"]:
    """Computes log features of rotated vectors; networks are the last axes before N."""

    # Weights as they were loaded: NumPy's, until they are in a state.
    def layer(x: Array, w: Array | np.ndarray, b: Array | np.ndarray) -> Array:
        out = jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)
        return out + b[..., None, :]

    wide = Mlp(*(x.astype(jnp.float32) for x in mlp))
    first = layer(z.astype(jnp.float32), wide.w_in, wide.b_in)
    inner = jax.nn.gelu(layer(first, wide.w_up, wide.b_up), approximate=True)
    inner = layer(inner, wide.w_down, wide.b_down)
    return layer(first + wide.gate[..., None, None] * inner, wide.w_out, wide.b_out)


def learned(features: int) -> FeatureMap:
    """The paper's trained networks: the params are a layer's :class:`Learned`."""

    def fit(prompt: Prompt) -> Learned:
        raise ValueError("a learned map is not fitted to a prompt: train it before.")

    def log_queries(
        params: Learned, q: Float[Array, "B Hkv G T D"], sm_scale: float
    ) -> Float[Array, "B Hkv G T F"]:
        del sm_scale  # learned too: networks see queries as they are
        return mlp_features(params.queries, q)

    def log_keys(
        params: Learned, k: Float[Array, "B Hkv N D"]
    ) -> Float[Array, "B Hkv N F"]:
        return mlp_features(params.keys, k)

    # Of the summary alone: networks belong to no row.
    return FeatureMap(fit, log_keys, log_queries, lambda d: features * d + 2 * features)


NAMES = ("anchor", "anchor_hard", "mean", "rank1", "rank1_tilted", "favor")


def named(name: str, features: int) -> FeatureMap:
    """Makes a map that needs no training, of at most `features` features.

    Raises:
        ValueError: if there is none of that name.
    """
    known = {
        "anchor": lambda: anchor(features),
        "anchor_hard": lambda: anchor(features, hard=True),
        "mean": mean,
        "rank1": lambda: rank1(tilted=False),
        "rank1_tilted": lambda: rank1(tilted=True),
        "favor": lambda: favor(features),
    }
    if name not in known:
        raise ValueError(f"feature map {name!r} must be one of {', '.join(known)}.")
    return known[name]()
