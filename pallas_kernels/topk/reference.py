"""The definition of `top_k`, and its path on every device (XLA)."""

import jax.numpy as jnp
from jax import lax


def top_k(scores, count, *, k, order, recall=1.0):
    """See :func:`pallas_kernels.topk.top_k`."""
    if recall < 1:
        values, indices = lax.approx_max_k(scores, k, recall_target=recall)
    else:
        values, indices = lax.top_k(scores, k)
    is_chosen = (values > -jnp.inf) | (jnp.isnan(values) & ~jnp.signbit(values))
    if count is not None:
        is_chosen &= jnp.arange(k, dtype=jnp.int32) < count[..., None]
    values = jnp.where(is_chosen, values, -jnp.inf)
    indices = jnp.where(is_chosen, indices, -1)
    if order == "index":
        last = jnp.where(is_chosen, indices, jnp.iinfo(jnp.int32).max)
        _, indices, values = lax.sort((last, indices, values), num_keys=1)
    return values, indices
