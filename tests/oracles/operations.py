"""The operations of `pallas_kernels`."""

import functools
import math

import numpy as np

from oracles.attention import (
    entmax_attention,
    softmax_attention,
)


def decode_attention(
    q, k, v, query_positions, held, sm_scale, window=None, soft_cap=None
):
    """`(out, lse, logits)`, one query row at a time over the slots that it sees."""
    batch, num_q_heads, rows, _ = q.shape
    group = num_q_heads // k.shape[1]
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)
    logits = np.full((*q.shape[:3], k.shape[2]), -np.inf)
    for b, h, t in np.ndindex(batch, num_q_heads, rows):
        head = held[b % held.shape[0], (h // group) % held.shape[1]]
        here = query_positions[b, t]
        first = 0 if window is None else here - window + 1
        kept = [s for s, p in enumerate(head) if max(first, 0) <= p <= here]
        for s in kept:
            own = sm_scale * float(q[b, h, t].astype(float) @ k[b, h // group, s])
            if soft_cap is not None:
                own = soft_cap * math.tanh(own / soft_cap)
            logits[b, h, t, s] = own
        if kept:
            weights = np.exp(logits[b, h, t, kept])
            out[b, h, t] = weights @ v[b, h // group, kept] / weights.sum()
            lse[b, h, t] = math.log(weights.sum())
    return out, lse, logits


def page_attention(
    q,
    pages,
    page_ids,
    query_positions,
    mask=None,
    sm_scale=1.0,
    alpha=1.0,
    tau=None,
    initial=None,
    first_position=0,
):
    """`(out, lse)`, one query row at a time over the tokens of its listed pages.

    With entmax and a threshold tau `(B, Hq, T)`, as it is: `(out, mass)`. What
    `initial` saw counts as one token of that logit and value.
    """
    head_dim = q.shape[3]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -math.inf)
    for b, h, t in np.ndindex(q.shape[:3]):
        tokens = page_tokens(
            q, pages, page_ids, query_positions, mask, first_position, (b, h, t)
        )
        keys = [token[:head_dim] for token in tokens]
        values = [token[head_dim:] for token in tokens]
        attend = softmax_attention
        if alpha != 1:
            attend = functools.partial(entmax_attention, alpha=alpha)
        if tau is not None:
            attend = functools.partial(above, alpha=alpha, tau=tau[b, h, t])
        out[b, h, t], lse[b, h, t], _ = attend(
            q[b, h, t], keys, values, sm_scale=sm_scale
        )
        if initial is not None:
            logs = np.array([initial[1][b, h, t], lse[b, h, t]], np.float64)
            total = lse[b, h, t] = np.logaddexp(*logs)
            if total > -math.inf:
                both = np.array([initial[0][b, h, t], out[b, h, t]])
                out[b, h, t] = np.exp(logs - total) @ both
    return out, lse


def page_tokens(q, pages, page_ids, query_positions, mask, first_position, row):
    """Fused tokens that one query row sees."""
    b, h, t = row
    page_size = pages.shape[3]
    kv = h * pages.shape[1] // q.shape[1]
    own = h * page_ids.shape[1] // q.shape[1]
    tokens = []
    for place, page in enumerate(page_ids[b, own]):
        if mask is not None and not mask[b, own, place, t]:
            continue
        for i in range(page_size if page >= 0 else 0):
            position = page * page_size + i
            if first_position <= position <= query_positions[b, t]:
                tokens.append(pages[b, kv, page, i])
    return tokens


def page_weighed(
    q, pages, page_ids, query_positions, mask, surrogate, first_position=0
):
    """Values and weights of linear attention, summed token by token."""
    directions, shift, shares = surrogate
    head_dim = q.shape[3]
    taken, mass = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, h, t in np.ndindex(q.shape[:3]):
        kv = h * pages.shape[1] // q.shape[1]
        for token in page_tokens(
            q, pages, page_ids, query_positions, mask, first_position, (b, h, t)
        ):
            features = np.exp(directions[b, kv] @ token[:head_dim] - shift[b, kv])
            weight = float(shares[b, h, t] @ features)
            mass[b, h, t] += weight
            taken[b, h, t] += weight * token[head_dim:]
    return taken, mass


def beside(problem, features=3, seed=7):
    """What `page_attention` may be given beside its pages: a start, and weights.

    Some rows start from nothing. Shares of one row are all in one feature.
    """
    rng = np.random.default_rng(seed)
    q, pages = problem[:2]
    heads, head_dim = pages.shape[:2], q.shape[3]
    out, lse = rng.standard_normal(q.shape), 2 + rng.standard_normal(q.shape[:3])
    lse[:, 1::2] = -math.inf
    directions = 0.3 * rng.standard_normal((*heads, features, head_dim))
    shift = 2 * rng.random((*heads, features))
    shares = rng.random((*q.shape[:3], features))
    shares[0, 0, 0, 1:] = 0
    both = (out, lse), (directions, shift, shares)
    return tuple(tuple(np.float32(x) for x in part) for part in both)


def above(query, keys, values, alpha, tau, sm_scale):
    out, mass = np.zeros_like(query), 0.0
    for key, value in zip(keys, values, strict=True):
        z = (alpha - 1) * sm_scale * float(np.dot(query, key))
        weight = max(z - tau, 0.0) ** (1 / (alpha - 1))
        out, mass = out + weight * value, mass + weight
    return out, mass, None


def top_k(scores, k, where=None, count=None, *, order="score"):
    """`(values, indices)` by a stable sort of integers in IEEE's total order."""
    bits = scores.astype(np.float32).view(np.int32).astype(np.int64)
    keys = np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    lowest = -(0x7F800000) - 1  # -inf; NaNs with a sign lie below
    is_open = keys > lowest
    if where is not None:
        is_open &= where
    values = np.full((*scores.shape[:-1], k), -np.inf)
    indices = np.full(values.shape, -1, np.int32)
    for row in np.ndindex(scores.shape[:-1]):
        most = k if count is None else count[row]
        ranked = np.argsort(-keys[row], kind="stable")
        chosen = [i for i in ranked if is_open[row][i]][:most]
        if order == "index":
            chosen = sorted(chosen)
        values[row][: len(chosen)] = scores[row][chosen]
        indices[row][: len(chosen)] = chosen
    return values, indices
