"""The transforms that share budgets out, among heads, kinds of heads, and steps."""

import math

from oracles.attention import (
    Attention,
    Recorder,
    Row,
    Trace,
    best,
    by_query_head,
    everything,
    heads_of,
    reduce,
    step,
)
from oracles.baselines import snapkv_pool


def votes(
    attention, kv, kept, *, window: int, kernel: int, pooling: str, group_reduce: str
) -> dict[int, float]:
    """SnapKV's score of each kept position of a KV head, by the newest queries."""
    row, kept = attention.row, sorted(kept)
    older, newest = kept[:-window], kept[-window:]
    received = {j: [0.0] * row.group for j in older}
    for t in newest:
        seen = [j for j in kept if j <= t]
        for g, h in enumerate(heads_of(row, kv)):
            _, _, weights = attention(t, h, seen)
            for j, weight in zip(seen, weights, strict=True):
                if j in received:
                    received[j][g] += weight
    reduced = [reduce(received[j], group_reduce) for j in older]
    pooled = snapkv_pool(reduced, kernel, pooling)
    return dict(zip(older, pooled, strict=True)) | dict.fromkeys(newest, math.inf)


def read_prompt(row: Row) -> tuple[Attention, Recorder]:
    """A prompt that was attended to in full."""
    attention, record = Attention(row), Recorder(row)
    for t in range(row.prompt):
        step(attention, record, t, everything(row, t))
    return attention, record


def head_budgets(row: Row, *, budget: int, alpha: float, **snapkv) -> Trace:
    """The best of all heads together, once each has its own few best."""
    attention, record = read_prompt(row)
    num_kv_heads = row.k.shape[0]
    candidates = []
    for kv in range(num_kv_heads):
        scores = votes(attention, kv, range(row.prompt), **snapkv)
        own = best(scores, math.floor(alpha * budget))
        for j, score in scores.items():
            candidates.append((-math.inf if j in own else -score, kv, j))
    kept_of_kv = [set() for _ in range(num_kv_heads)]
    for _, kv, j in sorted(candidates)[: num_kv_heads * budget]:
        kept_of_kv[kv].add(j)
    for t in range(row.prompt, row.num_tokens):
        for kept in kept_of_kv:
            kept.add(t)
        step(attention, record, t, by_query_head(row, kept_of_kv))
    return record.trace()


def decode_eviction(row: Row, *, budget: int, every: int, **snapkv) -> Trace:
    """After the prompt, and whenever budget + every tokens are there: the best stay."""
    attention, record = read_prompt(row)
    num_kv_heads = row.k.shape[0]
    kept_of_kv = [set(range(row.prompt)) for _ in range(num_kv_heads)]

    def evict():
        for kv, kept in enumerate(kept_of_kv):
            kept_of_kv[kv] = best(votes(attention, kv, kept, **snapkv), budget)

    evict()
    for t in range(row.prompt, row.num_tokens):
        for kept in kept_of_kv:
            kept.add(t)
        step(attention, record, t, by_query_head(row, kept_of_kv))
        if len(kept_of_kv[0]) == budget + every:
            evict()
    return record.trace()


def duo(row: Row, *, retrieval: set[int], budget: int, num_sinks: int) -> Trace:
    """All tokens for the retrieval heads; sinks and the newest for the others."""
    attention, record = Attention(row), Recorder(row)
    for t in range(row.num_tokens):
        near = {j for j in range(t + 1) if j < num_sinks or t - j < budget - num_sinks}
        kept_of_kv = [
            set(range(t + 1)) if kv in retrieval else near
            for kv in range(row.k.shape[0])
        ]
        step(attention, record, t, by_query_head(row, kept_of_kv))
    return record.trace()
