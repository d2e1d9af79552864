"""What a device keeps of the host's memory, in plain Python; and where arrays lie."""

import jax


class Cache:
    """The slots of one KV head: what is listed longest ago goes first."""

    def __init__(self, slots):
        self.held, self.used = [-1] * slots, [-1] * slots
        self.asked = self.moved = 0

    def ask(self, pages, now):
        """A step at length `now` lists pages: those that are missing come, in order."""
        pages = sorted(set(pages))
        for page in pages:
            if page in self.held:
                self.used[self.held.index(page)] = now
        for page in pages:
            self.asked += 1
            if page not in self.held:
                oldest = min(range(len(self.held)), key=lambda s: (self.used[s], s))
                self.held[oldest], self.used[oldest] = page, now
                self.moved += 1


def kinds(state):
    """The bytes of all arrays of a state, by the memory they lie in."""
    found = {"pinned_host": 0, "device": 0}
    for leaf in jax.tree.leaves(state):
        found[leaf.sharding.memory_kind] += leaf.nbytes
    return found
