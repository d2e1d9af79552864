"""Attention in float64 NumPy, a query at a time, and what every method needs of it."""

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
    """What happened at every token, prompt and generated."""

    out: np.ndarray  # (T, Hq, D)
    lse: np.ndarray  # (T, Hq)
    attended: list[list[list[int]]]  # token, query head -> sorted absolute positions


def rotate(x, position, theta=10_000.0):
    """One vector, turned: element i pairs with element i + D/2."""
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
    """One query over a list of keys: `(out, lse, weights)`; no keys give zeros."""
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
    """Probabilities of one list of scores, its threshold found by halving."""
    z = (alpha - 1) * np.asarray(scores, np.float64)
    low, high = z.max() - 1, z.max()
    for _ in range(100):
        middle = (low + high) / 2
        mass = (z[z > middle] - middle) ** (1 / (alpha - 1))
        low, high = (middle, high) if mass.sum() >= 1 else (low, middle)
    p = np.maximum(z - low, 0.0) ** (1 / (alpha - 1))
    return p / p.sum()


def entmax_sorted(scores, alpha):
    """The exact algorithms for alpha 1.5 and 2, by sorting."""
    z = (alpha - 1) * np.asarray(scores, np.float64)
    z = z - z.max()
    ranked = np.sort(z)[::-1]
    count = np.arange(1, len(z) + 1)
    if alpha == 2:  # Martins and Astudillo 2016
        tau = (np.cumsum(ranked) - 1) / count
        inside = ranked > tau
    else:  # Peters, Niculae and Martins 2019, Algorithm 2
        assert alpha == 1.5
        mean = np.cumsum(ranked) / count
        spread = np.cumsum(ranked**2) - count * mean**2
        tau = mean - np.sqrt(np.maximum((1 - spread) / count, 0))
        inside = tau <= ranked
    return np.maximum(z - tau[inside.sum() - 1], 0) ** (1 / (alpha - 1))


def entmax_attention(query, keys, values, alpha, sm_scale=None):
    """As `softmax_attention`; for the log-sum-exp, the maximum that entmax attains."""
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
        """Query head `h` of token `t` over the positions `kept`."""
        kv = h // self.row.group
        query = self.q[h, t]
        keys = [self.k[kv, j] for j in kept]
        values = [self.row.v[kv, j] for j in kept]
        if self.alpha != 1:
            return entmax_attention(query, keys, values, self.alpha, self.row.sm_scale)
        return softmax_attention(query, keys, values, self.row.sm_scale)


class Recorder:
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
    return [list(range(t + 1)) for _ in range(row.q.shape[0])]


def best(scores: dict[int, float], count: int) -> set[int]:
    """The `count` highest-scored positions; the lower position wins a tie."""
    order = sorted(scores, key=lambda position: (-scores[position], position))
    return set(order[: max(count, 0)])


def reduce(values, how):
    return max(values) if how == "max" else sum(values) / len(values)


def heads_of(row, kv):
    return range(kv * row.group, (kv + 1) * row.group)


def by_query_head(row, kept_of_kv):
    return [kept_of_kv[h // row.group] for h in range(row.q.shape[0])]


def page_bound(query, keys) -> float:
    """An upper bound of query . key over a page, from its element-wise extremes."""
    total = 0.0
    for d in range(len(query)):
        column = [key[d] for key in keys]
        total += max(query[d] * max(column), query[d] * min(column))
    return total
