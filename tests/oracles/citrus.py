"""CItruS in the order of its official code, over a small model, in float64."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Layer:
    """Weights of attention without anything around it but a sum."""

    q: np.ndarray  # (E, Hq, D)
    k: np.ndarray  # (E, Hkv, D)
    v: np.ndarray
    o: np.ndarray  # (Hq, D, E)


class Cache:
    """What a layer keeps: keys un-rotated, and where in the text each came from."""

    def __init__(self, layer):
        self.k = np.zeros((0, *layer.k.shape[1:]))
        self.v, self.positions = self.k, []

    def keep(self, chosen):
        self.k, self.v = self.k[chosen], self.v[chosen]
        self.positions = [self.positions[i] for i in chosen]

    def add(self, k, v, positions):
        self.k, self.v = np.concatenate([self.k, k]), np.concatenate([self.v, v])
        self.positions = [*self.positions, *positions]


def turned(x, first=0, theta=10_000.0):
    """Rotates token t of `(T, H, D)` at position first + t."""
    half = x.shape[-1] // 2
    turns = theta ** (-np.arange(half) / half)
    angle = (first + np.arange(len(x)))[:, None, None] * turns
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(layers, x, caches):
    """Runs tokens behind the caches, which stay as they are.

    Returns:
        Their outputs; of each layer their keys and values, and all weights
        `(T, Hq, P + T)`.
    """
    states, weights = [], []
    for layer, cache in zip(layers, caches, strict=True):
        q = np.einsum("te,ehd->thd", x, layer.q)
        k = np.einsum("te,ehd->thd", x, layer.k)
        v = np.einsum("te,ehd->thd", x, layer.v)
        held = len(cache.positions)
        keys = turned(np.concatenate([cache.k, k]))
        values = np.concatenate([cache.v, v])
        group = q.shape[1] // k.shape[1]
        keys, values = (np.repeat(y, group, axis=1) for y in (keys, values))
        logits = np.einsum("thd,shd->ths", turned(q, held), keys)
        logits /= np.sqrt(q.shape[-1])
        for t in range(len(x)):
            logits[t, :, held + t + 1 :] = -np.inf
        own = np.exp(logits - logits.max(-1, keepdims=True))
        own /= own.sum(-1, keepdims=True)
        out = np.einsum("ths,shd->thd", own, values)
        x = x + np.einsum("thd,hde->te", out, layer.o)
        states.append((k, v))
        weights.append(own)
    return x, states, weights


def best(votes, count):
    """The places of the most votes, in order."""
    order = sorted(range(len(votes)), key=lambda i: (-votes[i], i))
    return sorted(order[:count])


def looked_at(layers, x, caches):
    """The votes of tokens on all that the caches hold, layer by layer."""
    _, _, weights = forward(layers, x, caches)
    held = [len(cache.positions) for cache in caches]
    return [w[:, :, :n].mean((0, 1)) for w, n in zip(weights, held, strict=True)]


def citrus(layers, context, instruction, *, kept, stride, variant):
    """Reads a context and its instruction as the official script does.

    Returns:
        The outputs of the context and of the instruction, and the caches that answer.
    """

    def fresh():
        return [Cache(layer) for layer in layers]

    reads, answers, outputs = fresh(), fresh(), []
    starts = range(0, len(context), stride)
    chunks = [(start, context[start : start + stride]) for start in starts]

    def cut(caches, votes):
        for cache, own in zip(caches, votes, strict=True):
            cache.keep(best(own, min(kept, len(own))))

    def add(caches, states, start):
        for cache, (k, v) in zip(caches, states, strict=True):
            cache.add(k, v, range(start, start + len(k)))

    rest = chunks
    if len(chunks) == 1:  # the whole context is read, and kept
        out, states, _ = forward(layers, context, reads)
        add(reads, states, 0)
        add(answers, states, 0)
        outputs.append(out)
        rest = []
    elif chunks:  # the first two chunks in one pass
        both = context[: 2 * stride]
        out, states, weights = forward(layers, both, reads)
        outputs.append(out)
        first = [(k[:stride], v[:stride]) for k, v in states]
        second = [(k[stride:], v[stride:]) for k, v in states]
        by_chunk = [w[stride:, :, :stride].mean((0, 1)) for w in weights]
        for caches in (reads, answers):
            add(caches, first, 0)
        told = looked_at(layers, instruction, answers)
        cut(reads, told if variant == "shared" else by_chunk)
        cut(answers, told)
        add(reads, second, stride)
        add(answers, second, stride)
        rest = chunks[2:]
    for start, chunk in rest:
        out, states, weights = forward(layers, chunk, reads)
        outputs.append(out)
        held = [len(cache.positions) for cache in reads]
        pairs = zip(weights, held, strict=True)
        by_chunk = [w[:, :, :n].mean((0, 1)) for w, n in pairs]
        if variant == "individual":
            cut(answers, looked_at(layers, instruction, answers))
            add(answers, states, start)
        if variant == "shared":
            by_chunk = looked_at(layers, instruction, reads)
        cut(reads, by_chunk)
        add(reads, states, start)
    caches = answers if variant == "individual" else reads
    cut(caches, looked_at(layers, instruction, caches))
    out, states, _ = forward(layers, instruction, caches)
    add(caches, states, len(context))
    empty = np.zeros((0, instruction.shape[1]))
    return np.concatenate([empty, *outputs]), out, caches
