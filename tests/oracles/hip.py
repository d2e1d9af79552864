"""HiP attention and the search in stages of InfiniteHiP."""

from typing import NamedTuple

from oracles.attention import (
    Attention,
    Recorder,
    Row,
    Trace,
    everything,
    heads_of,
    reduce,
    step,
)


class Searched(NamedTuple):
    """The end of a search, and what it looked at."""

    found: list[int]  # best first
    rounds: int
    scored: list[int]


def tree_search(score, first, count, num, representative="centre") -> Searched:
    """Halves groups of candidates; the best `num` halves go on, until all are one."""
    groups = []
    for j in range(num):
        group = range(first + j * count // num, first + (j + 1) * count // num)
        if group:
            groups.append(group)
    rounds, scored = 0, []
    while groups and (rounds == 0 or max(map(len, groups)) > 1):
        halves = []
        for group in groups:
            middle = len(group) // 2
            halves += [half for half in (group[:middle], group[middle:]) if half]
        place = {"first": lambda n: 0, "last": lambda n: n - 1}
        where = place.get(representative, lambda n: n // 2)
        members = [half[where(len(half))] for half in halves]
        scored += members
        ranked = sorted(zip(halves, members, strict=True), key=lambda x: -score(x[1]))
        groups = [half for half, _ in ranked][:num]  # of equals the earlier goes on
        rounds += 1
    return Searched([group[0] for group in groups], rounds, scored)


class Hip:
    """One row's lists of pages, and the pages that its searches looked at."""

    def __init__(
        self,
        row: Row,
        *,
        budget,
        page_size,
        num_sinks,
        window,
        key_stride=1,
        representative="centre",
        per="kv",
        group_reduce="max",
    ):
        self.row, self.attention = row, Attention(row)
        self.page_size, self.key_stride = page_size, key_stride
        self.representative, self.per = representative, per
        self.group_reduce = group_reduce
        self.sinks, self.window = -(-num_sinks // page_size), window // page_size
        self.num = budget // page_size - self.sinks - self.window
        self.searches = []

    def page_score(self, t, h, page):
        heads = [h] if self.per == "query" else heads_of(self.row, h // self.row.group)
        keys = self.attention.k[h // self.row.group]
        start = page * self.page_size
        tokens = range(start, start + self.page_size, self.key_stride)
        each = [
            max(float(self.attention.q[g, t] @ keys[j]) for j in tokens) for g in heads
        ]
        return reduce(each, self.group_reduce)

    def pages(self, t, h) -> list[int]:
        """Newest pages, the newest first; sinks; those found, best first."""
        current = t // self.page_size
        oldest = max(current - self.window + 1, 0)
        searched = tree_search(
            lambda page: self.page_score(t, h, page),
            self.sinks,
            max(oldest - self.sinks, 0),
            self.num,
            self.representative,
        )
        self.searches.append(searched)
        newest = list(range(current, oldest - 1, -1))
        return newest + list(range(min(self.sinks, oldest))) + searched.found


def tokens_of(pages, page_size, t):
    return [j for j in range(t + 1) if j // page_size in pages]


def hip(row: Row, *, query_block=None, **options) -> Trace:
    """Every step searches; of a sparse prompt the first query of every block does."""
    found, record = Hip(row, **options), Recorder(row)
    heads, size = range(row.q.shape[0]), options["page_size"]
    lists = {}
    for t in range(row.num_tokens):
        if t < row.prompt and query_block is None:
            kept = everything(row, t)
        elif t < row.prompt:
            if t % query_block == 0:
                lists = {h: found.pages(t, h) for h in heads}
            begun = range(t // query_block * query_block // size, t // size + 1)
            kept = [tokens_of({*lists[h], *begun}, size, t) for h in heads]
        else:
            kept = [tokens_of(found.pages(t, h), size, t) for h in heads]
        step(found.attention, record, t, kept)
    return record.trace()


def walk(logit, start, size):
    """Alg. 3: on to the half whose first token's logit is higher; the token's."""
    token = start
    while size > 1:
        left = size // 2
        if logit(token + left) > logit(token):
            token, size = token + left, size - left
        else:
            size = left
    return logit(token)


def in_stages(row: Row, *, budget, page_size, num_sinks, window, stages) -> Trace:
    """Stages `(chunk, kept, stride)`; the last keeps pages, all that is left over."""
    attention, record = Attention(row), Recorder(row)
    heads, group = range(row.q.shape[0]), row.group
    sinks, newest = num_sinks // page_size, window // page_size
    held = [[] for _ in stages]
    oldest = 0
    for t in range(row.num_tokens):
        if t < row.prompt:
            step(attention, record, t, everything(row, t))
            continue

        def score(start, size, t=t):
            def logits(h):
                keys = attention.k[h // group]
                return lambda j: float(attention.q[h, t] @ keys[j])

            return max(walk(logits(h), start, size) for h in heads)

        number, current = t - row.prompt, t // page_size
        if number % stages[0][2] == 0:
            oldest = max(current - newest + 1, 0)
        end = oldest * page_size
        runs = [(num_sinks, end)] if end > num_sinks else []
        for i, (chunk, kept, stride) in enumerate(stages):
            if number % stride == 0:
                chunks = []
                for start, stop in runs:
                    chunks += [
                        (score(c, min(chunk, stop - c)), c)
                        for c in range(start, stop, chunk)
                    ]
                best = sorted(chunks, key=lambda x: (-x[0], x[1]))[: kept // chunk]
                held[i] = [c for _, c in best]
            runs = [(c, min(c + chunk, end)) for c in sorted(held[i])]
        window_pages = range(oldest, current + 1)
        room = budget // page_size - sinks - max(len(window_pages), newest)
        found = [c // page_size for c in held[-1]][:room]
        pages = {*window_pages, *range(min(sinks, oldest)), *found}
        step(attention, record, t, [tokens_of(pages, page_size, t) for _ in heads])
    return record.trace()
