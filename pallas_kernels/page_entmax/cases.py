"""Problems of `page_entmax`: see :mod:`pallas_kernels.shared.cases`."""

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.page_attention.cases import arguments as arguments
from pallas_kernels.page_attention.cases import num_bytes as num_bytes
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.shared.cases import LONG, SHORT, Case, array


def _case(
    context: int, page_size: int, alpha: float, has_tau: bool = False, **sizes: Any
) -> Case:
    function = functools.partial(page_entmax, sm_scale=0.1, alpha=alpha)
    shapes = arguments(context, page_size, **sizes)
    tau = array(*shapes[0].shape[:3], dtype=jnp.float32)
    return Case(function, (*shapes, tau if has_tau else None))


CASES = {
    "page_entmax-P64-128K": _case(SHORT, 64, 1.5),
    "page_entmax-P16-1M": _case(LONG, 16, 1.5, tokens=LONG // 16),
    "page_entmax-K8V4-P64-128K": _case(SHORT, 64, 1.5, bits=(8, 4)),
    "page_entmax-tau-P64-128K": _case(SHORT, 64, 1.7, has_tau=True),
    # At the edges of what kernels say they support.
    "page_entmax-tau-P24-T4-D64": _case(
        9 * 24,
        24,
        1.7,
        has_tau=True,
        tokens=72,
        batch=2,
        heads=(8, 2),
        rows=4,
        head_dim=64,
    ),
}
