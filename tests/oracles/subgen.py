"""SubGen token by token: greedy centres, and a stream's clusters and sampled values.

Draws are Threefry's, written out: what JAX's generator gives for a seed, a layer, a
position and a slot. A slot's token is looked for among all that were folded.
"""

import math

import numpy as np

from oracles.attention import Attention, Recorder, Row, Trace, everything, step

WORD = 2**32
TURNS = (13, 15, 26, 6), (17, 29, 16, 24)


def threefry(key: tuple[int, int], a: int, b: int) -> tuple[int, int]:
    """Two words enciphered by a key of two: Threefry-2x32, 20 rounds."""
    keys = key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA
    a, b = (a + keys[0]) % WORD, (b + keys[1]) % WORD
    for group in range(5):
        for turn in TURNS[group % 2]:
            a = (a + b) % WORD
            b = ((b << turn) | (b >> (32 - turn))) % WORD ^ a
        a = (a + keys[(group + 1) % 3]) % WORD
        b = (b + keys[(group + 2) % 3] + group + 1) % WORD
    return a, b


def fold_in(key: tuple[int, int], number: int) -> tuple[int, int]:
    return threefry(key, 0, number)


def drawn(seed: int, layer: int, position: int, race: int, index: int) -> int:
    """The 32 bits of a token, the index-th of its (Hkv, slots)."""
    key = fold_in(fold_in(fold_in((0, seed), layer), position), race)
    high, low = threefry(key, 0, index)
    return high ^ low


def distance(a, b) -> float:
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def farthest_first(keys, candidates, count: int) -> list[int]:
    """Centres, each the candidate farthest from those before; the lower of two."""
    free, centres = sorted(candidates), []
    while free and len(centres) < count:
        apart = [
            min((distance(keys[p], keys[c]) for c in centres), default=0.0)
            for p in free
        ]
        chosen = free[apart.index(max(apart))]
        centres.append(chosen)
        free.remove(chosen)
    return centres


def nearest(keys, p: int, centres: list[int]) -> int:
    """The number of the nearest centre, the first of those."""
    apart = [distance(keys[p], keys[c]) for c in centres]
    return apart.index(min(apart))


def online(keys, candidates, delta: float, most: int) -> tuple[list[int], list[int]]:
    """Centres and labels of tokens that come one by one."""
    centres, labels = [], []
    for p in candidates:
        near = nearest(keys, p, centres) if centres else -1
        is_far = not centres or distance(keys[p], keys[centres[near]]) > delta
        if is_far and len(centres) < most:
            centres.append(p)
            near = len(centres) - 1
        labels.append(near)
    return centres, labels


def read_prompt(row: Row) -> tuple[Attention, Recorder]:
    """A prompt that was attended to in full."""
    attention, record = Attention(row), Recorder(row)
    for t in range(row.prompt):
        step(attention, record, t, everything(row, t))
    return attention, record


