"""Counts of what was drawn, against the chances that it should have."""

import numpy as np


def distance(tokens, wanted):
    """Standard deviations by which chi-square is above what chance gives."""
    rows, numbers = np.unique(tokens, axis=0, return_counts=True)
    counts = {tuple(r.tolist()): n for r, n in zip(rows, numbers, strict=True)}
    possible = [token for token, chance in wanted.items() if chance > 0]
    assert counts.keys() <= set(possible), "a token that the target excludes"
    found = np.array([counts.get(token, 0) for token in possible])
    expected = len(tokens) * np.array([wanted[token] for token in possible])
    freedom = len(possible) - 1
    chi_square = ((found - expected) ** 2 / expected).sum()
    return (chi_square - freedom) / np.sqrt(2 * freedom)
