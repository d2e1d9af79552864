"""EntmaxKV (arXiv:2605.21649)."""

from kvjax.methods.entmaxkv.method import entmaxkv as entmaxkv
