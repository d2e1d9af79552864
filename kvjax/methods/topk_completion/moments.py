"""The estimate by moments of the keys: log Z and the mean value about one query.

MomentKV's, with the retrieved tokens taken out of the sums.

    R  lists of a KV head, 1 or G        N  tokens listed
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial
from kvjax.methods.topk_completion import linear_attention
from kvjax.methods.topk_completion.estimators import Estimator
from kvjax.methods.topk_completion.feature_maps import Prompt, key_moments, mean_query
from kvjax.methods.topk_completion.linear_attention import NOISE, product

TRUST = 1.0  # radius of the expansion, in deviations of the logits


class Tilt(NamedTuple):
    """The point of expansion: weights exp(w . k), keys about a centre."""

    query: Float[Array, "B Hkv D"]  # w, of x; 0 for plain moments
    centre: Float[Array, "B Hkv D"]  # subtracted from keys: the same, but for rounding


class Sums(NamedTuple):
    """The sums over the middle, h = exp(w . (k - centre) - shift)."""

    shift: Float[Array, "B Hkv"]  # c; 0 of an empty middle
    h0: Float[Array, "B Hkv"]  # sum h
    h1: Float[Array, "B Hkv D"]  # sum h k, k about the centre
    hv: Float[Array, "B Hkv D"]  # sum h v
    hvk: Float[Array, "B Hkv D D"]  # sum h v k'
    hkk: Float[Array, "B Hkv D D"]  # sum h k k'


def moment(*, tilted: bool = True, trust: float = TRUST) -> Estimator:
    """An estimator that expands log Z and the mean value to second order.

    No positive feature map: the output may leave the hull of the values, and the mass
    must always be capped.
    """

    def fit(prompt: Prompt) -> Tilt:
        centre, _ = key_moments(prompt.k, prompt.is_middle)
        query = mean_query(prompt.x, prompt.is_query)
        return Tilt(query if tilted else jnp.zeros_like(query), centre)

    return Estimator(
        fit,
        summarise,
        jax.jit(fold),
        lambda sums: sums.h0 > 0,
        jax.jit(functools.partial(residual, trust=trust), static_argnums=7),
        lambda d: 2 * d * d + 4 * d + 2,
        None,
    )


def fold(
    params: Tilt,
    sums: Sums,
    k: Float[Array, "B Hkv N D"],
    v: Float[Array, "B Hkv N D"],
    valid: Bool[Array, "B Hkv N"],
) -> Sums:
    """Adds tokens to the sums."""
    k, v = (jnp.where(valid[..., None], x.astype(jnp.float32), 0.0) for x in (k, v))
    k = jnp.where(valid[..., None], k - params.centre[:, :, None], 0.0)
    ell = jnp.where(valid, product("bhd,bhnd->bhn", params.query, k), -jnp.inf)
    held = jnp.where(sums.h0 > 0, sums.shift, -jnp.inf)
    highest = jnp.maximum(held, ell.max(-1))
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)
    h = jnp.exp(ell - shift[..., None])
    kept = jnp.exp(held - shift)
    hk, hv = h[..., None] * k, h[..., None] * v
    return Sums(
        shift,
        kept * sums.h0 + h.sum(-1),
        kept[..., None] * sums.h1 + hk.sum(2),
        kept[..., None] * sums.hv + hv.sum(2),
        kept[..., None, None] * sums.hvk + product("bhnd,bhne->bhde", hv, k),
        kept[..., None, None] * sums.hkk + product("bhnd,bhne->bhde", hk, k),
    )


def summarise(
    params: Tilt,
    k: Float[Array, "B Hkv S D"],
    v: Float[Array, "B Hkv S D"],
    valid: Bool[Array, "B Hkv S"],
) -> Sums:
    """Sums over the valid tokens in one pass."""
    rows = jnp.zeros(k.shape[:2], jnp.float32)
    vector = jnp.zeros((*k.shape[:2], k.shape[3]), jnp.float32)
    matrix = jnp.zeros((*vector.shape, k.shape[3]), jnp.float32)
    first = Sums(rows, rows, vector, vector, matrix, matrix)

    def step(
        sums: Sums,
        k: Float[Array, "B Hkv N D"],
        v: Float[Array, "B Hkv N D"],
        valid: Bool[Array, "B Hkv N"],
    ) -> Sums:
        return fold(params, sums, k, v, valid)

    return linear_attention.over_chunks(step, first, (k, v), valid)


def residual(
    params: Tilt,
    sums: Sums,
    q: Float[Array, "B Hkv G D"],
    k: Float[Array, "B Hkv R N D"],
    v: Float[Array, "B Hkv R N D"],
    valid: Bool[Array, "B Hkv R N"],
    num_left: Int[Array, "B Hkv R"],
    sm_scale: float,
    trust: float = TRUST,
) -> Partial:
    """Estimates attention over the middle without the retrieved tokens.

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
