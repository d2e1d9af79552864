"""Linear-attention completion of a partial softmax, in logs: one sum for unread tokens.

With positive features ``phi_q(q) . phi_k(k) ~ exp(q . k)`` two sums over the middle M
of a prompt stand for all of its tokens; those that a step reads are taken out again.
The paper's symbols: arXiv:2604.05438, App. C. Feature maps:
`kvjax.methods.topk_completion.feature_maps`.

    F  features        X  queries, any number      R  lists of a KV head, 1 or G
    N  tokens listed   C  what is left of the middle, unread
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import Partial

Carry = TypeVar("Carry")

CHUNK = 1024  # keys whose features exist at once
# Below this share of its summary, what is left after a subtraction is float32 noise.
NOISE = 1e-5


class Summary(NamedTuple):
    """The middle of a prompt in features: eqs. 34-36."""

    shift: Float[Array, "B Hkv F"]  # c: the largest log feature; 0 of an empty middle
    mass: Float[Array, "B Hkv F"]  # u: sum of exp(ell - c), 0 of an empty middle
    values: Float[Array, "B Hkv F D"]  # T: sum of exp(ell - c) v


class Retrieved(NamedTuple):
    """Tokens of the middle that a step reads, a list per KV head or per query head."""

    log_features: Float[Array, "B Hkv R N F"]  # ell of the keys
    v: Float[Array, "B Hkv R N D"]
    valid: Bool[Array, "B Hkv R N"]  # distinct tokens of the middle; False is no token


def product(equation: str, *operands: Array) -> Array:
    """Multiplies float32 copies by `einsum` in full precision, on every device.

    A summary and what is subtracted from it have to be rounded alike.
    """
    wide = [x.astype(jnp.float32) for x in operands]
    return jnp.einsum(equation, *wide, precision=lax.Precision.HIGHEST)


def over_chunks(
    step: Callable[..., Carry],
    carry: Carry,
    arrays: tuple[Array, ...],
    valid: Bool[Array, "B H S"],
    chunk: int = CHUNK,
) -> Carry:
    """Runs `carry = step(carry, *parts, valid)` over the tokens, `chunk` at a time.

    The last part is moved back to where it fits, its tokens that had their turn not
    valid, so that nothing is padded and nothing copied.
    """
    size = valid.shape[2]
    chunk = min(chunk, size)
    offset = jnp.arange(chunk, dtype=jnp.int32)

    def body(i: Int[Array, ""], carry: Carry) -> Carry:
        start = jnp.minimum(i * chunk, size - chunk)
        parts = [lax.dynamic_slice_in_dim(x, start, chunk, 2) for x in arrays]
        fresh = lax.dynamic_slice_in_dim(valid, start, chunk, 2)
        return step(carry, *parts, fresh & (start + offset >= i * chunk))

    return lax.fori_loop(0, -(-size // chunk), body, carry)


def empty(shape: tuple[int, int, int], head_dim: int) -> Summary:
    """Makes the summary of no tokens, for features of `shape (B, Hkv, F)`."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Summary(zeros, zeros, jnp.zeros((*shape, head_dim), jnp.float32))


def fold(
    summary: Summary,
    log_features: Float[Array, "B Hkv N F"],
    v: Float[Array, "B Hkv N D"],
    valid: Bool[Array, "B Hkv N"],
) -> Summary:
    """Adds tokens to a summary: exactly what it were had they been there before."""
    ell = jnp.where(valid[..., None], log_features.astype(jnp.float32), -jnp.inf)
    held = jnp.where(summary.mass > 0, summary.shift, -jnp.inf)
    highest = jnp.maximum(held, ell.max(2))
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)
    weights = jnp.exp(ell - shift[:, :, None])
    kept = jnp.exp(held - shift)
    # A weight of 0 on a slot that was never written: keep what it holds out.
    v = jnp.where(valid[..., None], v.astype(jnp.float32), 0.0)
    return Summary(
        shift,
        kept * summary.mass + weights.sum(2),
        kept[..., None] * summary.values + product("bhnf,bhnd->bhfd", weights, v),
    )


