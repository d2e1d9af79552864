"""Full attention, and the baselines that the papers compare with."""

import math

import numpy as np

from oracles.attention import (
    Attention,
    Recorder,
    Row,
    Trace,
    best,
    by_query_head,
    everything,
    heads_of,
    page_bound,
    reduce,
    rotate,
    softmax_attention,
    step,
)


def renumbered(row: Row, record: Recorder, t: int, kept: list[int]) -> None:
    """All heads of token t over `kept`, which sit at 0, 1, 2, ..., itself the last."""
    outs, lses = [], []
    for h in range(row.q.shape[0]):
        kv = h // row.group
        keys = [rotate(row.k[kv, j], place, row.theta) for place, j in enumerate(kept)]
        query = rotate(row.q[h, t], len(kept) - 1, row.theta)
        values = [row.v[kv, j] for j in kept]
        out, lse, _ = softmax_attention(query, keys, values, row.sm_scale)
        outs.append(out)
        lses.append(lse)
    record.add(outs, lses, [kept] * row.q.shape[0])


def streaming_llm(row: Row, *, budget: int, num_sinks: int) -> Trace:
    """Sinks and the newest tokens, numbered 0, 1, 2, ... inside the cache."""
    record = Recorder(row)
    for t in range(row.num_tokens):
        kept = [j for j in range(t + 1) if j < num_sinks or j > t - budget + num_sinks]
        renumbered(row, record, t, kept)
    return record.trace()


