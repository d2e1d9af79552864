"""The options of `topk_completion`, checked once, and what a layer's budget buys."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax

from kvjax.attention import selection
from kvjax.attention.choices import check_choices
from kvjax.interface import CacheSpec
from kvjax.methods.topk_completion import (
    estimators,
    feature_maps,
    linear_attention,
    map_files,
    moments,
)
from kvjax.methods.topk_completion.estimators import Estimator
from kvjax.methods.topk_completion.feature_maps import Learned
from kvjax.stores import buffers

LEARNED_OUTLIERS = 4  # of a learned map, unless given


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`kvjax.topk_completion`, and the file they name, if any."""

    budget: int
    num_sinks: int
    tail: int
    feature_map: str
    features: int
    selector: Literal["oracle", "pages"]
    page_size: int
    per: Literal["kv", "query"]
    group_reduce: selection.Reduce
    mass_cap: bool
    lam: float
    num_outliers: int | None
    charge: Literal["step", "request", "none"]
    window: int | None
    calibration: int
    # What `feature_map` names: a map that is fitted, "moment", or what its file holds.
    kind: str = dataclasses.field(init=False)
    file: map_files.MapFile | None = dataclasses.field(
        init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        check_choices(self)
        self._check_sizes()
        lam, calibration = self.lam, self.calibration
        if not 0 <= lam <= 1:
            raise ValueError(f"{lam=} must be in [0, 1].")
        if calibration < 1:
            raise ValueError(f"{calibration=} must be at least 1 query.")
        kind, file = self.feature_map, None
        if kind not in (*feature_maps.NAMES, "moment"):
            file = map_files.load(self.feature_map)
            kind = file.kind
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "file", file)
        self._check_together()

    def _check_sizes(self) -> None:
        budget, num_sinks, tail = self.budget, self.num_sinks, self.tail
        if num_sinks < 0 or tail < 0 or num_sinks + tail > budget or budget < 1:
            raise ValueError(
                f"{num_sinks=} and {tail=} must be at least 0 and together at most "
                f"{budget=} tokens, which must be positive."
            )
        for name in ("features", "page_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        window = self.window
        if window is not None and (window < 0 or window + tail < 1):
            raise ValueError(
                f"{window=} must be at least 0, and with {tail=} at least 1: the "
                "newest token is attended to exactly."
            )

    def _check_together(self) -> None:
        budget, num_sinks, tail = self.budget, self.num_sinks, self.tail
        num_outliers, mass_cap = self.most_outliers, self.mass_cap
        group_reduce = self.group_reduce
        if not 0 <= num_outliers <= budget - num_sinks - tail:
            raise ValueError(
                f"{num_outliers=} must be in [0, {budget - num_sinks - tail}], what "
                f"{budget=} leaves after {num_sinks=} and {tail=}."
            )
        if self.is_moment and (num_outliers or not mass_cap):
            raise ValueError(
                f"feature_map='moment' needs mass_cap=true and num_outliers=0, not "
                f"{mass_cap=} and {num_outliers=}: its mass can be anything, and its "
                "keys have no weight of their own."
            )
        if mass_cap and self.per == "kv" and group_reduce == "mean":
            raise ValueError(
                f"{mass_cap=} needs the largest score of a group: with {group_reduce=} "
                "give mass_cap=false, or per='query'."
            )

    @property
    def is_learned(self) -> bool:
        """Says whether the map has weights of its own."""
        return self.kind == "learned"

    @property
    def is_moment(self) -> bool:
        """Says whether the estimate is made of moments, without a map."""
        return self.kind == "moment"

    @property
    def most_outliers(self) -> int:
        """Tokens of the middle that may be kept exact, where anything is estimated."""
        if self.num_outliers is None:
            return LEARNED_OUTLIERS if self.is_learned else 0
        return self.num_outliers

    def token_bytes(self, spec: CacheSpec) -> int:
        """Counts the bytes of a token of all KV heads: of pages in one row."""
        if self.selector == "pages":
            return buffers.row_bytes(spec, 1, "both")
        return buffers.kv_bytes(spec, 1)

    def weights_of(self, layer: int) -> Learned | None:
        """Returns the weights that the file has for a layer, if the map is learned."""
        if self.file is None or not self.is_learned:
            return None
        return self.file.layer(layer)[0]

    def in_pages(self, tokens: int) -> int:
        """Rounds tokens to retrieve down to whole pages, where pages are retrieved."""
        if self.selector == "oracle":
            return tokens
        return tokens // self.page_size * self.page_size


class Allotment(NamedTuple):
    """The division of one layer's budget: static sizes, in tokens a list."""

    estimator: Estimator | None  # None: selection alone
    retrieved: int  # K
    outliers: int
    newest: int  # most tokens behind the middle
    charged: float  # what the summary and the map cost a step


def allot(
    options: Options, spec: CacheSpec, weights: Learned | None = None
) -> Allotment:
    """Divides the budget of a layer, by shapes alone.

    Args:
        weights: of a learned map, instead of those in its file.

    Raises:
        ValueError: if the budget does not hold the summary.
    """
    if weights is None:
        weights = options.weights_of(spec.layer)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    return _allot(options, spec, shapes)


@functools.lru_cache(maxsize=256)
def _allot(options: Options, spec: CacheSpec, weights: Learned | None) -> Allotment:
    budget, tail, feature_map = options.budget, options.tail, options.feature_map
    charge, num_outliers = options.charge, options.most_outliers
    generated = spec.max_new_tokens if options.window is None else options.window
    newest = max(min(tail + generated, spec.capacity), 1)
    if budget >= spec.capacity:
        # The last page too.
        whole = options.in_pages(spec.capacity + options.page_size - 1)
        return Allotment(None, whole, 0, newest, 0.0)
    room = linear_attention.num_retrieved(budget, options.num_sinks, tail, num_outliers)
    if options.lam == 0:
        room += num_outliers
        return Allotment(None, options.in_pages(room), 0, newest, 0.0)

    def price(num_features: int) -> tuple[Estimator, int]:
        estimator = _estimator(options.kind, num_features)
        return estimator, estimators.tokens(
            estimator,
            weights,
            spec,
            per=options.per,
            charge=charge,
            token=options.token_bytes(spec) / (spec.batch * spec.num_kv_heads),
        )

    most = options.features if weights is None else weights.keys.b_out.shape[-1]
    estimator, charged = price(most)
    for fewer in range(options.features - 1, 0, -1):
        if 2 * charged <= room or options.is_learned or options.is_moment:
            break
        estimator, charged = price(fewer)
    if charged > room:
        raise ValueError(
            f"{budget=} leaves {room} tokens, and the summary of "
            f"{feature_map=} equals {charged} ({charge=}): raise the budget, or "
            "take feature_map='mean' or another charge."
        )
    retrieved = options.in_pages(room - charged)
    if options.is_moment and not retrieved:
        raise ValueError(
            f"{budget=} leaves no token to retrieve beside sinks, tail and "
            f"summary, and the mass of {feature_map=} is bounded by those that "
            "are: raise the budget."
        )
    return Allotment(estimator, retrieved, num_outliers, newest, charged)


@functools.cache
def _estimator(kind: str, num_features: int) -> Estimator:
    """The same object for equal arguments: programs are compiled for each."""
    if kind == "moment":
        return moments.moment()
    if kind == "learned":
        return estimators.of_features(feature_maps.learned(num_features))
    return estimators.of_features(feature_maps.named(kind, num_features))
