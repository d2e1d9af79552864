"""What the definitions of methods share, over the oracle of `kvjax.testing`."""

import numpy as np

# Imports nothing of ours either.
from kvjax.testing.oracle import Attention as Attention
from kvjax.testing.oracle import Recorder as Recorder
from kvjax.testing.oracle import Row as Row
from kvjax.testing.oracle import Trace as Trace
from kvjax.testing.oracle import entmax as entmax
from kvjax.testing.oracle import entmax_attention as entmax_attention
from kvjax.testing.oracle import everything as everything
from kvjax.testing.oracle import full as full
from kvjax.testing.oracle import rotate as rotate
from kvjax.testing.oracle import softmax_attention as softmax_attention
from kvjax.testing.oracle import step as step


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
