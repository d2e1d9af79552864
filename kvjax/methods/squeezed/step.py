"""A step of `squeezed`: the clusters that a query chooses, and their tokens."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import clustering
from kvjax.interface import Diagnostics
from kvjax.methods.squeezed.clusters import Coarse, SqueezedState, by_list
from kvjax.methods.squeezed.options import Options, Sizes
from kvjax.stores import buffers, contiguous, slots_or_pages
from kvjax.stores import step as shared_step
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.topk import top_k


class Candidates(NamedTuple):
    """The clusters that a list chooses among: all, or those below coarse ones."""

    size: Int[Array, "B H C"]  # 0 = none
    first: Int[Array, "B H C"]
    log_scores: Float[Array, "B Hq 1 C"]


def inspect_step(
    options: Options, state: SqueezedState, q: Float[Array, "B Hq 1 D"]
) -> tuple[SqueezedState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the chosen clusters, and to all that was not clustered."""
    store, spec = state.store, state.store.spec
    sizes = options.sizes(spec)
    rotated, positions = contiguous.rotate_queries(spec, q, store.length)
    slots, attended = listed(options, sizes, state, rotated)
    store, k, v = slots_or_pages.fetch(store, slots)
    state = state._replace(store=store)
    out, lse = decode_attention(
        rotated,
        k,
        v,
        positions,
        attended,
        sm_scale=spec.sm_scale,
    )
    diagnostics = shared_step.diagnose(attended, lse, store.length)
    return state, out.astype(q.dtype), diagnostics


def listed(
    options: Options,
    sizes: Sizes,
    state: SqueezedState,
    rotated: Float[Array, "B Hq 1 D"],
) -> tuple[Int[Array, "B H N"], Int[Array, "B H N"]]:
    """Lists the slots that a step reads and the positions in them, -1 = none."""
    heads = state.size.shape[1]
    lists = heads * sizes.lists
    dense = state.fixed[:, None] + jnp.arange(sizes.dense, dtype=jnp.int32)
    dense = jnp.where(dense < state.store.length[:, None], dense, -1)[:, None]
    dense = jnp.broadcast_to(dense, (dense.shape[0], lists, sizes.dense))
    if not sizes.fixed:
        return dense, dense
    slots = chosen_slots(options, sizes, state, rotated)
    by_head = slots.reshape(slots.shape[0], heads, -1)
    positions = jnp.take_along_axis(state.members, jnp.maximum(by_head, 0), axis=-1)
    positions = jnp.where(slots >= 0, positions.reshape(slots.shape), -1)
    return (
        jnp.concatenate([slots, dense], axis=-1),
        jnp.concatenate([positions, dense], axis=-1),
    )


def chosen_slots(
    options: Options,
    sizes: Sizes,
    state: SqueezedState,
    rotated: Float[Array, "B Hq 1 D"],
) -> Int[Array, "B H M"]:
    """Lists the slots of the clusters that score above the threshold, best first."""
    candidates = candidates_of(options, sizes, state, rotated)
    heads = state.size.shape[1]
    # S_c, the weight that one key of the cluster is thought to have.
    scores = by_list(options, heads, jnp.exp(candidates.log_scores))[:, :, 0]
    above = is_above(scores, candidates.size, state.threshold)
    if not options.unread and options.threshold is None:
        above = candidates.size > 0
    most = min(scores.shape[-1], sizes.fixed)
    _, best = top_k(scores, most, where=above)
    return clustering.listed_slots(best, candidates.size, candidates.first, sizes.fixed)


def candidates_of(
    options: Options,
    sizes: Sizes,
    state: SqueezedState,
    rotated: Float[Array, "B Hq 1 D"],
) -> Candidates:
    """Returns the clusters to choose among, with what the query scores them."""
    scale = state.store.spec.sm_scale
    size, first = (
        jnp.repeat(x, sizes.lists, axis=1) for x in (state.size, state.first)
    )
    coarse = state.coarse
    if coarse is None:
        logs = clustering.log_scores(
            rotated, state.centroids, state.size, sm_scale=scale
        )
        return Candidates(size, first, logs)
    below = clusters_below(options, sizes, coarse, rotated, scale)
    place = jnp.maximum(below, 0)
    # What is below no coarse cluster that passes has no weight in the softmax.
    size = jnp.where(below >= 0, jnp.take_along_axis(size, place, axis=-1), 0)
    first = jnp.take_along_axis(first, place, axis=-1)
    by_head = place.reshape(*state.size.shape[:2], -1)
    centroids = buffers.gather(state.centroids, by_head)
    centroids = centroids.reshape(*place.shape, centroids.shape[-1])
    logs = clustering.log_scores(rotated, centroids, size, sm_scale=scale)
    return Candidates(size, first, logs)


def clusters_below(
    options: Options,
    sizes: Sizes,
    coarse: Coarse,
    rotated: Float[Array, "B Hq 1 D"],
    sm_scale: float,
) -> Int[Array, "B H M2"]:
    """Lists the clusters below the coarse ones that score above their threshold."""
    logs = clustering.log_scores(
        rotated, coarse.centroids, coarse.size, sm_scale=sm_scale
    )
    scores = by_list(options, coarse.size.shape[1], jnp.exp(logs))[:, :, 0]
    size, number, first = (
        jnp.repeat(x, sizes.lists, axis=1)
        for x in (coarse.size, coarse.number, coarse.first)
    )
    above = is_above(scores, size, coarse.threshold)
    if not options.coarse_unread:
        above = size > 0
    _, best = top_k(scores, min(sizes.coarse, sizes.scored), where=above)
    return clustering.listed_slots(best, number, first, sizes.scored)


def is_above(
    scores: Float[Array, "B H C"],
    size: Int[Array, "B H C"],
    threshold: Float[Array, "B"],
) -> Bool[Array, "B H C"]:
    """Says which clusters have tokens and score strictly above the threshold."""
    return (size > 0) & (scores > threshold[:, None, None])
