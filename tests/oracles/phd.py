"""Attention of models that repeat tokens, in plain loops over pairs, float64.

The mask of "Efficient Pretraining Length Scaling" (arXiv:2504.14992, Eq. 2 and Sec.
2.4), over the sequence in which the copies of a token follow each other.
"""

import numpy as np

from oracles.attention import rotate


def is_seen(query, key, copies, window, chunk):
    """Says whether copy j of token n, counted from 1, sees copy i of token m."""
    (n, j), (m, i) = query, key
    if i == 1:
        return m <= n
    if j == 1:
        return False
    if m == n:
        return i <= j
    if m > n or (chunk and m // chunk != n // chunk):
        return False
    # Hidden tokens between the two, in the order in which they are fed.
    between = [
        (t, c)
        for t in range(m, n + 1)
        for c in range(2, copies + 1)
        if (m, i) <= (t, c) < (n, j)
    ]
    return len(between) <= window


def mask(length, copies, window, chunk):
    """Which of the K * T interleaved rows sees which, of one sequence."""
    rows = [(n, j) for n in range(length) for j in range(1, copies + 1)]
    return np.array(
        [[is_seen(a, b, copies, window, chunk) for b in rows] for a in rows]
    )


def attention(q, k, v, copies, window=0, chunk=0, starts=(0,)):
    """Attends in a batch of rows that are copy-major, as a model that is trained.

    Args:
        q, k, v: `(B, H, K * T, D)`, un-rotated.
        starts: of the sequences in a row, each of which goes to the next.
    """
    length, group = q.shape[2] // copies, q.shape[1] // k.shape[1]
    order = np.arange(copies * length).reshape(copies, length).T.ravel()
    out = np.zeros(q.shape)
    ends = [*starts[1:], length]
    for first, end in zip(starts, ends, strict=True):
        rows = order[first * copies : end * copies]
        place = np.repeat(np.arange(end - first), copies)
        sees = mask(end - first, copies, window, chunk)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                queries, keys = (
                    np.array([rotate(x, at) for x, at in zip(xs, place, strict=True)])
                    for xs in (q[b, h, rows], k[b, h // group, rows])
                )
                logits = queries @ keys.T / q.shape[3] ** 0.5
                logits = np.where(sees, logits, -np.inf)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out[b, h, rows] = weights @ np.asarray(v[b, h // group, rows])
    return out