def summarise(
    log_keys: Callable[[Array], Array],
    k: Float[Array, "B Hkv S D"],
    v: Float[Array, "B Hkv S Dv"],
    valid: Bool[Array, "B Hkv S"],
    chunk: int = CHUNK,
) -> Summary:
    """Makes the summary of the valid tokens in one pass; the order does not matter.

    Args:
        log_keys: log features `(B, Hkv, N, F)` of keys `(B, Hkv, N, D)`, float32.
        chunk: tokens whose features exist at once.
    """
    shape = jax.eval_shape(log_keys, k[:, :, :1]).shape
    first = empty((*shape[:2], shape[3]), v.shape[-1])

    def step(
        summary: Summary,
        k: Float[Array, "B Hkv N D"],
        v: Float[Array, "B Hkv N Dv"],
        valid: Bool[Array, "B Hkv N"],
    ) -> Summary:
        k = jnp.where(valid[..., None], k.astype(jnp.float32), 0.0)
        return fold(summary, log_keys(k), v, valid)

    return over_chunks(step, first, (k, v), valid, chunk)


def _weights(
    summary: Summary, g: Float[Array, "B Hkv G F"]
) -> tuple[Float[Array, "B Hkv G F"], Float[Array, "B Hkv G"]]:
    """The weights exp(g + c - m), and m, the largest log term; 0 if empty."""
    mass = summary.mass[:, :, None]
    log_mass = jnp.log(jnp.where(mass > 0, mass, 1.0))
    raised = jnp.where(mass > 0, g + summary.shift[:, :, None], -jnp.inf)
    top = (raised + log_mass).max(-1)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    return jnp.exp(raised - top[..., None]), top


