"""CritiPrefill, one layer: segments of a prompt, each with a choice of blocks."""

import math
from typing import NamedTuple

import numpy as np

from oracles.attention import Attention, Row, best, heads_of, reduce


class Layer(NamedTuple):
    """What one layer did with a prompt."""

    out: np.ndarray  # (T, Hq, D)
    chosen: dict[tuple[int, int], set[int]]  # segment, KV head -> blocks
    weights: dict[tuple[int, int], list[float]]  # of the blocks before the segment
    visible: list[list[set[int]]]  # token, KV head -> positions


def critiprefill(
    row: Row,
    *,
    budget: int,
    segment: int,
    block: int,
    dense_tokens: int,
    fusion: float,
    score: str = "midrange",
    group_reduce: str = "mean",
    cuts: tuple[int, ...] = (),
    below: dict | None = None,
) -> Layer:
    """The prompt of a row, read by calls that begin at the `cuts` too."""
    attention, length = Attention(row), row.prompt
    num_kv_heads = row.k.shape[0]
    chosen, weights = {}, {}
    for s in range(math.ceil(length / segment)):
        start, end = s * segment, (s + 1) * segment
        is_whole = end <= length and not any(start < cut < end for cut in cuts)
        if not is_whole or start < dense_tokens:
            continue
        for kv in range(num_kv_heads):
            scores = {
                j: score_of(
                    attention,
                    heads_of(row, kv),
                    range(start, end),
                    attention.k[kv, j * block : (j + 1) * block],
                    score,
                    group_reduce,
                )
                for j in range(start // block)
            }
            own = softmax(list(scores.values()), row.q.shape[2] ** -0.5)
            before = None if below is None else below.get((s, kv))
            if before:
                own = [
                    fusion * x + (1 - fusion) * y
                    for x, y in zip(before, own, strict=True)
                ]
            weights[s, kv] = own
            ranking = dict(enumerate(own)) if fusion else scores
            chosen[s, kv] = best(ranking, budget // block)
    visible = [
        [
            seen_from(t, chosen.get((t // segment, kv)), segment, block)
            for kv in range(num_kv_heads)
        ]
        for t in range(length)
    ]
    outs = [
        [attention(t, h, sorted(visible[t][h // row.group]))[0] for h in range(heads)]
        for heads in [row.q.shape[0]]
        for t in range(length)
    ]
    return Layer(np.array(outs), chosen, weights, visible)


def seen_from(t, blocks, segment, block):
    """Positions that token t sees, under the blocks of its segment or in full."""
    if blocks is None:
        return set(range(t + 1))
    own = set(range(t // segment * segment, t + 1))
    return own.union(*(range(j * block, (j + 1) * block) for j in blocks))


def score_of(attention, heads, queries, keys, score, group_reduce):
    """As the official code: four products a query head, of both pairs of extremes."""
    found = []
    for h in heads:
        rows = [attention.q[h, t] for t in queries]
        sides = range(len(rows[0]))
        q_max = [max(x[d] for x in rows) for d in sides]
        q_min = [min(x[d] for x in rows) for d in sides]
        k_max = [max(x[d] for x in keys) for d in sides]
        k_min = [min(x[d] for x in keys) for d in sides]
        if score == "bound":
            found.append(
                sum(
                    max(
                        q * k
                        for q in (q_max[d], q_min[d])
                        for k in (k_max[d], k_min[d])
                    )
                    for d in sides
                )
            )
        else:
            largest, smallest = (
                (np.dot(q_max, k) + np.dot(q_min, k)) / 2 for k in (k_max, k_min)
            )
            found.append(max(largest, smallest))
    return reduce(found, group_reduce)


def softmax(scores, scale):
    if not scores:
        return []
    terms = [math.exp(scale * (x - max(scores))) for x in scores]
    return [x / sum(terms) for x in terms]
