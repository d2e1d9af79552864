"""Methods that choose among the prompt's tokens once, each by a score of its own."""

import math
from collections.abc import Callable

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
    rotate,
    step,
)

# KV head, position -> how important the token is.
Score = Callable[[int, int], float]


def chosen_once(row: Row, budget: int, score: Score) -> Trace:
    """The prompt's `budget` best tokens of each KV head, and every token after it."""
    attention, record = Attention(row), Recorder(row)
    for t in range(row.prompt):
        step(attention, record, t, everything(row, t))
    kept_of_kv = [
        best({j: score(kv, j) for j in range(row.prompt)}, budget)
        for kv in range(row.k.shape[0])
    ]
    for t in range(row.prompt, row.num_tokens):
        for kept in kept_of_kv:
            kept.add(t)
        step(attention, record, t, by_query_head(row, kept_of_kv))
    return record.trace()


def length_of(vector) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def knorm(row: Row, *, budget: int) -> Trace:
    """The shortest keys stay."""
    return chosen_once(row, budget, lambda kv, j: -length_of(row.k[kv, j]))


def keydiff(row: Row, *, budget: int) -> Trace:
    """The keys with the least cosine to the mean of all directions stay."""
    keys = Attention(row).k

    def score(kv: int, j: int) -> float:
        anchor = np.zeros(keys.shape[-1])
        for i in range(row.prompt):
            anchor += keys[kv, i] / length_of(keys[kv, i]) / row.prompt
        lengths = length_of(keys[kv, j]) * length_of(anchor)
        return -float(keys[kv, j] @ anchor) / lengths

    return chosen_once(row, budget, score)


def murmur(words: list[int], state: int) -> int:
    """Words mixed into 32 bits, one after the other, by MurmurHash3's finaliser."""
    for word in words:
        state = (state ^ word) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            state = (state ^ (state >> shift)) * factor % 2**32
        state = (state + 0x9E3779B9) % 2**32
    return state


def random(
    row: Row, *, budget: int, num_sinks: int, window: int, seed: int, layer: int
) -> Trace:
    """Sinks, the newest, and tokens by a draw that layer, head and length decide."""

    def score(kv: int, j: int) -> float:
        if j < num_sinks or j >= row.prompt - window:
            return math.inf
        return murmur([layer, kv, row.prompt, j], seed) // 2**8

    return chosen_once(row, budget, score)


def expected_attention(
    row: Row, *, budget: int, num_sinks: int, future: int, epsilon: float
) -> Trace:
    """Weights that Gaussian queries would give, times the length of the value."""
    keys, size = Attention(row).k, row.q.shape[-1]
    ahead = range(row.prompt, row.prompt + future)
    axes = [sum(rotate(axis, p) for p in ahead) / future for axis in np.eye(size)]
    turn = np.array(axes).T
    ranked = range(num_sinks, row.prompt)

    def weights_of(h: int) -> dict[int, float]:
        queries = [row.q[h, t].astype(np.float64) for t in ranked]
        mean = sum(queries) / len(queries)
        apart = [query - mean for query in queries]
        covariance = sum(np.outer(x, x) for x in apart) / len(queries)
        mean, covariance = turn @ mean, turn @ covariance @ turn.T
        scale = size**-0.5
        logits = {}
        for j in ranked:
            key = keys[h // row.group, j]
            logits[j] = scale * (mean @ key) + scale**2 * (key @ covariance @ key) / 2
        top = max(logits.values())
        total = sum(math.exp(x - top) for x in logits.values())
        return {j: math.exp(x - top) / total for j, x in logits.items()}

    weights = [weights_of(h) for h in range(row.q.shape[0])] if ranked else []

    def score(kv: int, j: int) -> float:
        if j < num_sinks:
            return math.inf
        mine = [weights[h][j] for h in heads_of(row, kv)]
        return (sum(mine) / len(mine) + epsilon) * length_of(row.v[kv, j])

    return chosen_once(row, budget, score)


def repeated_weights(row: Row, chunk, attention: Attention) -> np.ndarray:
    """`(Hq, T, prompt)`: the weights on the prompt of a chunk that follows it.

    Of a softmax over all of the prompt and the chunk up to the token itself.
    """
    q, k = chunk
    num_q_heads, size, head_dim = q.shape
    weights = np.zeros((num_q_heads, size, row.prompt))
    for h in range(num_q_heads):
        kv = h // row.group
        own = [rotate(k[kv, i], row.prompt + i) for i in range(size)]
        prompt = [attention.k[kv, j] for j in range(row.prompt)]
        for i in range(size):
            query = rotate(q[h, i], row.prompt + i)
            keys = [*prompt, *own[: i + 1]]
            logits = [query @ key * head_dim**-0.5 for key in keys]
            terms = [math.exp(x - max(logits)) for x in logits]
            weights[h, i] = np.array(terms[: row.prompt]) / sum(terms)
    return weights


def kvzip_scores(row: Row, chunks) -> np.ndarray:
    """`(Hkv, prompt)`: the largest weight in any chunk, from any token, in any head."""
    attention, scores = Attention(row), np.zeros((row.k.shape[0], row.prompt))
    for chunk in chunks:
        weights = repeated_weights(row, chunk, attention)
        for h, i in np.ndindex(weights.shape[:2]):
            kv = h // row.group
            scores[kv] = np.maximum(scores[kv], weights[h, i])
    return scores


def kvzip(row: Row, *, budget: int, chunks) -> Trace:
    """The tokens stay that some token of the second reading looked at most.

    `chunks` are un-rotated queries and keys of it, each of tokens behind the prompt.
    """
    scores = kvzip_scores(row, chunks)
    return chosen_once(row, budget, lambda kv, j: float(scores[kv, j]))
