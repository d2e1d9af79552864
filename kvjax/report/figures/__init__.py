"""Figures, drawn from what was measured."""
