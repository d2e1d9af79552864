"""Expected attention: the queries to come, guessed from those of the prompt, choose."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, Traffic
from kvjax.stores import contiguous, kept_prompt, step
from pallas_kernels.shared.quantized import floats


class ExpectedPrompt(NamedTuple):
    """State of :func:`expected_attention` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    mean: Float[Array, "B Hq D"]  # of the un-rotated queries behind the sinks
    spread: Float[Array, "B Hq D D"]  # their number times their covariance


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`expected_attention`."""

    budget: int
    num_sinks: int
    future: int
    epsilon: float

    def __post_init__(self) -> None:
        budget, num_sinks, future = self.budget, self.num_sinks, self.future
        epsilon = self.epsilon
        if not 0 <= num_sinks < budget:
            raise ValueError(
                f"{num_sinks=} must be in [0, {budget=}); raise the budget."
            )
        if future < 1:
            raise ValueError(f"{future=} must be at least 1 position.")
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"{epsilon=} must be at least 0 and finite.")


@typed
@softmax_only
def expected_attention(
    *,
    budget: int = 1024,
    num_sinks: int = 4,
    future: int = 512,
    epsilon: float = 0.01,
) -> Method:
    """Keeps the prompt tokens that later queries should attend to, and later tokens.

    Queries to come are taken for Gaussian, with mean mu and covariance Sigma of the
    prompt's, rotated by R, the mean rotation of the next `future` positions. The
    expected weight of key k is a = softmax(mu' k s + k' Sigma' k s^2 / 2), mu' = R mu,
    Sigma' = R Sigma R^T, s the scale of logits; averaged over the heads of a group. The
    score is (a + epsilon) times the norm of the value. The prompt is attended to in
    full.

    Args:
        budget: prompt tokens kept per KV head. Generated tokens come on top.
        num_sinks: first tokens, always kept, neither in the statistics nor in the
            softmax. Official: 4.
        future: positions whose rotations are averaged. Official: 512.
        epsilon: weight that every token has besides. Official: 0, and 0.01 in its
            benchmarks.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`kvjax.stores.kept_slots.Kept`
        after `finish`.

    State: k, v `(B, Hkv, budget + max_new_tokens, D)` cache dtype; positions int32.
        While the prompt runs: the whole cache, and per query head a mean and a
        covariance, D + D*D float32.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, and as many
        positions, per row.
    Exact when: budget >= prompt length.

    Raises:
        ValueError: unless 0 <= num_sinks < budget, future >= 1 and epsilon >= 0.

    Source:
        Devoto, Jeblick, Jégou, "Expected Attention: KV Cache Compression by Estimating
        Attention from Future Queries Distribution", 2025, arXiv:2510.00636. Official
        code: NVIDIA/kvpress@08a43bf.
    Deviations:
        The norm of v stands for that of W_o v, as in the official code: a method sees
        no weights of the model. Generated tokens stay; the paper evicts again every
        few hundred steps. Its budgets are shared by a layer's heads, as in AdaKV; here
        each head has its own. The paper's text could not be consulted, only its
        abstract and code.

    Example:
        >>> method = kvjax.expected_attention(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(budget, num_sinks, future, epsilon)
    scores = functools.partial(importance, options)
    return Method(
        init=init,
        prefill=functools.partial(prefill, options),
        finish=functools.partial(kept_prompt.finish, scores, budget),
        append=kept_prompt.append,
        inspect_step=kept_prompt.inspect_step,
        traffic=functools.partial(traffic, options),
        importance=scores,
        exact_prompt=True,
    )


def init(spec: CacheSpec, weights: Any = None) -> ExpectedPrompt:
    """Makes a store of the whole prompt; no query was seen."""
    del weights
    shape = (spec.batch, spec.num_q_heads, spec.head_dim)
    return ExpectedPrompt(
        contiguous.contiguous(spec),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, spec.head_dim), jnp.float32),
    )


