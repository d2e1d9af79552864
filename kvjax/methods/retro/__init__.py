"""RetroAttention (arXiv:2508.09001)."""

from kvjax.methods.retro.method import retro as retro
