"""Cascading KV cache (arXiv:2406.17808)."""

from kvjax.methods.cascade.method import cascade as cascade
