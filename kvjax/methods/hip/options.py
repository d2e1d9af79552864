"""The options of `hip`, and the sizes of lists that follow from them."""

import dataclasses
import itertools
from typing import Literal, NamedTuple

from kvjax.attention import choices, selection
from kvjax.attention.tree_search import Representative
from kvjax.interface import CacheSpec

PAPER = {"num_sinks": 16, "window": 256, "budget": 784}


class Parts(NamedTuple):
    """The parts of the list of pages that a step attends to."""

    newest: int
    sinks: int
    chosen: int


class Stage(NamedTuple):
    """A stage of the search in stages: it keeps chunks of what the last one kept."""

    chunk: int  # tokens, l_i
    kept: int  # chunks, k_i / l_i
    stride: int  # steps from one search to the next


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`kvjax.hip`, sizes of parts in whole pages."""

    budget: int
    page_size: int
    num_sinks: int
    window: int
    key_stride: int
    representative: Representative
    per: Literal["kv", "query"]
    group_reduce: selection.Reduce
    prefill: Literal["full", "sparse"]
    query_block: int
    search: Literal["tree", "stages"]
    chunks: str
    kept: str
    strides: str

    def __post_init__(self) -> None:
        choices.check_choices(self)
        self._check_sizes()
        for name in ("chunks", "kept", "strides"):
            numbers(self, name)
        if self.search == "stages":
            self._check_stages()

    def _check_sizes(self) -> None:
        budget, page_size = self.budget, self.page_size
        num_sinks, window = self.num_sinks, self.window
        key_stride, query_block = self.key_stride, self.query_block
        if page_size < 1:
            raise ValueError(f"{page_size=} must be at least 1 token.")
        if budget < 1 or budget % page_size:
            raise ValueError(f"{budget=} must be a positive multiple of {page_size=}.")
        if num_sinks < 0:
            raise ValueError(f"{num_sinks=} must be at least 0 tokens.")
        if window < 1 or window % page_size:
            raise ValueError(f"{window=} must be a positive multiple of {page_size=}.")
        if self.pages_to_search_for < 1:
            raise ValueError(
                f"{budget=} leaves no page to search for beside {num_sinks=} and "
                f"{window=} in pages of {page_size}; raise the budget."
            )
        if not 1 <= key_stride <= page_size:
            raise ValueError(f"{key_stride=} must be in [1, {page_size=}].")
        if query_block < 1:
            raise ValueError(f"{query_block=} must be at least 1 token.")

    def _check_stages(self) -> None:
        if self.prefill == "sparse":
            raise ValueError("prefill='sparse' needs search='tree', not 'stages'.")
        if self.num_sinks % self.page_size:
            raise ValueError(
                f"num_sinks={self.num_sinks} must be a multiple of page_size="
                f"{self.page_size}, where chunks of the stages begin."
            )
        chunks, kept = numbers(self, "chunks"), numbers(self, "kept")
        strides = numbers(self, "strides")
        if not len(chunks) == len(kept) == len(strides) - 1:
            raise ValueError(
                f"chunks={self.chunks!r} and kept={self.kept!r} must have a number for "
                f"each stage but the last, and strides={self.strides!r} for the last "
                "too."
            )
        last = self.pages_to_search_for * self.page_size
        _check_steps("chunks", [*chunks, self.page_size], "a multiple of")
        _check_steps("kept", [*kept, last], "at least")
        _check_steps("strides", strides, "a multiple of")
        for chunk, tokens in zip(chunks, kept, strict=True):
            if tokens % chunk:
                raise ValueError(f"kept={tokens} must be a multiple of chunks={chunk}.")
        if self.pages_to_search_for < self.pages_begun:
            raise ValueError(
                f"budget={self.budget} leaves {self.pages_to_search_for} pages to "
                f"search for, and strides={self.strides!r} lets {self.pages_begun} "
                "begin before the first stage runs again: raise the budget."
            )

    @property
    def sink_pages(self) -> int:
        """The first pages that are always read, Sp."""
        return -(-self.num_sinks // self.page_size)

    @property
    def window_pages(self) -> int:
        """The newest pages that are always read, Rp."""
        return self.window // self.page_size

    @property
    def pages_to_search_for(self) -> int:
        """The pages that a search keeps, K."""
        parts = self.sink_pages + self.window_pages
        return self.budget // self.page_size - parts

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the search; the chunks of the last are pages."""
        chunks = [*numbers(self, "chunks"), self.page_size]
        kept = [*numbers(self, "kept"), self.pages_to_search_for * self.page_size]
        strides = numbers(self, "strides")
        return tuple(
            Stage(chunk, tokens // chunk, stride)
            for chunk, tokens, stride in zip(chunks, kept, strides, strict=True)
        )

    @property
    def pages_begun(self) -> int:
        """The pages that begin, at most, between two searches of the first stage."""
        if self.search == "tree":
            return 0
        return -(-(self.stages[0].stride - 1) // self.page_size)

    def parts(self, spec: CacheSpec) -> Parts:
        """Cuts the list to what the cache can hold: a step costs no more."""
        num_pages = -(-spec.capacity // self.page_size)
        newest = min(self.window_pages, num_pages)
        sinks = min(self.sink_pages, num_pages)
        others = max(num_pages - self.window_pages - self.sink_pages, 1)
        return Parts(newest, sinks, min(self.pages_to_search_for, others))


def numbers(options: Options, name: str) -> list[int]:
    """Returns the numbers of an option that lists some, as `256/32`.

    Raises:
        ValueError: if it has anything else in it, or none that is positive.
    """
    text = getattr(options, name)
    parts = [part.strip() for part in text.split("/")] if text else []
    if not all(part.isdecimal() and part.isascii() and int(part) for part in parts):
        raise ValueError(f"{name}={text!r} must be positive numbers, such as '256/32'.")
    return [int(part) for part in parts]


def _check_steps(name: str, sizes: list[int], must: str) -> None:
    """Raises ValueError unless every size suits the next one."""
    for size, following in itertools.pairwise(sizes):
        suits = size >= following if must == "at least" else size % following == 0
        if not suits:
            raise ValueError(
                f"{name}: {size} must be {must} {following}, of the stage after it."
            )


def share_of_budget(name: str, budget: int, page_size: int, given: int | None) -> int:
    """Returns the tokens that are given, or the paper's share of the budget.

    A share is in whole pages: at least one for the newest tokens, and one for the first
    ones where the budget has four or more.
    """
    if given is not None:
        return given
    pages = budget * PAPER[name] // PAPER["budget"] // max(page_size, 1)
    least = 1 if name == "window" or budget >= 4 * page_size else 0
    return max(pages, least) * page_size
