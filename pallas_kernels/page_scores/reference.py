"""The definitions of `page_scores`, and their path on every device (XLA)."""

import jax
import jax.numpy as jnp

REDUCE = {"none": lambda x, **_: x, "mean": jnp.mean, "max": jnp.max}


def check_reduce(group_reduce: str) -> None:
    """Raises `ValueError` unless there is such a reduction over query heads."""
    if group_reduce not in REDUCE:
        known = ", ".join(map(repr, REDUCE))
        raise ValueError(f"{group_reduce=} must be one of {known}.")


def page_bounds(q, page_min, page_max, *, group_reduce):
    """See :func:`pallas_kernels.page_scores.page_bounds`."""
    q = _grouped(q, page_min)
    # sum_d max(q_d min_d, q_d max_d): a positive q_d takes the max, a negative the min.
    bounds = _against(jax.nn.relu(q), page_max) - _against(jax.nn.relu(-q), page_min)
    reduced = REDUCE[group_reduce](bounds, axis=2, keepdims=True)
    return _of_heads(reduced)


def page_moments(q, page_mean, page_variance):
    """See :func:`pallas_kernels.page_scores.page_moments`."""
    q = _grouped(q, page_mean)
    variance = sum(_against(part, page_variance) for part in squares(q))
    return _of_heads(_against(q, page_mean)), _of_heads(variance)


def squares(q):
    """Terms of q's dtype whose sum is q * q: one in float32, two in a shorter one.

    Rounded once, a square would have bfloat16's 8 bits; with the rest it has 16.
    """
    square = jnp.square(q.astype(jnp.float32))
    high = square.astype(q.dtype)
    if q.dtype == jnp.float32:
        return (high,)
    return high, (square - high.astype(jnp.float32)).astype(q.dtype)


def _grouped(q, statistics):
    batch, _, head_dim = q.shape
    return q.reshape(batch, statistics.shape[1], -1, head_dim)


def _of_heads(x):
    return x.reshape(x.shape[0], -1, x.shape[3])


def _against(q, statistics):
    return jnp.einsum(
        "bkgd,bkpd->bkgp", q, statistics, preferred_element_type=jnp.float32
    )