def token_select(
    row: Row, *, budget: int, num_sinks: int, window: int, threshold=None
) -> Trace:
    """The tokens that all heads of the layer vote for, numbered 0, 1, 2, ..."""
    record = Recorder(row)
    last, chosen = None, set()
    for t in range(row.num_tokens):
        newest, between = max(t + 1 - window, 0), range(num_sinks, t + 1 - window)
        if t < row.prompt or t < budget:
            renumbered(row, record, t, list(range(t + 1)))
            continue
        query = row.q[:, t].astype(np.float64).ravel()
        like = -1.0
        if last is not None:
            like = query @ last / math.sqrt((query @ query) * (last @ last))
        if threshold is None or like < threshold:
            votes = dict.fromkeys(between, 0.0)
            for h in range(row.q.shape[0]):
                near = rotate(row.q[h, t], window, row.theta)
                keys = [row.k[h // row.group, j] for j in between]
                _, _, weights = softmax_attention(near, keys, keys, sm_scale=1.0)
                for j, weight in zip(between, weights, strict=True):
                    votes[j] += weight
            chosen, last = best(votes, budget - num_sinks - window), query
        kept = {*range(num_sinks), *chosen, *range(newest, t + 1)}
        renumbered(row, record, t, sorted(kept))
    return record.trace()


def snapkv_pool(scores, kernel: int, pooling: str) -> list[float]:
    """A centred window over a list; outside it there is -inf (max) or 0 (mean)."""
    pooled = []
    for j in range(len(scores)):
        inside = [
            scores[i]
            for i in range(j - kernel // 2, j + kernel // 2 + 1)
            if 0 <= i < len(scores)
        ]
        pooled.append(max(inside) if pooling == "max" else sum(inside) / kernel)
    return pooled


def snapkv(
    row: Row, *, budget: int, window: int, kernel: int, pooling: str, group_reduce: str
) -> Trace:
    """After the prompt: what its last queries looked at, and the last queries."""
    attention, record = Attention(row), Recorder(row)
    num_kv_heads, length = row.k.shape[0], row.prompt
    prompt_weights = [
        step(attention, record, t, everything(row, t)) for t in range(length)
    ]
    kept_of_kv = [set(range(length)) for _ in range(num_kv_heads)]
    if length > budget:
        prefix = length - window
        for kv in range(num_kv_heads):
            votes = []
            for j in range(prefix):
                per_head = [
                    sum(prompt_weights[t][h][j] for t in range(prefix, length))
                    for h in heads_of(row, kv)
                ]
                votes.append(reduce(per_head, group_reduce))
            pooled = dict(enumerate(snapkv_pool(votes, kernel, pooling)))
            kept_of_kv[kv] = best(pooled, budget - window) | set(range(prefix, length))
    for t in range(length, row.num_tokens):
        for kept in kept_of_kv:
            kept.add(t)
        step(attention, record, t, by_query_head(row, kept_of_kv))
    return record.trace()


def h2o(row: Row, *, budget: int, recent: int, group_reduce: str) -> Trace:
    """The newest tokens, and those that were attended to most so far."""
    attention, record = Attention(row), Recorder(row)
    num_kv_heads, length = row.k.shape[0], row.prompt
    scores = [{} for _ in range(num_kv_heads)]

    def accumulate(weights):
        for kv in range(num_kv_heads):
            for j in weights[kv * row.group]:
                seen = [weights[h][j] for h in heads_of(row, kv)]
                scores[kv][j] = scores[kv].get(j, 0.0) + reduce(seen, group_reduce)

    for t in range(length):
        accumulate(step(attention, record, t, everything(row, t)))
    kept_of_kv = [set(range(length)) for _ in range(num_kv_heads)]
    if length > budget:
        newest = set(range(length - recent, length))
        for kv in range(num_kv_heads):
            others = {j: s for j, s in scores[kv].items() if j not in newest}
            kept_of_kv[kv] = best(others, budget - recent) | newest
    for t in range(length, row.num_tokens):
        for kv in range(num_kv_heads):
            kept = kept_of_kv[kv]
            kept.add(t)
            if len(kept) > budget:
                newest = sorted(kept)[-recent:]
                others = [j for j in sorted(kept) if j not in newest]
                kept.remove(min(others, key=lambda j: (scores[kv][j], j)))
        accumulate(step(attention, record, t, by_query_head(row, kept_of_kv)))
    return record.trace()


def tova(row: Row, *, budget: int) -> Trace:
    """The token the last query looked at least leaves, in all heads of the layer."""
    attention, record = Attention(row), Recorder(row)
    num_q_heads, length = row.q.shape[0], row.prompt
    kept, mean = set(range(length)), {}

    def head_mean(weights, kept):
        return {j: sum(w[j] for w in weights) / num_q_heads for j in kept}

    for t in range(length):
        weights = step(attention, record, t, everything(row, t))
        mean = head_mean(weights, range(t + 1))
    if length > budget:
        kept = best(mean, budget)
    for t in range(length, row.num_tokens):
        if len(kept) == budget:
            kept.remove(min(kept, key=lambda j: (mean[j], j)))
        kept.add(t)
        weights = step(attention, record, t, [kept] * num_q_heads)
        mean = head_mean(weights, kept)
    return record.trace()


def quest_pages(attention, t, kv, heads, *, budget, page_size, group_reduce, recent):
    """The pages that the query heads `heads` of KV head `kv` read at token t."""
    current = t // page_size
    pages = {j: [] for j in range(current + 1)}
    for position in range(t + 1):
        pages[position // page_size].append(attention.k[kv, position])
    newest = set(range(max(current - recent + 1, 0), current + 1))
    bounds = {}
    for page, keys in pages.items():
        if page not in newest:
            each = [page_bound(attention.q[h, t], keys) for h in heads]
            bounds[page] = reduce(each, group_reduce)
    return newest | best(bounds, budget // page_size - recent)


def quest(
    row: Row,
    *,
    budget: int,
    page_size: int,
    per: str = "kv",
    group_reduce: str = "mean",
    recent: int = 1,
) -> Trace:
    """The newest pages, and those whose keys could score highest."""
    attention, record = Attention(row), Recorder(row)
    for t in range(row.num_tokens):
        if t < row.prompt:
            step(attention, record, t, everything(row, t))
            continue
        kept_of_head = []
        for h in range(row.q.shape[0]):
            kv = h // row.group
            pages = quest_pages(
                attention,
                t,
                kv,
                heads_of(row, kv) if per == "kv" else [h],
                budget=budget,
                page_size=page_size,
                group_reduce=group_reduce,
                recent=recent,
            )
            kept_of_head.append([j for j in range(t + 1) if j // page_size in pages])
        step(attention, record, t, kept_of_head)
    return record.trace()


def oracle_topk(row: Row, *, budget: int, per: str = "kv") -> Trace:
    """The tokens with the largest true weights, found by looking at all of them."""
    attention, record = Attention(row), Recorder(row)
    for t in range(row.num_tokens):
        if t < row.prompt:
            step(attention, record, t, everything(row, t))
            continue
        kept_of_head = []
        for h in range(row.q.shape[0]):
            heads = heads_of(row, h // row.group) if per == "kv" else [h]
            true = [attention(t, g, range(t + 1))[2] for g in heads]
            total = {j: sum(w[j] for w in true) for j in range(t + 1)}
            kept_of_head.append(best(total, budget))
        step(attention, record, t, kept_of_head)
    return record.trace()
