"""Top-k retrieval with linear-attention completion, by direct sums over what is left.

No summary and no subtraction: the surrogate weight of every unread token is added up as
it stands, which is what all the bookkeeping of the library has to come to.
"""

import math

import numpy as np

from oracles.attention import Attention, Recorder, best, heads_of, page_bound, reduce


def softmax(logits):
    terms = np.exp(logits - logits.max())
    return terms / terms.sum()


def kmeans(x, metric, num, rounds=10):
    """Lloyd's rounds from evenly spaced points, distance (x - y)' metric (x - y)."""
    centres = np.array([x[r * len(x) // num] for r in range(num)])
    for _ in range(rounds):
        away = x[:, None] - centres[None]
        nearest = np.einsum("xfd,de,xfe->xf", away, metric, away).argmin(1)
        for f in range(num):
            if (nearest == f).any():
                centres[f] = x[nearest == f].mean(0)
    return centres


def anchors(keys, centres, hard=False, beta=1.0):
    """`(ell(k), g(x))` of anchors at given centres."""
    metric = np.cov(keys.T, bias=True).reshape(2 * keys.shape[1:])
    tangents = np.array([softmax(keys @ w) @ keys for w in centres])

    def g(x):
        away = x - centres
        near = -beta * np.einsum("fd,de,fe->f", away, metric, away) / 2
        share = softmax(near)
        if hard:
            share = np.eye(len(centres))[near.argmax()]
        with np.errstate(divide="ignore"):
            return (away * tangents).sum(1) + np.log(share)

    return lambda k: centres @ k, g


def feature_map(name, keys, x, features, directions=None):
    """`(ell(k), g(x))` of a map fitted to the keys of a middle and to queries."""
    mean_key, mean_query = keys.mean(0), x.mean(0)
    if name in ("anchor", "anchor_hard"):
        metric = np.cov(keys.T, bias=True)
        centres = kmeans(x, metric, features)
        return anchors(keys, centres, hard=name == "anchor_hard")
    if name == "mean":
        return lambda k: np.zeros(1), lambda x: np.array([x @ mean_key])
    if name in ("rank1", "rank1_tilted"):
        slope = mean_key
        if name == "rank1_tilted":
            slope = softmax(keys @ mean_query) @ keys
        return (
            lambda k: np.array([mean_query @ k]),
            lambda x: np.array([(x - mean_query) @ slope]),
        )
    assert name == "favor"
    psi = (keys.var(0) / x.var(0)) ** 0.25
    half_log = math.log(len(directions)) / 2

    def ell(k):
        turned = (k - mean_key) / psi
        common = mean_query @ (k - mean_key) - turned @ turned / 2 - half_log
        return directions @ turned + common

    def g(x):
        turned = (x - mean_query) * psi
        return directions @ turned + x @ mean_key - turned @ turned / 2 - half_log

    return ell, g


def mlp(net, z):
    """The log features of one vector by one network, a dict of float64 arrays."""
    first = z @ net["w_in"] + net["b_in"]
    inner = first @ net["w_up"] + net["b_up"]
    cubic = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
    inner = 0.5 * inner * (1 + np.tanh(cubic))
    second = first + net["gate"] * (inner @ net["w_down"] + net["b_down"])
    return second @ net["w_out"] + net["b_out"]


def surrogate(maps, x, keys):
    """log sum_f exp(g_f(x) + ell_f(k)) of every key."""
    ell, g = maps
    terms = np.array([g(x) + ell(k) for k in keys]).reshape(len(keys), -1)
    top = terms.max(1)
    return top + np.log(np.exp(terms - top[:, None]).sum(1))


def completed(maps, x, keys, values):
    """`(log mass, mean value)` of the keys by their surrogate weights."""
    if len(keys) == 0:
        return -math.inf, np.zeros(values.shape[-1])
    logs = surrogate(maps, x, keys)
    terms = np.exp(logs - logs.max())
    return logs.max() + math.log(terms.sum()), terms @ values / terms.sum()


def moment(query, x, keys, values, trust=1.0):
    """The same by second-order expansion about a query."""
    if len(keys) == 0:
        return -math.inf, np.zeros(values.shape[-1])
    logs = keys @ query
    h = softmax(logs)
    log_h0 = logs.max() + math.log(np.exp(logs - logs.max()).sum())
    along = keys @ (x - query)
    mu = h @ along
    var = h @ (along - mu) ** 2
    middle = h @ values
    cov = (h * (along - mu)) @ (values - middle)
    step = min(1.0, trust / math.sqrt(var)) if var > 0 else 1.0
    return log_h0 + mu + var / 2, middle + step * cov


def topk_completion(
    row,
    *,
    retrieved,
    num_sinks,
    tail,
    name="anchor",
    features=3,
    selector="oracle",
    page_size=4,
    per="kv",
    mass_cap=True,
    gain=None,
    num_outliers=0,
    window=None,
    calibration=6,
    nets=None,
):
    """`retrieved` is K, in tokens. `nets`: networks by KV head and by query head."""
    attention, record = Attention(row), Recorder(row)
    num_q_heads, head_dim = row.q.shape[0], row.q.shape[2]
    scale = head_dim**-0.5
    gain = np.ones(num_q_heads) if gain is None else gain
    prompt = row.prompt
    end = max(prompt - tail, num_sinks)
    middle = list(range(num_sinks, min(end, prompt)))

    newest = [p for p in range(prompt - calibration, prompt) if p >= 0]
    slots = sorted(newest, key=lambda p: p % calibration)
    maps, outliers = {}, {}
    for kv in range(row.k.shape[0]):
        heads = list(heads_of(row, kv))
        x = np.array([attention.q[h, p] * scale for h in heads for p in slots])
        keys = attention.k[kv][middle]
        for h in heads:
            if nets is not None:
                maps[h] = (
                    lambda k, net=nets[0][kv]: mlp(net, k),
                    lambda x, net=nets[1][h]: mlp(net, x / scale),
                )
            elif middle and name != "moment":
                maps[h] = feature_map(name, keys, x, features)
            else:
                maps[h] = x.mean(0) if len(x) else np.zeros(head_dim)
        excess = {j: -math.inf for j in middle}
        if num_outliers and middle:
            for h in heads:
                found = np.zeros(len(middle))
                asked = newest[-16:]
                for p in asked:
                    q = attention.q[h, p] * scale
                    _, lse, _ = attention(p, h, range(p + 1))
                    shat = surrogate(maps[h], q, keys)
                    found += np.maximum(np.exp(shat - lse) - np.exp(keys @ q - lse), 0)
                for j, value in zip(middle, found / len(asked), strict=True):
                    excess[j] = max(excess[j], value)
        outliers[kv] = best(excess, num_outliers)

    for t in range(row.num_tokens):
        everything = list(range(t + 1))
        outs, lses, attended = [], [], []
        if t >= prompt and window is not None:
            end = max(end, t + 1 - tail - window)
        for kv in range(row.k.shape[0]):
            heads = list(heads_of(row, kv))
            inside = [j for j in range(num_sinks, end) if j not in outliers[kv]]
            for h in heads:
                q = attention.q[h, t]
                if t < prompt:
                    out, lse, _ = attention(t, h, everything)
                    outs.append(out), lses.append(lse), attended.append(everything)
                    continue
                voters = heads if per == "kv" else [h]
                chosen, highest = choose(
                    attention,
                    voters,
                    kv,
                    t,
                    inside,
                    retrieved,
                    selector,
                    page_size,
                    (num_sinks, end),
                )
                left = [j for j in inside if j not in chosen and j <= t]
                kept = sorted(set(everything) - set(left))
                out, lse, _ = attention(t, h, kept)
                keys, values = attention.k[kv][left], row.v[kv][left]
                values = np.asarray(values, np.float64).reshape(-1, head_dim)
                log_mass, mean = -math.inf, np.zeros(head_dim)
                if middle or nets is not None:  # fitted to nothing: estimates nothing
                    estimate = moment if name == "moment" else completed
                    log_mass, mean = estimate(maps[h], q * scale, keys, values)
                if mass_cap and left:
                    log_mass = min(log_mass, math.log(len(left)) + highest)
                mass = gain[h] * math.exp(log_mass - lse)
                outs.append((out + mass * mean) / (1 + mass))
                lses.append(lse), attended.append(kept)
        record.add(outs, lses, attended)
    return record.trace()


def choose(attention, voters, kv, t, inside, count, selector, page_size, bounds):
    """The retrieved tokens, and the score that no other token exceeds."""
    if count == 0:
        return set(), math.inf
    scale = attention.q.shape[-1] ** -0.5
    queries = [attention.q[h, t] * scale for h in voters]
    keys = attention.k[kv]
    if selector == "oracle":
        scores = {j: reduce([q @ keys[j] for q in queries], "max") for j in inside}
        chosen = best(scores, count)
        return chosen, min((scores[j] for j in chosen), default=-math.inf)
    pages = {}
    for page in range(t // page_size + 1):
        span = range(page * page_size, min((page + 1) * page_size, t + 1))
        if span[0] < bounds[1] and (page + 1) * page_size > bounds[0]:
            held = [keys[j] for j in span]
            pages[page] = reduce([page_bound(q, held) for q in queries], "max")
    taken = best(pages, count // page_size)
    chosen = {j for j in inside if j // page_size in taken}
    return chosen, min((pages[p] for p in taken), default=-math.inf)