def prefill(
    options: Options,
    state: ExpectedPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[ExpectedPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything, and adds the queries to the statistics."""
    before = seen(options, state.store.length)
    store, chunk = step.read_chunk(state.store, q, k, v, lengths)
    positions = chunk.positions
    counted = (positions >= options.num_sinks) & (positions < store.length[:, None])
    total = seen(options, store.length)
    fresh = total - before
    counted = counted[:, None, :, None]
    # Chan's way to join the statistics of two sets: no sum of squares, no cancellation.
    queries = jnp.where(counted, q.astype(jnp.float32), 0.0)
    mean = queries.sum(2) / jnp.maximum(fresh, 1.0)
    centred = jnp.where(counted, queries - mean[:, :, None], 0.0)
    apart = mean - state.mean
    share = fresh / jnp.maximum(total, 1.0)
    spread = multiply("bhti,bhtj->bhij", centred, centred)
    between = apart[..., :, None] * apart[..., None, :] * (before * share)[..., None]
    return (
        ExpectedPrompt(
            store, state.mean + apart * share, state.spread + spread + between
        ),
        chunk.out,
    )


def seen(options: Options, length: Int[Array, "B"]) -> Float[Array, "B 1 1"]:
    """Counts the queries in the statistics: those behind the sinks."""
    count = jnp.maximum(length - options.num_sinks, 0)
    return count.astype(jnp.float32)[:, None, None]


def importance(options: Options, state: ExpectedPrompt) -> Float[Array, "B Hkv S"]:
    """Scores a token by the weight its key may expect, and the length of its value."""
    store, spec = state.store, state.store.spec
    heads = (spec.batch, spec.num_kv_heads, spec.group)
    turn = mean_rotation(spec, store.length, options.future)
    count = jnp.maximum(seen(options, store.length), 1.0)[..., None]
    # mu' = R mu, Sigma' = R Sigma R^T
    mean = multiply("bij,bhj->bhi", turn, state.mean)
    turned = multiply("bij,bhjk->bhik", turn, state.spread / count)
    covariance = multiply("bhik,bjk->bhij", turned, turn)
    logits = expected_logits(
        store,
        mean.reshape(*heads, spec.head_dim),
        covariance.reshape(*heads, spec.head_dim, spec.head_dim),
    )
    slots = jnp.arange(spec.capacity, dtype=jnp.int32)
    is_held = (slots >= options.num_sinks) & (slots < store.length[:, None, None])
    weights = masked_softmax(logits, is_held[:, :, None]).mean(2)
    norms = jnp.linalg.norm(floats(store.v).astype(jnp.float32), axis=-1)
    scores = jnp.where(is_held, (weights + options.epsilon) * norms, 0.0)
    return kept_prompt.with_certain(scores, store.length, num_sinks=options.num_sinks)


def mean_rotation(
    spec: CacheSpec, length: Int[Array, "B"], future: int
) -> Float[Array, "B D D"]:
    """Returns R, the mean over the next `future` positions: R x is x as they turn it.

    Position p is turned as it will be when it is the newest.
    """
    axes = jnp.eye(spec.head_dim, dtype=jnp.float32)
    axes = jnp.broadcast_to(axes[None, :, None], (spec.batch, *axes[:, None].shape))

    def add(ahead: Int[Array, ""], total: Float[Array, "B D 1 D"]) -> Array:
        position = length + ahead.astype(jnp.int32)
        return total + spec.rope(axes, position[:, None], position + 1)

    total = lax.fori_loop(0, future, add, jnp.zeros_like(axes))
    # Row i is what becomes of axis i: the columns of R.
    return total[:, :, 0].swapaxes(1, 2) / future


def expected_logits(
    store: contiguous.Contiguous,
    mean: Float[Array, "B Hkv G D"],
    covariance: Float[Array, "B Hkv G D D"],
) -> Float[Array, "B Hkv G S"]:
    """Returns log E[exp(s q . k)] of every key over Gaussian queries q.

    One KV head at a time: what is between is a part of the cache, not all of it.
    """
    scale = store.spec.sm_scale

    def of_head(head: Int[Array, ""]) -> Float[Array, "B G S"]:
        def pick(x: Array) -> Array:
            return lax.dynamic_index_in_dim(x, head, axis=1, keepdims=False)

        keys = floats(jax.tree.map(pick, store.k)).astype(jnp.float32)
        first = multiply("bsd,bgd->bgs", keys, pick(mean))
        turned = multiply("bsd,bgde->bgse", keys, pick(covariance))
        second = (turned * keys[:, None]).sum(-1)
        return scale * first + (0.5 * scale**2) * second

    heads = jnp.arange(store.spec.num_kv_heads, dtype=jnp.int32)
    return jnp.moveaxis(lax.map(of_head, heads), 0, 1)


def masked_softmax(
    logits: Float[Array, "B Hkv G S"], where: Bool[Array, "B 1 1 S"]
) -> Float[Array, "B Hkv G S"]:
    """Returns the softmax over the last axis where asked, and 0 elsewhere."""
    top = jnp.where(where, logits, -jnp.inf).max(-1, keepdims=True)
    terms = jnp.where(where, jnp.exp(logits - jnp.maximum(top, -1e30)), 0.0)
    tiny = jnp.finfo(jnp.float32).tiny
    return terms / jnp.maximum(terms.sum(-1, keepdims=True), tiny)


def multiply(equation: str, a: Array, b: Array) -> Array:
    """Multiplies by `einsum` in full precision on every device."""
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    return kept_prompt.traffic(options.budget, spec, length)
