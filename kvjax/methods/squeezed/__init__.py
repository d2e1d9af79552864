"""Squeezed Attention (arXiv:2411.09688)."""

from kvjax.methods.squeezed.method import squeezed as squeezed
