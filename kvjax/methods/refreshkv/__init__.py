"""RefreshKV (arXiv:2411.05787), as a method and as a transform over another."""

from kvjax.methods.refreshkv.method import refreshkv as refreshkv
from kvjax.methods.refreshkv.refresh import refresh as refresh
