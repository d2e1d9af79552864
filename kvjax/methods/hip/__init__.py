"""HiP attention (arXiv:2406.09827)."""

from kvjax.methods.hip.method import hip as hip
