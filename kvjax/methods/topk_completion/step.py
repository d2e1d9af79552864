"""A step of `topk_completion`: what is read exactly, and the estimate of the rest."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import Partial, merge
from kvjax.interface import Diagnostics
from kvjax.methods.topk_completion import estimators, linear_attention, prompt_summary
from kvjax.methods.topk_completion.feature_maps import Learned
from kvjax.methods.topk_completion.options import Allotment, Options, allot
from kvjax.stores import contiguous, paged, slots_or_pages
from kvjax.stores import step as shared_step
from pallas_kernels.decode_attention import decode_logits
from pallas_kernels.page_scores import page_bounds
from pallas_kernels.topk import top_k


class CompletionState(NamedTuple):
    """State of :func:`kvjax.topk_completion` while decoding, one layer."""

    store: slots_or_pages.Store
    middle_end: Int[Array, "B"]  # the middle is [num_sinks, middle_end), no outliers
    outliers: Int[Array, "B Hkv M"] | None  # positions of keys kept exact, -1 = none
    params: Any  # of the feature map
    summary: Any  # of the middle
    gain: Float[Array, "Hq"] | None


class Retrieved(NamedTuple):
    """The tokens of the middle that a step reads."""

    positions: Int[Array, "B H K"]  # -1 = none; H is Hkv or Hq
    bound: Float[Array, "B H"]  # the score that no other token of the middle exceeds
    pages: Int[Array, "B H KP"] | None  # that they were listed by


def inspect_step(
    options: Options, state: CompletionState, q: Float[Array, "B Hq 1 D"]
) -> tuple[CompletionState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to what is read, and completes it by an estimate of what is not."""
    store, spec = state.store, state.store.spec
    sizes = allot(options, spec, learned_weights(state.params))
    estimator = sizes.estimator
    rotated, positions = contiguous.rotate_queries(spec, q, store.length)
    retrieved = retrieve(options, sizes, state, rotated, positions)
    lists = retrieved.positions.shape[1] // spec.num_kv_heads

    # E: retrieved, sinks, everything behind the middle, outliers.
    always = always_read(options, sizes, state)
    listed = jnp.concatenate(
        [retrieved.positions, jnp.repeat(always, lists, axis=1)], axis=2
    )
    num_left = count_unread(options, state, retrieved)
    estimate = estimator, state.params, state.summary
    if (
        isinstance(store, paged.Paged)
        and retrieved.pages is not None
        and state.outliers is None
        and estimators.takes_pages(estimator)
    ):
        store, exact, rest = estimators.read_pages(
            *estimate,
            store,
            rotated,
            positions,
            always,
            retrieved.pages,
            options.num_sinks,
            state.middle_end,
            num_left,
        )
    else:
        size = retrieved.positions.shape[2]
        store, exact, rest = estimators.read_tokens(
            *estimate, store, rotated, positions, listed, size, num_left
        )
    out = exact.out
    if rest is not None:
        out = complete(options, state, exact, rest, retrieved.bound, num_left).out
    diagnostics = shared_step.diagnose(listed, exact.lse, store.length)
    state = state._replace(store=store)
    return state, out.astype(q.dtype), diagnostics


def learned_weights(params: Any) -> Learned | None:
    """Returns the params of a map if they are learned weights."""
    return params if isinstance(params, Learned) else None


def retrieve(
    options: Options,
    sizes: Allotment,
    state: CompletionState,
    rotated: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
) -> Retrieved:
    """Retrieves the tokens of the middle with the highest scores, or pages of them."""
    store, spec = state.store, state.store.spec
    is_paged = isinstance(store, paged.Paged)
    if not sizes.retrieved or (is_paged and sizes.retrieved < options.page_size):
        lists = spec.num_kv_heads if options.per == "kv" else spec.num_q_heads
        none = jnp.full((spec.batch, lists, 0), -1, jnp.int32)
        bound = jnp.full((spec.batch, lists), jnp.inf, jnp.float32)
        return Retrieved(none, bound, None)
    is_held = prompt_summary.is_middle(
        store, options.num_sinks, state.middle_end, state.outliers
    )
    if options.per == "query":
        is_held = jnp.repeat(is_held, spec.group, axis=1)
    if isinstance(store, paged.Paged):
        return _retrieve_pages(options, sizes, state, store, rotated, is_held)
    logits = decode_logits(rotated, store.k, positions, sm_scale=spec.sm_scale)
    scores = logits[:, :, 0]
    if options.per == "kv":
        scores = selection.reduce_group(scores, spec.num_kv_heads, options.group_reduce)
    size = min(sizes.retrieved, spec.capacity)
    values, chosen = top_k(scores, size, where=is_held)
    return Retrieved(chosen, values[..., -1], None)


