"""The definition of `page_bounds`, and its path on every device (XLA)."""

import jax
import jax.numpy as jnp


def page_bounds(q, page_min, page_max):
    """See :func:`pallas_kernels.page_scores.page_bounds`."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, num_pages = page_min.shape[1:3]
    q = q.reshape(batch, num_kv_heads, -1, head_dim)

    def against(q, bound):
        return jnp.einsum(
            "bkgd,bkpd->bkgp", q, bound, preferred_element_type=jnp.float32
        )

    # sum_d max(q_d min_d, q_d max_d): a positive q_d takes the max, a negative the min.
    bounds = against(jax.nn.relu(q), page_max) - against(jax.nn.relu(-q), page_min)
    return bounds.reshape(batch, num_q_heads, num_pages)
