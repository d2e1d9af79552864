"""Tiles of the TPU kernel by device.

No entry was timed: see :mod:`pallas_kernels.page_attention.tuning`.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Tiles of :mod:`pallas_kernels.decode_attention.mosaic_tpu`."""

    block_tokens: int = 512  # tokens a step, a multiple of 128
    num_buffers: int = 3  # blocks in VMEM: one in use, the others on their way


# (device kind, dtype, D); what is not here takes the defaults.
TABLE: dict[tuple[str, str, int], Config] = {}


def lookup(device_kind: str, dtype: str, head_dim: int) -> Config:
    """Tiles for a problem on a device, or the defaults."""
    default = Config(block_tokens=1024) if dtype == "uint8" else Config()
    return TABLE.get((device_kind, dtype, head_dim), default)
