"""Tiles of the TPU kernel by device.

No entry was timed: see :mod:`pallas_kernels.page_attention.tuning`.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Tiles of :mod:`pallas_kernels.received_attention.mosaic_tpu`."""

    block_keys: int = 512  # keys a step, a multiple of 128
    block_rows: int = 256  # rows of each query head a step, a multiple of 128


# (device kind, dtype, D); what is not here takes the defaults.
TABLE: dict[tuple[str, str, int], Config] = {}


def lookup(device_kind: str, dtype: str, head_dim: int) -> Config:
    """Tiles for a problem on a device, or the defaults."""
    return TABLE.get((device_kind, dtype, head_dim), Config())
