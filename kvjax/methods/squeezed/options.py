"""The options of `squeezed`, checked once, and the static sizes of a layer."""

import dataclasses
import math
from typing import Literal, NamedTuple

from kvjax.attention import clustering, selection
from kvjax.attention.choices import check_choices
from kvjax.interface import CacheSpec


class Sizes(NamedTuple):
    """The static sizes of a layer."""

    clusters: int  # C, most clusters of a KV head
    coarse: int  # C1, most coarse ones; 0 where there are none
    scored: int  # most centroids that a list scores
    fixed: int  # M, most fixed tokens of a list
    dense: int  # A, most tokens that every list has
    lists: int  # of a KV head, R


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`kvjax.squeezed`."""

    budget: int
    sparsity: float | None
    threshold: float | None
    clusters: float
    coarse: float | None
    coarse_sparsity: float | None
    tail: int
    rounds: int
    per: Literal["kv", "query"]
    group_reduce: selection.Reduce
    scope: Literal["layer", "model"]

    def __post_init__(self) -> None:
        check_choices(self)
        for name, least in (("budget", 1), ("tail", 1), ("rounds", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        clusters, coarse = self.clusters, self.coarse
        if not 0 < clusters <= 1:
            raise ValueError(f"{clusters=} must be in (0, 1], a share of the tokens.")
        if coarse is not None and not 0 < coarse < clusters:
            raise ValueError(f"{coarse=} must be above 0 and below {clusters=}.")
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        sparsity, threshold = self.sparsity, self.threshold
        coarse, coarse_sparsity = self.coarse, self.coarse_sparsity
        for name in ("sparsity", "coarse_sparsity"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{name}={share} must be in [0, 1), or None.")
        if threshold is not None and not 0 <= threshold < math.inf:
            raise ValueError(f"{threshold=} must be at least 0 and finite, or None.")
        if threshold is not None and sparsity is not None:
            raise ValueError(
                f"{threshold=} and {sparsity=} both say how much stays unread: give "
                "one of them."
            )
        if coarse is None and coarse_sparsity is not None:
            raise ValueError(
                f"{coarse_sparsity=} is of coarse clusters, and {coarse=}: give "
                "coarse=0.01, or leave it out."
            )

    @property
    def unread(self) -> float:
        """The share of the fixed tokens that stays unread; 0 where a budget decides."""
        return self.sparsity or 0.0

    @property
    def coarse_unread(self) -> float:
        """The share of them that is below no coarse cluster that passes."""
        if self.coarse is None:
            return 0.0
        return 0.5 if self.coarse_sparsity is None else self.coarse_sparsity

    @property
    def calibrates(self) -> bool:
        """Says whether a threshold is a quantile of scores."""
        return self.unread > 0 or self.coarse_unread > 0

    def sizes(self, spec: CacheSpec) -> Sizes:
        """Returns the sizes of a layer, whose prompts leave room for what follows."""
        prompt = max(spec.capacity - spec.max_new_tokens - self.tail, 0)
        fine = max(1, clustering.share_of(prompt, self.clusters))
        coarse, scored = 0, fine
        if self.coarse is not None:
            coarse = max(1, clustering.share_of(prompt, self.coarse))
            # By keys a quantile keeps 1 - share of all, of centroids somewhat more.
            scored = fine - int(self.coarse_unread * fine / 2)
        # More of a saved prompt may have come than it had when it was made room for.
        most = max(spec.capacity - self.tail, 0)
        return Sizes(
            clusters=fine,
            coarse=coarse,
            scored=scored,
            fixed=min(self.budget, most),
            dense=min(self.tail + spec.max_new_tokens, spec.capacity),
            lists=spec.group if self.per == "query" else 1,
        )
