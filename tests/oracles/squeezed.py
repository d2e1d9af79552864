"""Clusters of a prompt's keys, what a query chooses among them, and who is read."""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from oracles.attention import (
    Attention,
    Recorder,
    Row,
    Trace,
    everything,
    heads_of,
    reduce,
    step,
)


class Clustered(NamedTuple):
    """The clusters of one KV head, in the order that their tokens are stored in."""

    members: list[list[int]]  # of each the positions, rising; none of an empty one
    centroids: list[np.ndarray]
    below: list[list[int]]  # of each coarse cluster its clusters
    coarse: list[np.ndarray]  # their centroids


def share_of(count: int, share: float) -> int:
    return math.floor(count * Fraction(str(share)))


def nearest(point, centres) -> int:
    gaps = [float((point - z) @ (point - z)) for z in centres]
    return gaps.index(min(gaps))


def kmeans(keys, num: int, rounds: int) -> list[int]:
    """Lloyd's algorithm on directions, begun at keys at even distances."""
    units = [key / max(math.sqrt(float(key @ key)), 1e-12) for key in keys]
    centres = [units[c * len(keys) // num] for c in range(num)]
    for _ in range(rounds):
        labels = [nearest(u, centres) for u in units]
        for c in range(num):
            mine = [u for u, label in zip(units, labels, strict=True) if label == c]
            if mine:
                centres[c] = sum(mine) / len(mine)
    return [nearest(u, centres) for u in units]


def clustered(keys, num: int, num_coarse: int | None, rounds: int) -> Clustered:
    labels = kmeans(keys, num, rounds) if len(keys) else []
    members = [[j for j, l in enumerate(labels) if l == c] for c in range(num)]
    means = [
        sum(keys[j] for j in mine) / len(mine) if mine else np.zeros(keys.shape[-1])
        for mine in members
    ]
    if num_coarse is None:
        return Clustered(members, means, [], [])
    filled = [c for c in range(num) if members[c]]
    num_coarse = min(num_coarse, len(filled))
    parents = kmeans([means[c] for c in filled], num_coarse, rounds) if filled else []
    order = sorted(range(len(filled)), key=lambda i: parents[i])
    below = [
        [place for place, i in enumerate(order) if parents[i] == p]
        for p in range(num_coarse)
    ]
    ordered = [filled[i] for i in order]
    centroids = [means[c] for c in ordered]
    coarse = [
        sum(centroids[i] for i in mine) / len(mine)
        if mine
        else np.zeros(keys.shape[-1])
        for mine in below
    ]
    return Clustered([members[c] for c in ordered], centroids, below, coarse)


def key_weights(query, centroids, sizes, counted=None) -> list[float]:
    """S_c: the weight of one key of each cluster, keys being their centroids."""
    counted = sizes if counted is None else counted
    logits = [
        float(query @ m) * len(query) ** -0.5 if n else -math.inf
        for m, n in zip(centroids, sizes, strict=True)
    ]
    live = [x for x, n in zip(logits, counted, strict=True) if n]
    if not live:
        return [0.0 for _ in sizes]
    top = max(live)
    total = sum(
        n * math.exp(x - top) for x, n in zip(logits, counted, strict=True) if n
    )
    return [math.exp(x - top) / total for x in logits]


class Squeezed:
    """A row whose prompt has ended: clusters, thresholds, and lists of later tokens."""

    def __init__(
        self,
        row: Row,
        *,
        most: int,
        tail: int,
        clusters: float,
        rounds: int,
        budget: int,
        sparsity: float | None = None,
        threshold: float | None = None,
        coarse: float | None = None,
        coarse_sparsity: float = 0.5,
        per: str = "kv",
        group_reduce: str = "mean",
        most_coarse: int = 1,
    ):
        self.row, self.attention, self.budget = row, Attention(row), budget
        self.fixed = fixed = max(row.prompt - tail, 0)
        self.reduce = group_reduce
        heads = range(row.q.shape[0])
        self.lists = (
            [[h] for h in heads]
            if per == "query"
            else [list(heads_of(row, kv)) for kv in range(row.k.shape[0])]
        )
        num = min(max(share_of(fixed, clusters), 1), most, fixed)
        above = None
        if coarse is not None:
            above = min(max(share_of(fixed, coarse), 1), most_coarse)
        self.of_kv = [
            clustered(keys[:fixed], num, above, rounds) for keys in self.attention.k
        ]
        self.window = range(fixed, row.prompt)
        self.is_open = (sparsity is None and threshold is None) or sparsity == 0
        self.coarse_is_open = coarse is None or coarse_sparsity == 0
        self.scored = most
        if coarse is not None:
            self.scored = most - int(coarse_sparsity * most / 2)
        self.sparsity, self.coarse_sparsity = sparsity, coarse_sparsity
        self.threshold = threshold or 0.0
        self.coarse_threshold = 0.0
        if fixed and sparsity:
            self.threshold = float(np.quantile(self.per_key(False), sparsity))
        if fixed and not self.coarse_is_open:
            self.coarse_threshold = float(
                np.quantile(self.per_key(True), coarse_sparsity)
            )

    def sizes(self, kv: int, is_coarse: bool) -> list[int]:
        mine = self.of_kv[kv]
        sizes = [len(m) for m in mine.members]
        if is_coarse:
            return [sum(sizes[i] for i in below) for below in mine.below]
        return sizes

    def scores(self, heads, t: int, is_coarse=False, alive=None) -> np.ndarray:
        """Of the clusters of a list, from its heads' queries at token t."""
        kv = heads[0] // self.row.group
        mine, sizes = self.of_kv[kv], self.sizes(kv, is_coarse)
        centroids = mine.coarse if is_coarse else mine.centroids
        counted = sizes
        if alive is not None:
            counted = [n if c in alive else 0 for c, n in enumerate(sizes)]
        found = [
            key_weights(self.attention.q[h, t], centroids, sizes, counted)
            for h in heads
        ]
        return np.array(
            [reduce([one[c] for one in found], self.reduce) for c in range(len(sizes))]
        )

    def per_key(self, is_coarse: bool) -> list[float]:
        """Every key of every list with its cluster's mean over the window."""
        found = []
        for heads in self.lists:
            scores = [self.scores(heads, t, is_coarse) for t in self.window]
            mean = sum(scores) / len(scores)
            sizes = self.sizes(heads[0] // self.row.group, is_coarse)
            for value, size in zip(mean, sizes, strict=True):
                found += [value] * size
        return found

    def alive(self, heads, t: int) -> list[int]:
        """The clusters that are scored, those of the best coarse ones first."""
        kv = heads[0] // self.row.group
        if not self.of_kv[kv].below:
            return list(range(len(self.of_kv[kv].members)))
        scores, sizes = self.scores(heads, t, True), self.sizes(kv, True)
        kept = [
            c
            for c in np.argsort(-scores, kind="stable")
            if sizes[c] and (self.coarse_is_open or scores[c] > self.coarse_threshold)
        ]
        return [i for c in kept for i in self.of_kv[kv].below[c]][: self.scored]

    def listed(self, heads, t: int) -> list[int]:
        if not self.fixed:
            return []
        kv = heads[0] // self.row.group
        alive = self.alive(heads, t)
        scores = self.scores(heads, t, alive=set(alive))
        members = self.of_kv[kv].members
        chosen = [
            c
            for c in sorted(alive, key=lambda c: -scores[c])
            if members[c] and (self.is_open or scores[c] > self.threshold)
        ]
        return [j for c in chosen for j in members[c]][: self.budget]


def squeezed(row: Row, **options) -> Trace:
    """Chosen clusters, and all that is behind the clustered tokens."""
    ended, record = Squeezed(row, **options), Recorder(row)
    for t in range(row.num_tokens):
        kept = everything(row, t)
        if t >= row.prompt:
            dense = list(range(ended.fixed, t + 1))
            for heads in ended.lists:
                for h in heads:
                    kept[h] = ended.listed(heads, t) + dense
        step(ended.attention, record, t, kept)
    return record.trace()
