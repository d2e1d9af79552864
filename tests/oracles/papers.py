"""The methods of the papers that kvjax exists for."""

import math
import statistics

import numpy as np

from oracles.attention import (
    Attention,
    Recorder,
    Row,
    Trace,
    best,
    everything,
    heads_of,
    page_bound,
    reduce,
    rotate,
    softmax_attention,
    step,
)


def entmax_threshold(mean, deviation, count, alpha):
    """Expected mass 1 of mixed normal scores: moments by recursion, root by halving."""
    beta, a = round(1 / (alpha - 1)), alpha - 1

    def mass(tau):
        total = 0.0
        for mu, sigma, n in zip(mean, deviation, count, strict=True):
            y, s = a * mu - tau, a * max(sigma, 1e-6)
            below = [math.erfc(-y / s / math.sqrt(2)) / 2]
            density = math.exp(-((y / s) ** 2) / 2) / math.sqrt(2 * math.pi)
            below.append(y * below[0] + s * density)
            for k in range(2, beta + 1):
                below.append(y * below[k - 1] + (k - 1) * s * s * below[k - 2])
            total += n * below[beta]
        return total

    low = min(a * mu for mu in mean) - 1
    high = max(a * (mu + 10 * sigma) for mu, sigma in zip(mean, deviation, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) > 1 else (low, middle)
    return low


def gaussian_pages(
    query, keys, page_size, alpha, sm_scale, *, max_quantile, safety_margin_z, excess
):
    """Margins of the pages before the newest token's, from moments of their keys."""
    a, num_pages = alpha - 1, (len(keys) - 1) // page_size
    if num_pages == 0:
        return {}
    mean, deviation = [], []
    for page in range(num_pages):
        part = np.array(keys[page * page_size : (page + 1) * page_size])
        mean.append(sm_scale * float(query @ part.mean(0)))
        deviation.append(sm_scale * math.sqrt(float(query**2 @ part.var(0))))
    mean, deviation = np.array(mean), np.array(deviation)
    spread = math.sqrt((deviation**2).mean() + mean.var())
    tokens = num_pages * page_size
    tau = entmax_threshold([mean.mean()], [spread], [tokens], alpha)
    typical = (mean + 1.5 * deviation).mean()
    lowered = max(safety_margin_z * spread, excess * max(tau / a - typical, 0))
    z_page = statistics.NormalDist().inv_cdf(max_quantile ** (1 / page_size))
    margins = a * (mean + z_page * deviation) - (tau - a * lowered)
    return dict(enumerate(margins))


def entmaxkv(
    row: Row,
    *,
    alpha: float,
    budget: int | None,
    page_size: int,
    selector: str = "topk",
    per: str = "kv",
    group_reduce: str = "max",
    max_quantile: float = 0.995,
    safety_margin_z: float = 0.0,
    excess: float = 0.1,
) -> Trace:
    """The newest page, and those with the highest bounds or above the threshold."""
    attention, record = Attention(row, alpha), Recorder(row)
    sm_scale = row.q.shape[-1] ** -0.5 if row.sm_scale is None else row.sm_scale
    margin = {"max_quantile": max_quantile, "safety_margin_z": safety_margin_z}
    margin |= {"excess": excess}

    def scores_of(t, h):
        keys = attention.k[h // row.group][: t + 1]
        query = attention.q[h, t]
        if selector == "gaussian":
            return gaussian_pages(query, keys, page_size, alpha, sm_scale, **margin)
        bounds = {}
        for page in range(t // page_size):
            part = keys[page * page_size : (page + 1) * page_size]
            bounds[page] = page_bound(query, part)
        if group_reduce == "max" and per == "kv" and bounds:
            best = max(bounds.values())
            bounds = {page: bound - best for page, bound in bounds.items()}
        return bounds

    for t in range(row.num_tokens):
        if t < row.prompt:
            step(attention, record, t, everything(row, t))
            continue
        kept_of_head = []
        for h in range(row.q.shape[0]):
            heads = heads_of(row, h // row.group) if per == "kv" else [h]
            each = [scores_of(t, g) for g in heads]
            scores = {p: reduce([s[p] for s in each], group_reduce) for p in each[0]}
            if selector == "gaussian":
                scores = {p: score for p, score in scores.items() if score > 0}
            most = len(scores) if budget is None else budget // page_size - 1
            pages = best(scores, most) | {t // page_size}
            kept_of_head.append([j for j in range(t + 1) if j // page_size in pages])
        step(attention, record, t, kept_of_head)
    return record.trace()


class CascadeRings:
    """One head's cascade, token by token; entries are `[slot, token, score]`."""

    def __init__(self, num_sinks, num_rings, width, eager_fill=True, periods=None):
        self.num_sinks, self.width, self.eager_fill = num_sinks, width, eager_fill
        self.periods = periods or [2**i for i in range(num_rings)]
        self.sinks, self.rings = [], [[] for _ in range(num_rings)]  # oldest first

    def insert(self, token, score):
        if token < self.num_sinks:
            self.sinks.append(token)
            return
        t = token - self.num_sinks
        is_filling = self.eager_fill and t <= self.width * len(self.rings)
        for ring, period in zip(self.rings, self.periods, strict=True):
            if ring and not is_filling and t % period:
                newest = ring[-1]
                if score >= newest[2]:
                    newest[1:] = [token, score]
                return
            if len(ring) < self.width:
                ring.append([len(ring), token, score])
                return
            slot, *expelled = ring.pop(0)
            ring.append([slot, token, score])
            token, score = expelled

    def kept(self):
        """Tokens in the order of their positions 0, 1, 2, ... in the cache."""
        return self.sinks + [entry[1] for ring in self.rings[::-1] for entry in ring]

    def slots(self):
        """Slot of all rings one after another -> `(token, score)`."""
        return {
            i * self.width + slot: (token, score)
            for i, ring in enumerate(self.rings)
            for slot, token, score in ring
        }


def cascade(
    row: Row,
    *,
    budget: int,
    num_cascades: int,
    num_sinks: int,
    beta: float,
    stride: int,
    head_reduction: str = "max",
    homogeneous_heads: bool = False,
    eager_fill: bool = True,
) -> Trace:
    """Chunks attend to rings and to themselves, then enter the rings one by one."""
    record, num_kv_heads = Recorder(row), row.k.shape[0]
    width = (budget - num_sinks - 1) // num_cascades
    heads = [
        CascadeRings(num_sinks, num_cascades, width, eager_fill)
        for _ in range(num_kv_heads)
    ]
    starts = [*range(0, row.prompt, stride), *range(row.prompt, row.num_tokens)]
    for start, end in zip(starts, [*starts[1:], row.num_tokens], strict=True):
        before = [head.kept() for head in heads]
        given = [{} for _ in range(row.q.shape[0])]  # token -> decayed sum of weights
        for t in range(start, end):
            outs, lses, attended = [], [], []
            for h in range(row.q.shape[0]):
                kv = h // row.group
                seen = [*before[kv], *range(start, t + 1)]
                keys = [rotate(row.k[kv, j], p, row.theta) for p, j in enumerate(seen)]
                query = rotate(row.q[h, t], len(seen) - 1, row.theta)
                values = [row.v[kv, j] for j in seen]
                out, lse, weights = softmax_attention(query, keys, values, row.sm_scale)
                for j, weight in zip(seen, weights, strict=True):
                    given[h][j] = given[h].get(j, 0.0) + beta ** (end - 1 - t) * weight
                outs.append(out)
                lses.append(lse)
                attended.append(seen)
            record.add(outs, lses, attended)
        for kv, head in enumerate(heads):
            voters = range(row.q.shape[0]) if homogeneous_heads else heads_of(row, kv)

            def received(token, given=given, voters=voters):
                return reduce_any([given[h][token] for h in voters], head_reduction)

            for ring in head.rings:
                for entry in ring:
                    decayed = beta ** (end - start) * entry[2]
                    entry[2] = decayed + received(entry[1])
            for t in range(start, end):
                head.insert(t, received(t))
    return record.trace()


def reduce_any(values, how):
    if how == "median":
        return sorted(values)[(len(values) - 1) // 2]
    return reduce(values, how)


def refreshkv(
    row,
    *,
    budget,
    stride,
    schedule="fixed",
    threshold=0.85,
    kernel=7,
    group_reduce="max",
    max_gap=None,
    self_mode="paper",
    qc_rope="post",
    full_attend=True,
    refresh=True,
):
    """The paper's Algorithm 1, with lists: the trace, and which steps were full."""
    size, length = budget - 1, row.num_tokens
    heads, kv_heads = row.q.shape[0], row.k.shape[0]
    q = np.array([[rotate(x[t], t) for t in range(length)] for x in row.q])
    k = np.array([[rotate(x[t], t) for t in range(length)] for x in row.k])

    def attend(t, h, kept):
        kept = sorted(kept)
        kv = h // row.group
        return *softmax_attention(q[h, t], k[kv, kept], row.v[kv, kept])[:2], kept

    def select(t, kv):
        """Lowest first, so that the head of the list is evicted first."""
        group = range(kv * row.group, (kv + 1) * row.group)
        rows = [
            softmax_attention(q[h, t], k[kv, : t + 1], row.v[kv, : t + 1])[2]
            for h in group
        ]
        reduce = {"max": np.max, "mean": np.mean}[group_reduce]
        seen = range(t + 1) if self_mode == "paper" else range(t)
        a = {j: reduce([weights[j] for weights in rows]) for j in seen}
        near = kernel // 2
        pooled = {
            j: max(a[i] for i in range(j - near, j + near + 1) if i in a) for j in seen
        }
        count = size - (self_mode == "snapkv")
        best = sorted(pooled, key=lambda j: (-pooled[j], j))[:count]
        if self_mode == "snapkv":
            best = [t, *best]
        return best[::-1]

    def mean_query(t):
        return (q if qc_rope == "post" else row.q)[:, t].mean(0)

    def cosine(a, b):
        norm = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / norm) if norm else 0.0

    kept = [[] for _ in range(kv_heads)]
    query, since, fulls, steps = np.zeros(q.shape[2]), 0, [], []
    if row.prompt:
        kept = [select(row.prompt - 1, kv) for kv in range(kv_heads)]
        query = mean_query(row.prompt - 1)
    for t in range(length):
        if t < row.prompt:
            steps.append([attend(t, h, range(t + 1)) for h in range(heads)])
            continue
        due = (t - row.prompt + 1) % stride == 0 and schedule != "never"
        if schedule == "qc":
            turned = not cosine(mean_query(t), query) > threshold
            gap = size if max_gap is None else max_gap
            due = due and (turned or (refresh and since + stride > gap))
        full = due
        fulls.append(full)
        if full and refresh:
            kept = [select(t, kv) for kv in range(kv_heads)]
        if full:
            query = mean_query(t)
        sees = [
            range(t + 1) if full and full_attend else {*kept[h // row.group], t}
            for h in range(heads)
        ]
        steps.append([attend(t, h, sees[h]) for h in range(heads)])
        if full and refresh:
            since = 0
            continue
        since += 1
        for line in kept:
            line.append(t)
            del line[: max(len(line) - size, 0)]
    out, lse, attended = ([[x[i] for x in step] for step in steps] for i in range(3))
    return Trace(np.array(out), np.array(lse), attended), fulls
