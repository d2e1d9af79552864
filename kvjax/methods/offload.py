"""A transform: the keys and values of a method in the host's memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from kvjax.attention import choices
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, State, Traffic
from kvjax.stores import offloaded
from kvjax.stores.offloaded import Hosted, Memory
from kvjax.stores.paged import Paged


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`offload`, the wrapped method among them."""

    method: Method
    listed: Callable[[CacheSpec], int]  # the method's
    cache: int
    memory: Memory

    def __post_init__(self) -> None:
        choices.check_choice("memory", self.memory, Memory)
        if self.cache < 0:
            raise ValueError(f"cache={self.cache} must be at least 0 tokens.")

    def slots(self, spec: CacheSpec, shape: tuple[int, ...]) -> int:
        """Returns how many of the pages of that shape the device keeps to read."""
        num_pages, page_size = shape[2:4]
        kept = self.listed(spec) + -(-self.cache // page_size)
        return min(kept, num_pages)


@typed
def offload(
    method: Method,
    *,
    cache: int = 1024,
    memory: Literal["pinned_host", "device"] = "pinned_host",
) -> Method:
    """Keeps the keys and values of `method` in the host's memory.

    Of methods that read listed pages: summaries of pages stay on the device, with the
    page of the newest tokens and a cache of pages that were read. A step moves the
    listed pages that are not there, each over the one that was listed longest ago, and
    a page goes to the host once, when it is full. What is attended to is as without it.
    What was appended is not taken back.

    A chunk of the prompt is attended to in the device's memory, a layer at a time: the
    device holds all keys and values of one layer meanwhile, and never of more.

    Args:
        method: any that reads pages by lists, and keeps every key.
        cache: tokens for each KV head of pages read before, which the device keeps
            beside those that a step reads.
        memory: where the pages are: `pinned_host`, or `device` for comparison.

    Returns:
        A :class:`kvjax.Method` whose state is that of `method`, with
        :class:`kvjax.stores.offloaded.Hosted` for its pages until the prompt ends and
        :class:`kvjax.stores.offloaded.Offloaded` afterwards, which counts the pages
        listed and moved.

    State: that of `method`, pages in the host's memory; on the device pages
        `(B, Hkv, C, P, 2*D)`, as many as a step lists and `cache` holds and one more,
        and two int32 for each. What is appended is kept.
    Reads per step and layer: as `method`; over the link the pages that are missing, at
        most all that are listed.
    Exact when: `method` is.

    Raises:
        ValueError: if `method` evicts, or reads more than listed pages; if `cache` < 0.

    Source:
        Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM
        Inference", ICML 2024, arXiv:2406.10774, Sec. 3.4 (a step reads summaries of all
        pages, and the pages that they choose).
    Deviations:
        The paper keeps every page on the device: the host's memory and the cache are
        ours. Kernels for accelerators walk through the pages of a list in the order in
        which they lie: results are then those without it but for rounding. A page is
        moved when a step lists it, not before. Run on CPUs and compiled for TPUs; for
        GPUs XLA refused to compile pages in the host's memory (jax 0.12).

    Example:
        >>> method = kvjax.offload(kvjax.quest(budget=256))
        >>> state = method.init(spec)
    """
    if method.listed is None or method.rows != 1:
        raise ValueError(
            f"offload moves the pages that a step lists, and {method} evicts, reads "
            "more (as quantize does with a residual), or has them moved already: wrap "
            "quest or entmaxkv itself, as in 'dense_layers+offload+quest'."
        )
    options = Options(method, method.listed, cache, memory)
    return method._replace(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        traffic=functools.partial(traffic, options),
        select=None,  # of all pages on the device
        rewind=None,
        importance=None,
        listed=None,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> State:
    """Makes the method's state, with its pages in the host's memory."""

    def host(store: Paged) -> Paged:
        return store._replace(pages=offloaded.place(store.pages, options.memory))

    return of_stores(host, options.method.init(spec, weights))


def prefill(
    options: Options,
    state: State,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[State, Float[Array, "B Hq T D"]]:
    """Reads a chunk as the method does, and writes its pages to the host."""

    def host(before: Paged, after: Paged) -> Paged:
        pages = offloaded.write_chunk(
            hosted(before), after.pages, before.length, k.shape[2]
        )
        return after._replace(pages=pages)

    read, out = options.method.prefill(on_device(state), q, k, v, lengths)
    return of_stores(host, state, read), out


def finish(options: Options, state: State) -> State:
    """Ends the prompt as the method does; no full page is on the device yet."""

    def host(before: Paged, after: Paged) -> Paged:
        pages, held = after.pages, hosted(before)
        if jax.tree.structure(pages) != jax.tree.structure(held.rows):
            # Ending the prompt quantised them.
            held = offloaded.place(pages, offloaded.memory_of(held))
        slots = options.slots(after.spec, pages.shape)
        kept = offloaded.offloaded(held, after.length, slots)
        return after._replace(pages=kept)

    ended = options.method.finish(on_device(state))
    return of_stores(host, state, ended)


def on_device(state: State) -> State:
    """Returns the state as the method knows it."""

    def whole(store: Paged) -> Paged:
        return store._replace(pages=offloaded.on_device(hosted(store)))

    return of_stores(whole, state)


def hosted(store: Paged) -> Hosted:
    """Returns the pages of a store while the prompt is read."""
    pages: Any = store.pages
    return pages


def of_stores(change: Callable[..., Paged], *states: State) -> State:
    """Returns the last state with its stores changed, by those of all states."""

    def one(*parts: Any) -> Any:
        return change(*parts) if isinstance(parts[0], Paged) else parts[-1]

    return jax.tree.map(one, *states, is_leaf=lambda part: isinstance(part, Paged))


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts what the method reads, pages over the link where all are missing."""
    inner = options.method.traffic(spec, length)
    return inner._replace(link=inner.kv if options.memory == "pinned_host" else 0)
