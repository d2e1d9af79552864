"""Shapes that are compiled for devices that are not there: of a layer of an 8B model.

8 KV heads of 4 query heads and 128 dimensions, bfloat16, one row, 128K or 1M tokens,
unless a case says otherwise. Each function gives the arguments of an operation.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.page_attention import Surrogate

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
Q_HEADS = KV_HEADS * GROUP
SHORT, LONG = 1 << 17, 1 << 20


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def pages(
    context,
    page_size,
    *,
    tokens=4096,
    batch=1,
    heads=(Q_HEADS, KV_HEADS),
    lists=None,
    rows=1,
    head_dim=HEAD_DIM,
    dtype=jnp.bfloat16,
    masked=False,
    given=False,
    features=0,
):
    """Of `page_attention`: lists of `tokens`, a mask, a given threshold.

    With `features` it starts from other tokens and sums by other weights too.
    """
    lists, listed = lists or heads[1], tokens // page_size
    mask = array(batch, lists, listed, rows, dtype=jnp.bool_)
    tau = array(batch, heads[0], rows, dtype=jnp.float32)
    beside = ()
    if features:
        single = functools.partial(array, dtype=jnp.float32)
        shape = batch, heads[1], features
        weights = single(*shape, head_dim), single(*shape), single(*tau.shape, features)
        beside = (single(*tau.shape, head_dim), tau), Surrogate(*weights)
    return (
        array(batch, heads[0], rows, head_dim, dtype=dtype),
        array(
            batch, heads[1], context // page_size, page_size, 2 * head_dim, dtype=dtype
        ),
        array(batch, lists, listed, dtype=jnp.int32),
        array(batch, rows, dtype=jnp.int32),
        mask if masked else None,
        tau if given else None,
        *beside,
    )


def cache(context, *, rows=1, held=False):
    """Of `decode_attention`; `held` with positions of its slots."""
    keys = array(1, KV_HEADS, context, HEAD_DIM)
    positions = array(1, KV_HEADS, context, dtype=jnp.int32)
    return (
        array(1, Q_HEADS, rows, HEAD_DIM),
        keys,
        keys,
        array(1, rows, dtype=jnp.int32),
        positions if held else None,
    )


def statistics(context, page_size):
    """Of `page_bounds` and `page_moments`."""
    of_pages = array(1, KV_HEADS, context // page_size, HEAD_DIM)
    return array(1, Q_HEADS, HEAD_DIM), of_pages, of_pages


def scores(num_scores, heads):
    """Of `solve` and `top_k`."""
    return (array(1, heads, num_scores, dtype=jnp.float32),)
