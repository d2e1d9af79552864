"""RefreshKV (arXiv:2411.05787), as a method and, in `refresh`, over another's pages."""

from kvjax.methods.refreshkv.method import refreshkv as refreshkv
