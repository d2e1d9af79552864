"""Problems of `received_attention`: see :mod:`pallas_kernels.shared.cases`."""

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.received_attention import received_attention
from pallas_kernels.shared.cases import (
    HEAD_DIM,
    KV_HEADS,
    Q_HEADS,
    SHORT,
    Case,
    array,
)


def arguments(slots: int, rows: int) -> tuple[Any, ...]:
    """Shapes of the arrays of a prompt's last rows."""
    return (
        array(1, Q_HEADS, rows, HEAD_DIM),
        array(1, KV_HEADS, slots, HEAD_DIM),
        array(1, Q_HEADS, rows, dtype=jnp.float32),
        array(1, rows, dtype=jnp.int32),
    )


CASES = {
    "received_attention-T1024-128K": Case(
        functools.partial(received_attention, sm_scale=0.1, group_reduce="max"),
        arguments(SHORT, 1024),
    ),
}
