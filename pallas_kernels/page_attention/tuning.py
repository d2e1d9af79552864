"""Tiles of the TPU kernel by device.

No entry was timed: they come from static schedules compiled for each device
(`benchmarks/results/tpu-static.json`), 2026-11-21. From P = 64 on, a step of 256 KB
hides the issue of its copies and its arithmetic behind their transfer: 512 tokens of
D = 128. Longer steps hide more, but the masked last block of every list costs more.
More buffers than two keep more bytes in flight than one step holds. Of codes, dtype
`uint8`, twice as many tokens are as many bytes.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Tiles of :mod:`pallas_kernels.page_attention.mosaic_tpu`."""

    block_tokens: int = 512  # tokens a step: pages copied together, one matmul
    num_buffers: int = 3  # blocks in VMEM: one in use, the others on their way


# (device kind, dtype, D, P); what is not here takes the defaults.
TABLE = {
    ("TPU v5 lite", "bfloat16", 64, 64): Config(block_tokens=1024),
    ("TPU v5 lite", "bfloat16", 64, 128): Config(block_tokens=1024),
    ("TPU v6 lite", "bfloat16", 64, 64): Config(block_tokens=1024),
    ("TPU v6 lite", "bfloat16", 64, 128): Config(block_tokens=1024),
}


def lookup(device_kind: str, dtype: str, head_dim: int, page_size: int) -> Config:
    """Tiles for a problem on a device, or the defaults."""
    default = Config(block_tokens=1024) if dtype == "uint8" else Config()
    return TABLE.get((device_kind, dtype, head_dim, page_size), default)