def _by_list(x: Float[Array, "B Hkv G F"], lists: int) -> Float[Array, "B Hkv R P F"]:
    """Splits the heads of a group among their lists."""
    batch, heads, group, *rest = x.shape
    return x.reshape(batch, heads, lists, group // lists, *rest)


class Readout(NamedTuple):
    """The attention of a step's queries to a whole summary, in units of exp(top)."""

    shares: Float[Array, "B Hkv G F"]  # e = exp(g + c - top)
    top: Float[Array, "B Hkv G"]
    mass: Float[Array, "B Hkv G"]  # e.u
    values: Float[Array, "B Hkv G D"]  # e T


def read_out(summary: Summary, log_queries: Float[Array, "B Hkv G F"]) -> Readout:
    """Attends to the whole summary, from log features g of the step's queries."""
    e, top = _weights(summary, log_queries)
    mass = product("bhgf,bhf->bhg", e, summary.mass)
    return Readout(e, top, mass, product("bhgf,bhfd->bhgd", e, summary.values))


def subtract(
    whole: Readout,
    mass: Float[Array, "B Hkv G"],
    values: Float[Array, "B Hkv G D"],
    num_left: Int[Array, "B Hkv R"],
) -> Partial:
    """Takes the retrieved tokens out of a readout.

    What rounding leaves of a fully retrieved middle is set to nothing: by count, and
    by `NOISE`.

    Args:
        mass, values: of the retrieved tokens, sums of ahat and of ahat v.
        num_left: tokens of the middle that were not retrieved.

    Returns:
        `out (B, Hkv, G, D)`, `lse (B, Hkv, G)`, of which
        :func:`kvjax.attention.partials.merge` makes, with the exact part, one softmax;
        `(0, -inf)` where nothing is left.
    """
    left = whole.mass - mass
    group = left.shape[2] // num_left.shape[2]
    is_left = jnp.repeat(num_left > 0, group, axis=2) & (left > NOISE * whole.mass)
    safe = jnp.where(is_left, left, 1.0)
    values = whole.values - values
    out = jnp.where(is_left[..., None], values / safe[..., None], 0.0)
    return Partial(out, jnp.where(is_left, whole.top + jnp.log(safe), -jnp.inf))


def residual(
    summary: Summary,
    log_queries: Float[Array, "B Hkv G F"],
    retrieved: Retrieved,
    num_left: Int[Array, "B Hkv R"],
) -> Partial:
    """Estimates attention over C, the middle without what was retrieved (Sec. 5.4).

    Every retrieved token is taken out with its surrogate weight ahat = sum_f e_f
    exp(ell_f - c_f): mass e.u - sum ahat, numerator e T - sum ahat v.

    Args:
        summary: of the middle.
        log_queries: g, log features of the step's queries.
        retrieved: tokens to take out, distinct and all in the summary.
        num_left: as :func:`subtract`, whose result it is.
    """
    lists = retrieved.valid.shape[2]
    whole = read_out(summary, log_queries)
    shift = summary.shift[:, :, None, None]
    features = jnp.where(
        retrieved.valid[..., None], jnp.exp(retrieved.log_features - shift), 0.0
    )
    # A token that is not valid has a weight of 0: its value must be finite, no more.
    ahat = product("bhrpf,bhrnf->bhrpn", _by_list(whole.shares, lists), features)
    taken = product("bhrpn,bhrnd->bhrpd", ahat, retrieved.v)
    mass = ahat.sum(-1).reshape(whole.mass.shape)
    return subtract(whole, mass, taken.reshape(whole.values.shape), num_left)


def cap_mass(part: Partial, highest: Float[Array, "*B"], num_left: Array) -> Partial:
    """Limits the mass to what `num_left` tokens of logits up to `highest` have.

    With exact top-k that is the least retrieved logit: Z_C <= |C| exp(min_R s).
    """
    left = jnp.maximum(num_left, 1).astype(jnp.float32)
    return Partial(part.out, jnp.minimum(part.lse, highest + jnp.log(left)))


def scale_mass(part: Partial, gain: Float[Array, "*#B"]) -> Partial:
    """Multiplies the mass and the numerator by `lam`; 0 leaves nothing."""
    gain = gain.astype(jnp.float32)
    log_gain = jnp.where(gain > 0, jnp.log(jnp.where(gain > 0, gain, 1.0)), -jnp.inf)
    return Partial(part.out, part.lse + log_gain)


def overestimates(
    log_features: Float[Array, "B Hkv N F"],
    log_queries: Float[Array, "B Hkv G X F"],
    logits: Float[Array, "B Hkv G X N"],
    lse: Float[Array, "B Hkv G X"],
    valid: Bool[Array, "#B 1 1 X"],
) -> Float[Array, "B Hkv N"]:
    """Measures how much too much weight the map gives each key: outliers have most.

    The mean over the valid queries of max(exp(shat - lse) - exp(s - lse), 0), largest
    over the heads of a group; shat = log sum_f exp(g_f + ell_f).
    """
    # In the exponent: a product of exponentials would overflow for such keys.
    top_k = log_features.max(-1)
    top_q = log_queries.max(-1)
    safe_q = jnp.where(top_q == -jnp.inf, 0.0, top_q)
    p = jnp.exp(log_features - top_k[..., None])
    w = jnp.exp(log_queries - safe_q[..., None])
    inner = product("bhgxf,bhnf->bhgxn", w, p)
    shat = jnp.log(jnp.where(inner > 0, inner, 1.0)) + top_k[:, :, None, None]
    shat = jnp.where(inner > 0, shat + safe_q[..., None], -jnp.inf)
    lse = lse[..., None]
    # exp(60) is any outlier's; more would overflow.
    excess = jnp.exp(jnp.minimum(shat - lse, 60.0)) - jnp.exp(logits - lse)
    excess = jnp.maximum(excess, 0.0)
    excess = jnp.where(valid[..., None], excess, 0.0).sum(3)
    count = jnp.maximum(valid.sum(-1), 1).astype(jnp.float32)
    return (excess / count[..., None]).max(2)


# --- budgets, in tokens: what the exact tokens beside a summary may be


def num_retrieved(
    budget: int, num_sinks: int, tail: int, num_outliers: int = 0, charged: int = 0
) -> int:
    """Counts K: what is left of a budget after all that is read in any case."""
    return max(budget - num_sinks - tail - num_outliers - charged, 0)


def budget_tokens(context: int, share: float) -> int:
    """Counts the tokens of a budget given as a share of the context, rounded up."""
    # 0.01 * 4100 is 41.00000000000001: what is whole but for rounding stays whole.
    return math.ceil(round(share * context, 6))