def subgen_centres(row: Row, *, budget: int, window: int, num_sinks: int) -> Trace:
    """Sinks, window and greedy centres of a prompt; and every token after it."""
    attention, record = read_prompt(row)
    heads = range(row.k.shape[0])
    end = max(row.prompt - window, num_sinks)
    exact = {*range(min(num_sinks, row.prompt)), *range(end, row.prompt)}
    count = budget - num_sinks - window
    kept = [
        exact | set(farthest_first(attention.k[kv], range(num_sinks, end), count))
        for kv in heads
    ]
    for t in range(row.prompt, row.num_tokens):
        for own in kept:
            own.add(t)
        by_head = [kept[h // row.group] for h in range(row.q.shape[0])]
        step(attention, record, t, by_head)
    return record.trace()


class Stream:
    """The folded tokens of one KV head: all of them, with the cluster of each."""

    def __init__(self, keys, values, kv: int, num_kv_heads: int, options: dict):
        self.keys, self.values, self.options = keys, values, options
        self.kv, self.num_kv_heads = kv, num_kv_heads
        self.labels: dict[int, int] = {}
        self.centres: list[int] = []

    def fold_prompt(self, candidates) -> None:
        if self.options["delta"] is not None:
            for p in candidates:
                self.fold(p)
            return
        found = farthest_first(self.keys, candidates, self.options["clusters"])
        self.labels = {p: nearest(self.keys, p, found) for p in candidates}
        self.centres = found[: max(self.labels.values(), default=-1) + 1]

    def fold(self, p: int) -> None:
        delta, most = self.options["delta"], self.options["clusters"]
        near = nearest(self.keys, p, self.centres) if self.centres else -1
        apart = (
            distance(self.keys[p], self.keys[self.centres[near]]) if near >= 0 else 0
        )
        is_far = near < 0 or (delta is not None and apart > delta)
        if is_far and len(self.centres) < most:
            self.centres.append(p)
            near = len(self.centres) - 1
        self.labels[p] = near

    def bits(self, p: int, race: int, slot: int, slots: int) -> int:
        seed, layer = self.options["seed"], self.options["layer"]
        return drawn(seed, layer, p, race, self.kv * slots + slot)

    def samples(self, cluster: int) -> list[int]:
        """The tokens of a cluster's slots."""
        members = [p for p, label in self.labels.items() if label == cluster]
        count = self.options["per_cluster"]
        return [
            min(members, key=lambda p: self.bits(p, 0, j, count)) for j in range(count)
        ]

    def weight(self, p: int) -> float:
        return sum(float(x) ** 2 for x in self.values[p])

    def drawn_values(self) -> list[int]:
        """The tokens of the value slots."""
        count = self.options["samples"]
        heavy = [p for p in self.labels if self.weight(p) > 0]

        def time(p: int, j: int) -> float:
            uniform = (self.bits(p, 1, j, count) + 0.5) / WORD
            return -math.log1p(-uniform) / self.weight(p)

        slots = range(count) if heavy else []
        return [min(heavy, key=lambda p: time(p, j)) for j in slots]

    def estimate(self, x) -> tuple[float, np.ndarray]:
        """tau, and z / tau for a scaled query."""
        tau, z = 0.0, np.zeros(len(x))
        members = list(self.labels.values())
        per = self.options["per_cluster"]
        for cluster in range(len(self.centres)):
            share = members.count(cluster) / per
            tau += share * sum(
                math.exp(x @ self.keys[p]) for p in self.samples(cluster)
            )
        slots = self.drawn_values()
        mass = sum(self.weight(p) for p in self.labels)
        for p in slots:
            factor = mass / len(slots) / self.weight(p)
            z += factor * math.exp(x @ self.keys[p]) * self.values[p]
        if not tau:
            return 0.0, z
        y = z / tau
        longest = math.sqrt(max(map(self.weight, self.labels)))
        if self.options["norm_cap"] and np.linalg.norm(y) > longest:
            y *= longest / np.linalg.norm(y)
        return tau, y


def subgen_stream(
    row: Row, *, window: int, num_sinks: int, lam: float = 1.0, **options
) -> Trace:
    """Sinks and window exactly; behind them estimates of all that left the window."""
    attention, record = read_prompt(row)
    num_kv_heads = row.k.shape[0]
    streams = [
        Stream(attention.k[kv], row.v[kv].astype(float), kv, num_kv_heads, options)
        for kv in range(num_kv_heads)
    ]
    for stream in streams:
        stream.fold_prompt(range(num_sinks, row.prompt - window))
    for t in range(row.prompt, row.num_tokens):
        if (leaves := t - window) >= num_sinks:
            for stream in streams:
                stream.fold(leaves)
        sinks = range(min(num_sinks, t + 1))
        exact = sorted({*sinks, *range(max(t - window + 1, num_sinks), t + 1)})
        outs, lses = [], []
        for h in range(row.q.shape[0]):
            out, lse, _ = attention(t, h, exact)
            x = attention.q[h, t] * row.q.shape[-1] ** -0.5
            tau, y = streams[h // row.group].estimate(x)
            share = lam * tau / (lam * tau + math.exp(lse))
            outs.append((1 - share) * out + share * y)
            lses.append(lse)
        record.add(outs, lses, [exact] * row.q.shape[0])
    return record.trace()
