"""The options of `subgen`, checked once, and what a layer's budget is split into."""

import dataclasses
import math
from typing import Literal, NamedTuple

from kvjax.attention.choices import check_choices
from kvjax.interface import CacheSpec

Mode = Literal["centres", "stream"]
SEEDS = 2**32


class Sizes(NamedTuple):
    """The split of a layer's budget, in slots of a KV head."""

    sinks: int  # A
    window: int  # W
    clusters: int  # M; 0: what leaves the window is forgotten
    per_cluster: int  # t
    samples: int  # s

    @property
    def exact(self) -> int:
        """Tokens attended to as they are."""
        return self.sinks + self.window

    @property
    def ring(self) -> int:
        """Slots of the window, and one for the token that leaves it, to be folded.

        It is read once the newest is written: in the newest's place, XLA would read
        one copy and write into another.
        """
        return self.window + (1 if self.clusters else 0)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`kvjax.subgen`."""

    budget: int
    mode: Mode
    window: int | None
    num_sinks: int
    per_cluster: int
    samples: int | None
    clusters: int | None
    delta: float | None
    lam: float
    norm_cap: bool
    seed: int

    def __post_init__(self) -> None:
        check_choices(self)
        budget, num_sinks, delta = self.budget, self.num_sinks, self.delta
        lam, seed = self.lam, self.seed
        if budget < 2:
            raise ValueError(f"{budget=} must be at least 2 tokens.")
        if not 0 <= num_sinks < budget - 1:
            raise ValueError(
                f"{num_sinks=} must be in [0, {budget - 1}), for {budget=}; raise the "
                "budget."
            )
        if not 0 <= lam <= 1:
            raise ValueError(f"{lam=} must be in [0, 1].")
        if delta is not None and not (delta > 0 and math.isfinite(delta)):
            raise ValueError(f"{delta=} must be positive and finite, or None.")
        if not 0 <= seed < SEEDS:
            raise ValueError(f"{seed=} must be in [0, {SEEDS}).")
        for name in ("per_cluster", "samples", "clusters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self._check_window()
        if self.is_stream:
            self._check_split()
        else:
            self._check_no_stream()

    @property
    def is_stream(self) -> bool:
        """Says whether later tokens are clustered and sampled too."""
        return self.mode == "stream"

    @property
    def newest(self) -> int:
        """Tokens of the window, W."""
        given = self.window
        return (self.budget - self.num_sinks) // 2 if given is None else given

    @property
    def rest(self) -> int:
        """Tokens of the budget that sinks and window leave."""
        return self.budget - self.num_sinks - self.newest

    @property
    def drawn(self) -> int:
        """Values sampled by their norm, s."""
        return self.rest // 2 if self.samples is None else self.samples

    @property
    def most(self) -> int:
        """Clusters, M: two keys are what one token is."""
        room = 2 * (self.rest - self.drawn) // self.per_cluster
        return room if self.clusters is None else self.clusters

    def split(self, spec: CacheSpec) -> Sizes:
        """Returns what there is of everything; all in the window where it fits."""
        if self.budget >= spec.capacity:
            return Sizes(0, spec.capacity, 0, 0, 0)
        if not self.is_stream or self.lam == 0:
            return Sizes(self.num_sinks, self.newest, 0, 0, 0)
        return Sizes(
            self.num_sinks, self.newest, self.most, self.per_cluster, self.drawn
        )

    def _check_window(self) -> None:
        budget, num_sinks, window = self.budget, self.num_sinks, self.newest
        least = 2 if self.is_stream else 1  # of one value and one key, or of a centre
        if not 1 <= window <= budget - num_sinks - least:
            raise ValueError(
                f"{window=} must be in [1, {budget - num_sinks - least}], what "
                f"{budget=} leaves after {num_sinks=} and {least} tokens more; raise "
                "the budget."
            )

    def _check_split(self) -> None:
        samples, clusters, per_cluster = self.drawn, self.most, self.per_cluster
        if clusters < 1 or 2 * samples + clusters * per_cluster > 2 * self.rest:
            raise ValueError(
                f"budget={self.budget} leaves {self.rest} tokens beside sinks and "
                f"window, and {samples=} and {max(clusters, 1)} clusters of "
                f"{per_cluster=} keys, two a token, need "
                f"{samples + max(clusters, 1) * per_cluster / 2:g}; raise the budget, "
                "or lower one of them."
            )

    def _check_no_stream(self) -> None:
        for name in ("samples", "clusters", "delta"):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(
                    f"{name}={value} is of mode='stream', not of mode={self.mode!r}; "
                    "leave it out."
                )
