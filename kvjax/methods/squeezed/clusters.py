"""At a prompt's end: its fixed tokens in the order of clusters, and the thresholds."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import clustering, heads, selection
from kvjax.interface import CacheSpec
from kvjax.methods.squeezed.options import Options
from kvjax.stores import buffers, contiguous


class SqueezedPrompt(NamedTuple):
    """State of :func:`kvjax.squeezed` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    queries: Float[Array, "B Hq W D"]  # the newest W = tail, rotated, a ring


class Coarse(NamedTuple):
    """Clusters of clusters: those of one are neighbours."""

    centroids: Float[Array, "B Hkv C1 D"]  # mean of its clusters' centroids
    size: Int[Array, "B Hkv C1"]  # tokens below it; 0 = none
    first: Int[Array, "B Hkv C1"]  # its first cluster
    number: Int[Array, "B Hkv C1"]  # of its clusters
    threshold: Float[Array, "B"]
    scores: Float[Array, "B H C1"] | None  # as `SqueezedState.scores`


class SqueezedState(NamedTuple):
    """State of :func:`kvjax.squeezed` while decoding, one layer.

    In slots below `fixed` tokens lie in the order of clusters, behind them in their
    own: `members` says which token is where. No cluster ever changes.
    """

    store: contiguous.Contiguous
    members: Int[Array, "B Hkv S"]  # position of the token in each slot
    centroids: Float[Array, "B Hkv C D"]  # mean of a cluster's keys
    size: Int[Array, "B Hkv C"]  # tokens in it; 0 = no cluster
    first: Int[Array, "B Hkv C"]  # its first slot
    fixed: Int[Array, "B"]  # tokens that were clustered
    threshold: Float[Array, "B"]  # a cluster that scores above it is read
    coarse: Coarse | None
    # Of the calibration queries, their mean: H is Hkv or Hq. For thresholds over all
    # layers; None where each layer has its own.
    scores: Float[Array, "B H C"] | None


def end_prompt(
    options: Options, state: SqueezedPrompt | SqueezedState
) -> SqueezedState:
    """Clusters the prompt but for its last tokens; once, whatever comes behind it."""
    if isinstance(state, SqueezedState):
        return state  # it was sealed
    store, spec = state.store, state.store.spec
    sizes = options.sizes(spec)
    fixed = jnp.maximum(store.length - options.tail, 0)
    heads = (spec.batch, spec.num_kv_heads)
    count = jnp.broadcast_to(fixed[:, None], heads)
    num = _number(count, options.clusters, sizes.clusters)
    found = clustering.kmeans(store.k, count, num, sizes.clusters, options.rounds)
    coarse = None
    if options.coarse is not None:
        found, coarse = below_coarse(options, found, count, spec.dtype, sizes.coarse)
    members = clustering.in_runs(found.labels)
    store = store._replace(
        k=buffers.take(store.k, members), v=buffers.take(store.v, members)
    )
    ended = SqueezedState(
        store,
        members,
        found.means.astype(spec.dtype),
        found.size,
        clustering.first_slots(found.size),
        fixed,
        jnp.full((spec.batch,), options.threshold or 0.0, jnp.float32),
        coarse,
        None,
    )
    return calibrated(options, ended, state.queries)


def _number(count: Int[Array, "B H"], share: float, most: int) -> Int[Array, "B H"]:
    num = jnp.clip(clustering.share_of(count, share), 1, most)
    return jnp.minimum(num, count)  # none of no keys


