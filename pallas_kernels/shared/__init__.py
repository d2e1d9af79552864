"""Pieces that kernels of several operations are built from."""
