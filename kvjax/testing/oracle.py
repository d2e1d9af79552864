"""Full attention in float64 NumPy, one row and one token at a time: the oracle.

Written from the definitions and importing nothing of ours: a mistake has to be made
twice, in two ways, to go unnoticed. Speed does not matter here, being obvious does.
"""

import math
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """The un-rotated heads of one sequence: tokens [0, prompt) are its prompt."""

    q: np.ndarray  # (Hq, T, D)
    k: np.ndarray  # (Hkv, T, D)
    v: np.ndarray  # (Hkv, T, D)
    prompt: int
    theta: float = 10_000.0
    sm_scale: float | None = None

    @property
    def group(self) -> int:
        return self.q.shape[0] // self.k.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.q.shape[1]


class Trace(NamedTuple):
    """The outputs at every token, prompt and generated, and what it attended to."""

    out: np.ndarray  # (T, Hq, D)
    lse: np.ndarray  # (T, Hq)
    attended: list[list[list[int]]]  # token, query head -> sorted absolute positions


def rotate(x, position, theta=10_000.0):
    """Rotates one vector: element i pairs with element i + D/2."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    turned = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2.0 * i / x.shape[-1])
        a, b = x[i], x[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def softmax_attention(query, keys, values, sm_scale=None):
    """Returns `(out, lse, weights)` of one query over keys; no keys give zeros."""
    query = np.asarray(query, np.float64)
    if len(keys) == 0:
        return np.zeros_like(query), -math.inf, np.zeros(0)
    scale = query.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    logits = np.array([scale * float(np.dot(query, key)) for key in keys])
    top = logits.max()
    terms = np.exp(logits - top)
    weights = terms / terms.sum()
    values = np.asarray(values, np.float64)
    out = sum(w * x for w, x in zip(weights, values, strict=True))
    return out, top + math.log(terms.sum()), weights


def entmax(scores, alpha):
    """Returns the probabilities of scores, their threshold found by halving."""
    z = (alpha - 1) * np.asarray(scores, np.float64)
    low, high = z.max() - 1, z.max()
    for _ in range(100):
        middle = (low + high) / 2
        mass = (z[z > middle] - middle) ** (1 / (alpha - 1))
        low, high = (middle, high) if mass.sum() >= 1 else (low, middle)
    p = np.maximum(z - low, 0.0) ** (1 / (alpha - 1))
    return p / p.sum()


def entmax_attention(query, keys, values, alpha, sm_scale=None):
    """Returns what `softmax_attention` does; lse is the maximum that entmax attains."""
    query = np.asarray(query, np.float64)
    if len(keys) == 0:
        return np.zeros_like(query), -math.inf, np.zeros(0)
    scale = query.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    scores = np.array([scale * float(np.dot(query, key)) for key in keys])
    p = entmax(scores, alpha)
    entropy = sum(x - x**alpha for x in p) / (alpha * (alpha - 1))
    values = np.asarray(values, np.float64)
    out = sum(w * x for w, x in zip(p, values, strict=True))
    return out, float(p @ scores) + entropy, p


class Attention:
    """Attention of a row's tokens, keys and queries at their absolute positions."""

    def __init__(self, row: Row, alpha: float = 1.0):
        self.row = row
        self.alpha = alpha
        self.q = self._rotated(row.q)
        self.k = self._rotated(row.k)

    def _rotated(self, x):
        x = np.asarray(x, np.float64)
        turned = [
            [rotate(x[h, t], t, self.row.theta) for t in range(x.shape[1])]
            for h in range(x.shape[0])
        ]
        return np.array(turned).reshape(x.shape)

    def __call__(self, t, h, kept):
        """Attends with query head `h` of token `t` over the positions `kept`."""
        kv = h // self.row.group
        query = self.q[h, t]
        keys = [self.k[kv, j] for j in kept]
        values = [self.row.v[kv, j] for j in kept]
        if self.alpha != 1:
            return entmax_attention(query, keys, values, self.alpha, self.row.sm_scale)
        return softmax_attention(query, keys, values, self.row.sm_scale)


class Recorder:
    """Collects what happens token by token, into a :class:`Trace`."""

    def __init__(self, row: Row):
        self.outs, self.lses, self.attended = [], [], []
        self.num_q_heads = row.q.shape[0]
        self.head_dim = row.q.shape[2]

    def add(self, outs, lses, attended):
        self.outs.append(outs)
        self.lses.append(lses)
        self.attended.append([sorted(kept) for kept in attended])

    def trace(self):
        shape = (-1, self.num_q_heads, self.head_dim)
        out = np.array(self.outs, np.float64).reshape(shape)
        return Trace(out, np.array(self.lses).reshape(shape[:2]), self.attended)


def step(attention, record, t, kept_of_head):
    """Attends at token t, records it, and returns the weights as dicts by position."""
    outs, lses, attended, weights = [], [], [], []
    for h in range(attention.row.q.shape[0]):
        kept = sorted(kept_of_head[h])
        out, lse, weight = attention(t, h, kept)
        outs.append(out)
        lses.append(lse)
        attended.append(kept)
        weights.append(dict(zip(kept, weight, strict=True)))
    record.add(outs, lses, attended)
    return weights


def everything(row, t):
    """Returns all positions up to `t`, for each query head."""
    return [list(range(t + 1)) for _ in range(row.q.shape[0])]


def full(row: Row, alpha: float = 1.0) -> Trace:
    """Returns the trace of a row where every token sees all up to itself."""
    attention, record = Attention(row, alpha), Recorder(row)
    for t in range(row.num_tokens):
        step(attention, record, t, everything(row, t))
    return record.trace()
