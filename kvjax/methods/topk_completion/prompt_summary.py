"""At a prompt's end: its map, its outliers and its summary, from what was stored.

The middle of a prompt are its tokens from `num_sinks` on, before its last few.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from kvjax.methods.topk_completion import estimators, feature_maps
from kvjax.methods.topk_completion.estimators import Estimator
from kvjax.stores import buffers, slots_or_pages
from kvjax.stores.slots_or_pages import Store
from pallas_kernels.shared.quantized import floats

OUTLIER_QUERIES = 16  # newest ones, that say which keys the map overestimates


def is_middle(
    store: Store,
    num_sinks: int,
    middle_end: Int[Array, "B"],
    outliers: Int[Array, "B Hkv M"] | None,
) -> Bool[Array, "B Hkv S"]:
    """Says which tokens a summary stands for: the middle without the outliers."""
    size = slots_or_pages.num_slots(store)
    slots = jnp.arange(size, dtype=jnp.int32)
    inside = (slots >= num_sinks) & (slots < middle_end[:, None, None])
    shape = (store.spec.batch, store.spec.num_kv_heads, size)
    inside = jnp.broadcast_to(inside, shape)
    if outliers is None:
        return inside
    return inside & ~selection.is_listed(outliers, size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def complete(
    estimator: Estimator,
    num_outliers: int,
    num_sinks: int,
    store: Store,
    queries: Float[Array, "B Hq W D"] | None,
    weights: Any,
    middle_end: Int[Array, "B"],
) -> tuple[Any, Int[Array, "B Hkv M"] | None, Any]:
    """Makes map, outliers and summary of a prompt: one program, jitted or not.

    Args:
        queries: the newest, rotated, a ring; of a learned map for its outliers alone.
        weights: of a learned map, else None.
        middle_end: where the middle ends.

    Returns:
        `(params, outliers, summary)`, outliers None if there are none.
    """
    k, v = slots_or_pages.views(store)
    inside = is_middle(store, num_sinks, middle_end, None)
    params = weights
    if params is None:
        params = estimator.fit(calibration(store, queries, inside))
    outliers = None
    if num_outliers:
        feature_map = estimator.feature_map
        if feature_map is None or queries is None:
            raise ValueError(f"{num_outliers=} need a feature map, and queries.")
        outliers = _outliers(feature_map, params, store, queries, inside, num_outliers)
        inside = is_middle(store, num_sinks, middle_end, outliers)
    return params, outliers, estimator.summarise(params, floats(k), floats(v), inside)


def calibration(
    store: Store,
    queries: Float[Array, "B Hq W D"] | None,
    inside: Bool[Array, "B Hkv S"],
) -> feature_maps.Prompt:
    """Collects what a map is fitted to: the queries of a group head by head.

    Raises:
        ValueError: if there are no queries.
    """
    if queries is None:
        raise ValueError("a map is fitted to queries, and none were kept.")
    spec, size = store.spec, queries.shape[2]
    is_query = buffers.newest_positions(store.length, size) >= 0
    x = queries.astype(jnp.float32) * spec.sm_scale
    x = x.reshape(spec.batch, spec.num_kv_heads, spec.group * size, spec.head_dim)
    is_query = jnp.tile(is_query, (1, spec.group))
    keys = floats(slots_or_pages.keys(store))
    return feature_maps.Prompt(keys, inside, x, is_query)


def _outliers(
    feature_map: feature_maps.FeatureMap,
    params: Any,
    store: Store,
    queries: Float[Array, "B Hq W D"],
    inside: Bool[Array, "B Hkv S"],
    num: int,
) -> Int[Array, "B Hkv M"]:
    spec, size = store.spec, queries.shape[2]
    newest = jnp.arange(min(OUTLIER_QUERIES, size), dtype=jnp.int32)
    positions = store.length[:, None] - 1 - newest
    slots = (positions % size)[:, None, :, None]
    q = jnp.take_along_axis(queries, slots, axis=2)
    return estimators.outliers(
        feature_map,
        params,
        q,
        positions >= 0,
        slots_or_pages.attend_all(store, q, positions).lse,
        floats(slots_or_pages.keys(store)),
        inside,
        num,
        spec.sm_scale,
    )
