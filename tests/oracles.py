"""Every method again, in float64 NumPy, one row and one token at a time.

Written from the definitions and importing nothing of ours: a mistake has to be made
twice, in two ways, to go unnoticed. Speed does not matter here, being obvious does.
"""

import functools
import math
import statistics
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


# --- attention and positions


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


class _Attention:
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


class _Recorder:
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


def _step(attention, record, t, kept_of_head):
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


def _everything(row, t):
    return [list(range(t + 1)) for _ in range(row.q.shape[0])]


def _best(scores: dict[int, float], count: int) -> set[int]:
    """The `count` highest-scored positions; the lower position wins a tie."""
    order = sorted(scores, key=lambda position: (-scores[position], position))
    return set(order[: max(count, 0)])


def _reduce(values, how):
    return max(values) if how == "max" else sum(values) / len(values)


def _heads_of(row, kv):
    return range(kv * row.group, (kv + 1) * row.group)


def _by_query_head(row, kept_of_kv):
    return [kept_of_kv[h // row.group] for h in range(row.q.shape[0])]


# --- methods


def full(row: Row, alpha: float = 1.0) -> Trace:
    """Every token sees all tokens up to itself."""
    attention, record = _Attention(row, alpha), _Recorder(row)
    for t in range(row.num_tokens):
        _step(attention, record, t, _everything(row, t))
    return record.trace()


def streaming_llm(row: Row, *, budget: int, num_sinks: int) -> Trace:
    """Sinks and the newest tokens, numbered 0, 1, 2, ... inside the cache."""
    record = _Recorder(row)
    for t in range(row.num_tokens):
        kept = [j for j in range(t + 1) if j < num_sinks or j > t - budget + num_sinks]
        outs, lses = [], []
        for h in range(row.q.shape[0]):
            kv = h // row.group
            keys = [
                rotate(row.k[kv, j], rank, row.theta) for rank, j in enumerate(kept)
            ]
            query = rotate(row.q[h, t], len(kept) - 1, row.theta)
            values = [row.v[kv, j] for j in kept]
            out, lse, _ = softmax_attention(query, keys, values, row.sm_scale)
            outs.append(out)
            lses.append(lse)
        record.add(outs, lses, [kept] * row.q.shape[0])
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
    attention, record = _Attention(row), _Recorder(row)
    num_kv_heads, length = row.k.shape[0], row.prompt
    prompt_weights = [
        _step(attention, record, t, _everything(row, t)) for t in range(length)
    ]
    kept_of_kv = [set(range(length)) for _ in range(num_kv_heads)]
    if length > budget:
        prefix = length - window
        for kv in range(num_kv_heads):
            votes = []
            for j in range(prefix):
                per_head = [
                    sum(prompt_weights[t][h][j] for t in range(prefix, length))
                    for h in _heads_of(row, kv)
                ]
                votes.append(_reduce(per_head, group_reduce))
            pooled = dict(enumerate(snapkv_pool(votes, kernel, pooling)))
            kept_of_kv[kv] = _best(pooled, budget - window) | set(range(prefix, length))
    for t in range(length, row.num_tokens):
        for kept in kept_of_kv:
            kept.add(t)
        _step(attention, record, t, _by_query_head(row, kept_of_kv))
    return record.trace()


def h2o(row: Row, *, budget: int, recent: int, group_reduce: str) -> Trace:
    """The newest tokens, and those that were attended to most so far."""
    attention, record = _Attention(row), _Recorder(row)
    num_kv_heads, length = row.k.shape[0], row.prompt
    scores = [{} for _ in range(num_kv_heads)]

    def accumulate(weights):
        for kv in range(num_kv_heads):
            for j in weights[kv * row.group]:
                seen = [weights[h][j] for h in _heads_of(row, kv)]
                scores[kv][j] = scores[kv].get(j, 0.0) + _reduce(seen, group_reduce)

    for t in range(length):
        accumulate(_step(attention, record, t, _everything(row, t)))
    kept_of_kv = [set(range(length)) for _ in range(num_kv_heads)]
    if length > budget:
        newest = set(range(length - recent, length))
        for kv in range(num_kv_heads):
            others = {j: s for j, s in scores[kv].items() if j not in newest}
            kept_of_kv[kv] = _best(others, budget - recent) | newest
    for t in range(length, row.num_tokens):
        for kv in range(num_kv_heads):
            kept = kept_of_kv[kv]
            kept.add(t)
            if len(kept) > budget:
                newest = sorted(kept)[-recent:]
                others = [j for j in sorted(kept) if j not in newest]
                kept.remove(min(others, key=lambda j: (scores[kv][j], j)))
        accumulate(_step(attention, record, t, _by_query_head(row, kept_of_kv)))
    return record.trace()


def tova(row: Row, *, budget: int) -> Trace:
    """The token the last query looked at least leaves, in all heads of the layer."""
    attention, record = _Attention(row), _Recorder(row)
    num_q_heads, length = row.q.shape[0], row.prompt
    kept, mean = set(range(length)), {}

    def head_mean(weights, kept):
        return {j: sum(w[j] for w in weights) / num_q_heads for j in kept}

    for t in range(length):
        weights = _step(attention, record, t, _everything(row, t))
        mean = head_mean(weights, range(t + 1))
    if length > budget:
        kept = _best(mean, budget)
    for t in range(length, row.num_tokens):
        if len(kept) == budget:
            kept.remove(min(kept, key=lambda j: (mean[j], j)))
        kept.add(t)
        weights = _step(attention, record, t, [kept] * num_q_heads)
        mean = head_mean(weights, kept)
    return record.trace()


def page_bound(query, keys) -> float:
    """An upper bound of query . key over a page, from its element-wise extremes."""
    total = 0.0
    for d in range(len(query)):
        column = [key[d] for key in keys]
        total += max(query[d] * max(column), query[d] * min(column))
    return total


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
            bounds[page] = _reduce(each, group_reduce)
    return newest | _best(bounds, budget // page_size - recent)


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
    attention, record = _Attention(row), _Recorder(row)
    for t in range(row.num_tokens):
        if t < row.prompt:
            _step(attention, record, t, _everything(row, t))
            continue
        kept_of_head = []
        for h in range(row.q.shape[0]):
            kv = h // row.group
            pages = quest_pages(
                attention,
                t,
                kv,
                _heads_of(row, kv) if per == "kv" else [h],
                budget=budget,
                page_size=page_size,
                group_reduce=group_reduce,
                recent=recent,
            )
            kept_of_head.append([j for j in range(t + 1) if j // page_size in pages])
        _step(attention, record, t, kept_of_head)
    return record.trace()


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
    attention, record = _Attention(row, alpha), _Recorder(row)
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
            _step(attention, record, t, _everything(row, t))
            continue
        kept_of_head = []
        for h in range(row.q.shape[0]):
            heads = _heads_of(row, h // row.group) if per == "kv" else [h]
            each = [scores_of(t, g) for g in heads]
            scores = {p: _reduce([s[p] for s in each], group_reduce) for p in each[0]}
            if selector == "gaussian":
                scores = {p: score for p, score in scores.items() if score > 0}
            most = len(scores) if budget is None else budget // page_size - 1
            pages = _best(scores, most) | {t // page_size}
            kept_of_head.append([j for j in range(t + 1) if j // page_size in pages])
        _step(attention, record, t, kept_of_head)
    return record.trace()


def oracle_topk(row: Row, *, budget: int, per: str = "kv") -> Trace:
    """The tokens with the largest true weights, found by looking at all of them."""
    attention, record = _Attention(row), _Recorder(row)
    for t in range(row.num_tokens):
        if t < row.prompt:
            _step(attention, record, t, _everything(row, t))
            continue
        kept_of_head = []
        for h in range(row.q.shape[0]):
            heads = _heads_of(row, h // row.group) if per == "kv" else [h]
            true = [attention(t, g, range(t + 1))[2] for g in heads]
            total = {j: sum(w[j] for w in true) for j in range(t + 1)}
            kept_of_head.append(_best(total, budget))
        _step(attention, record, t, kept_of_head)
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
    record, num_kv_heads = _Recorder(row), row.k.shape[0]
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
            voters = range(row.q.shape[0]) if homogeneous_heads else _heads_of(row, kv)

            def received(token, given=given, voters=voters):
                return _reduce_any([given[h][token] for h in voters], head_reduction)

            for ring in head.rings:
                for entry in ring:
                    decayed = beta ** (end - start) * entry[2]
                    entry[2] = decayed + received(entry[1])
            for t in range(start, end):
                head.insert(t, received(t))
    return record.trace()


def _reduce_any(values, how):
    if how == "median":
        return sorted(values)[(len(values) - 1) // 2]
    return _reduce(values, how)


# --- operations of the kernels


def page_attention(
    q, pages, page_ids, query_positions, mask=None, sm_scale=1.0, alpha=1.0, tau=None
):
    """`(out, lse)`, one query row at a time over the tokens of its listed pages.

    With entmax and a threshold tau `(B, Hq, T)`, as it is: `(out, mass)`.
    """
    page_size, head_dim = pages.shape[3], q.shape[3]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -math.inf)
    for b, h, t in np.ndindex(q.shape[:3]):
        kv = h * pages.shape[1] // q.shape[1]
        own = h * page_ids.shape[1] // q.shape[1]
        tokens = []
        for place, page in enumerate(page_ids[b, own]):
            if mask is not None and not mask[b, own, place, t]:
                continue
            for i in range(page_size if page >= 0 else 0):
                if page * page_size + i <= query_positions[b, t]:
                    tokens.append(pages[b, kv, page, i])
        keys = [token[:head_dim] for token in tokens]
        values = [token[head_dim:] for token in tokens]
        attend = softmax_attention
        if alpha != 1:
            attend = functools.partial(entmax_attention, alpha=alpha)
        if tau is not None:
            attend = functools.partial(_above, alpha=alpha, tau=tau[b, h, t])
        out[b, h, t], lse[b, h, t], _ = attend(
            q[b, h, t], keys, values, sm_scale=sm_scale
        )
    return out, lse


def _above(query, keys, values, alpha, tau, sm_scale):
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
