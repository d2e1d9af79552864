"""RetroAttention by its definition: softmax over the union of sets of pages."""

import numpy as np


def attention(query, keys, values, sm_scale):
    """One query over some keys in float64: `(out, lse)`; no keys give zeros."""
    if len(keys) == 0:
        return np.zeros(values.shape[-1]), -np.inf
    logits = sm_scale * (keys.astype(np.float64) @ query.astype(np.float64))
    top = logits.max()
    terms = np.exp(logits - top)
    return terms @ values.astype(np.float64) / terms.sum(), top + np.log(terms.sum())


def union(pages_of, t, now):
    """Pages that token t has seen after step `now`; step m read `pages_of[m]`."""
    return set().union(*(pages_of[m] for m in range(t, now + 1)))


def positions(pages, page_size, t):
    """What token t may see of the pages, in order."""
    return [p for p in range(t + 1) if p // page_size in pages]


def window(start, now, size):
    """The tokens of a step's window that a step decoded, oldest first."""
    return range(max(start, now - size + 1), now + 1)