def _retrieve_pages(
    options: Options,
    sizes: Allotment,
    state: CompletionState,
    store: paged.Paged,
    rotated: Float[Array, "B Hq 1 D"],
    is_held: Bool[Array, "B H S"],
) -> Retrieved:
    num_sinks, page_size = options.num_sinks, options.page_size
    scores = store.spec.sm_scale * page_bounds(
        rotated[:, :, 0],
        store.page_min,
        store.page_max,
        group_reduce=options.group_reduce if options.per == "kv" else "none",
    )
    first = jnp.arange(scores.shape[-1], dtype=jnp.int32) * page_size
    touches = (first + page_size > num_sinks) & (first < state.middle_end[:, None])
    size = min(sizes.retrieved // page_size, scores.shape[-1])
    values, pages = top_k(scores, size, where=touches[:, None])
    positions = paged.tokens_of(pages, page_size, state.middle_end)
    is_in = positions >= num_sinks
    if state.outliers is not None:
        is_in &= jnp.take_along_axis(is_held, jnp.maximum(positions, 0), axis=-1)
    return Retrieved(jnp.where(is_in, positions, -1), values[..., -1], pages)


def always_read(
    options: Options, sizes: Allotment, state: CompletionState
) -> Int[Array, "B Hkv N"]:
    """Lists the positions of sinks, the newest and outliers, -1 = none."""
    spec, length = state.store.spec, state.store.length
    sinks = jnp.arange(options.num_sinks, dtype=jnp.int32)
    sinks = jnp.broadcast_to(sinks, (spec.batch, options.num_sinks))
    newest = state.middle_end[:, None] + jnp.arange(sizes.newest, dtype=jnp.int32)
    listed = jnp.concatenate([sinks, newest], axis=1)
    listed = jnp.where(listed < length[:, None], listed, -1)[:, None]
    listed = jnp.broadcast_to(listed, (spec.batch, spec.num_kv_heads, listed.shape[2]))
    if state.outliers is None:
        return listed
    return jnp.concatenate([listed, state.outliers], axis=2)


def count_unread(
    options: Options, state: CompletionState, retrieved: Retrieved
) -> Int[Array, "B Hkv R"]:
    """Counts the tokens of the middle that each list of a KV head leaves unread."""
    spec = state.store.spec
    count = (state.middle_end - options.num_sinks)[:, None]
    if state.outliers is not None:
        count -= (state.outliers >= 0).sum(-1, dtype=jnp.int32)
    num_read = (retrieved.positions >= 0).sum(-1, dtype=jnp.int32)
    return count[..., None] - num_read.reshape(spec.batch, spec.num_kv_heads, -1)


def complete(
    options: Options,
    state: CompletionState,
    exact: Partial,
    rest: Partial,
    bound: Float[Array, "B H"],
    num_left: Int[Array, "B Hkv R"],
) -> Partial:
    """Merges attention over what was read with the estimate of the rest.

    Args:
        rest: `out (B, Hkv, G, D)` and `lse (B, Hkv, G)`.
        bound: see :class:`Retrieved`.
        num_left: from :func:`count_unread`.
    """
    spec = state.store.spec
    lists = num_left.shape[2]

    def by_head(x: Array) -> Array:
        x = x.reshape(num_left.shape)
        return jnp.repeat(x, spec.group // lists, axis=2)

    if options.mass_cap:
        rest = linear_attention.cap_mass(rest, by_head(bound), by_head(num_left))
    gain = jnp.full((spec.num_q_heads,), options.lam, jnp.float32)
    gain = gain if state.gain is None else gain * state.gain
    gain = gain.reshape(spec.num_kv_heads, spec.group)
    rest = linear_attention.scale_mass(rest, gain)
    shape = (spec.batch, spec.num_q_heads, 1)
    rest = Partial(rest.out.reshape(*shape, -1), rest.lse.reshape(shape))
    return merge(exact, rest)