def below_coarse(
    options: Options,
    found: clustering.Clusters,
    count: Int[Array, "B H"],
    dtype: jax.typing.DTypeLike,
    most: int,
) -> tuple[clustering.Clusters, Coarse]:
    """Clusters the centroids once more, and puts those of one coarse cluster together.

    Args:
        count: keys that are clustered.
        dtype: of the centroids that are kept.
        most: coarse clusters.
    """
    # Those without a key come last, and belong nowhere.
    there = clustering.in_runs((found.size == 0).astype(jnp.int32))
    means = jnp.take_along_axis(found.means, there[..., None], axis=2)
    number = (found.size > 0).sum(-1, dtype=jnp.int32)
    num = jnp.minimum(_number(count, options.coarse or 1.0, most), number)
    above = clustering.kmeans(means.astype(dtype), number, num, most, options.rounds)
    order = jnp.take_along_axis(there, clustering.in_runs(above.labels), axis=-1)
    size = jnp.take_along_axis(found.size, order, axis=-1)
    # The place of each cluster in the new order; C, of no cluster, stays.
    place = jnp.argsort(order, axis=-1).astype(jnp.int32)
    place = jnp.pad(place, ((0, 0), (0, 0), (0, 1)), constant_values=size.shape[-1])
    found = clustering.Clusters(
        jnp.take_along_axis(place, found.labels, axis=-1),
        jnp.take_along_axis(found.means, order[..., None], axis=2),
        size,
    )
    first = clustering.first_slots(above.size)
    upto = jnp.pad(jnp.cumsum(size, -1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    below = jnp.take_along_axis(upto, first + above.size, axis=-1)
    below -= jnp.take_along_axis(upto, first, axis=-1)
    coarse = Coarse(
        above.means.astype(dtype),
        below,
        first,
        above.size,
        jnp.zeros(count.shape[:1], jnp.float32),
        None,
    )
    return found, coarse


# --- thresholds


def calibrated(
    options: Options, state: SqueezedState, queries: Float[Array, "B Hq W D"]
) -> SqueezedState:
    """Returns the state with thresholds from what the calibration queries score.

    As if the layer were the model: :func:`settle` takes all layers' together.
    """
    if not options.calibrates:
        return state
    spec = state.store.spec

    def mean_scores(
        centroids: Float[Array, "B Hkv C D"], size: Int[Array, "B Hkv C"]
    ) -> Float[Array, "B H C"]:
        logs = clustering.log_scores(queries, centroids, size, sm_scale=spec.sm_scale)
        return by_list(options, spec.num_kv_heads, jnp.exp(logs)).mean(2)

    scored = state._replace(scores=mean_scores(state.centroids, state.size))
    if (coarse := state.coarse) is not None:
        scores = mean_scores(coarse.centroids, coarse.size)
        scored = scored._replace(coarse=coarse._replace(scores=scores))
    (settled,) = settle(options, (scored,))
    if options.scope == "model":
        return settled
    coarse = settled.coarse and settled.coarse._replace(scores=None)
    return settled._replace(coarse=coarse, scores=None)


def by_list(
    options: Options, num_kv_heads: int, scores: Float[Array, "B Hq *T C"]
) -> Float[Array, "B H *T C"]:
    """Reduces scores of query heads to one for each list."""
    if options.per == "query":
        return scores
    return selection.reduce_group(scores, num_kv_heads, options.group_reduce)


def settle(
    options: Options, states: tuple[SqueezedState, ...]
) -> tuple[SqueezedState, ...]:
    """Gives all layers the thresholds that leave a share of all their tokens unread.

    As `settle` of :class:`kvjax.hooks.Hooks`.
    """
    quantile = functools.partial(_quantile, options)
    if options.unread:
        layers = [(state.store.spec, state) for state in states]
        threshold = quantile(layers, options.unread)
        states = tuple(state._replace(threshold=threshold) for state in states)
    coarse = [(state.store.spec, state.coarse) for state in states if state.coarse]
    if not options.coarse_unread or not coarse:
        return states
    threshold = quantile(coarse, options.coarse_unread)
    return tuple(
        state._replace(coarse=state.coarse and with_threshold(state.coarse, threshold))
        for state in states
    )


def with_threshold(coarse: Coarse, threshold: Float[Array, "B"]) -> Coarse:
    """Returns the coarse clusters with a threshold of their own."""
    return coarse._replace(threshold=threshold)


def _quantile(
    options: Options, layers: Sequence[tuple[CacheSpec, Any]], share: float
) -> Float[Array, "B"]:
    """Returns a quantile over the tokens of all lists: each has its cluster's score.

    Args:
        layers: clusters with `scores` and `size`, and the spec that says whose heads.
    """

    def flat(x: Array) -> Array:
        return x.reshape(x.shape[0], -1)

    scores, sizes = [], []
    for spec, clusters in layers:
        scored, size = (
            heads.gathered(spec, x) for x in (clusters.scores, clusters.size)
        )
        scores.append(flat(scored))
        sizes.append(flat(jnp.repeat(size, scored.shape[1] // size.shape[1], axis=1)))
    every, counts = (jnp.concatenate(x, axis=1) for x in (scores, sizes))
    return clustering.weighted_quantile(every, counts, share)
