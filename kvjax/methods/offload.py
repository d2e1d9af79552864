"""A transform: the keys and values of a method in the host's memory."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from kvjax import accounting
from kvjax.attention import choices
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, State, Traffic
from kvjax.stores import buffers, hosted, offloaded
from kvjax.stores.hosted import Hosted, Memory
from kvjax.stores.offloaded import Offloaded, Streamed

Store = Any  # a NamedTuple of a `spec` and a `length`, whose `ROWS` say what it holds


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`offload`, the wrapped method among them."""

    method: Method
    cache: int
    memory: Memory

    def __post_init__(self) -> None:
        choices.check_choice("memory", self.memory, Memory)
        if self.cache < 0:
            raise ValueError(f"cache={self.cache} must be at least 0 tokens.")

    def slots(self, spec: CacheSpec, rows: Hosted) -> int:
        """Returns how many pages of these rows the device keeps to read."""
        lists = self.method.listed
        listed = 0 if lists is None else lists.most(spec, spec.capacity)
        kept = listed + -(-self.cache // hosted.page_size_of(rows))
        return min(kept, hosted.num_pages_of(rows))


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

    Of methods that list tokens once they have looked at every key: keys stay on the
    device, and values move, each with the neighbours that share its words of 4 bytes.
    Of clusters of tokens keys move so too, and centroids stay. Of RefreshKV the small
    cache is on the device: a full step brings all others in blocks, and then those it
    chose.

    A chunk of the prompt goes to the host as it is read, and what came before it comes
    in blocks of 512 tokens, each once a chunk. Of entmax attention, whose parts do not
    merge, the device holds a layer's keys and values meanwhile; so it does of any
    method while the prompt ends.

    Args:
        method: any that reads pages, or values, by lists, and keeps every key.
        cache: tokens for each KV head of pages read before, which the device keeps
            beside those that a step reads.
        memory: where the pages are: `pinned_host`, or `device` for comparison.

    Returns:
        A :class:`kvjax.Method` whose state is that of `method`, with
        :class:`kvjax.stores.hosted.Hosted` for its pages or values until the prompt
        ends and :class:`kvjax.stores.offloaded.Offloaded` afterwards, which counts the
        pages listed and moved.

    State: that of `method`, pages in the host's memory; on the device pages
        `(B, Hkv, C, P, 2*D)`, as many as a step lists and `cache` holds and one more,
        and two int32 for each; or values `(B, Hkv, C, D)` alike, and keys. What is
        appended is kept.
    Reads per step and layer: as `method`; over the link the pages that are missing, at
        most all that are listed.
    Exact when: `method` is.

    Raises:
        ValueError: if `method` evicts, or reads more than it lists; if `cache` < 0.

    Source:
        Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM
        Inference", ICML 2024, arXiv:2406.10774, Sec. 3.4 (a step reads summaries of all
        pages, and the pages that they choose).
    Deviations:
        The paper keeps every page on the device: the host's memory and the cache are
        ours. Kernels for accelerators walk through the pages of a list in the order in
        which they lie: results are then those without it but for rounding. A page is
        moved when a step lists it, not before: what the step before listed, all that a
        guess has to go by, the device has already. Of TokenSelect (arXiv:2411.02886)
        and top-k with completion (arXiv:2604.05438), which score all keys, only values
        are moved; RefreshKV (arXiv:2411.05787) keeps its full cache anywhere. What
        comes in blocks, a prompt that has at most 64 queries a KV head in a chunk and a
        full step, is summed in another order beyond 512 tokens, and a full step of 4
        bits at any length: to rounding. Run on CPUs, and compiled for TPUs and GPUs
        alone.

    Example:
        >>> method = kvjax.offload(kvjax.quest(budget=256))
        >>> state = method.init(spec)
    """
    if (method.listed is None and method.streamed is None) or method.rows != 1:
        raise ValueError(
            f"offload moves pages or values that a step lists, and {method} evicts, "
            "reads more (as quantize does with a residual, and hip, whose search walks "
            "over all keys), or has them moved already: wrap quest, entmaxkv, "
            "token_select, topk_completion, squeezed or refreshkv itself, as in "
            "'dense_layers+offload+quest'."
        )
    options = Options(method, cache, memory)
    hooks = method.hooks
    if hooks.seal is not None:
        hooks = hooks._replace(seal=functools.partial(seal, options, hooks.seal))
    return method._replace(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        traffic=functools.partial(traffic, options),
        select=None,  # of all pages on the device
        rewind=None,
        importance=None,
        listed=None,
        streamed=None,
        hooks=hooks,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> State:
    """Makes the method's state, with what moves in the host's memory.

    Raises:
        ValueError: if weights are given: slots are counted for those of the options.
    """
    if weights is not None:
        raise ValueError(
            "offload has slots for what the options list, and other weights may list "
            "more: write them to a file and name it in the options."
        )

    def host(store: Store) -> Store:
        kept = moving(options, store).items()
        return store._replace(**{n: hosted.place(x, options.memory) for n, x in kept})

    return of_stores(host, options.method.init(spec))


def prefill(
    options: Options,
    state: State,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[State, Float[Array, "B Hq T D"]]:
    """Reads a chunk as the method does: what came before it comes in blocks."""
    if all(store.spec.alpha == 1 for store in stores_of(state)):
        return options.method.prefill(state, q, k, v, lengths)

    def host(before: Store, after: Store) -> Store:
        start, size = before.length, k.shape[2]
        pages = hosted.write_pages(before.pages, after.pages, start, size)
        return after._replace(pages=pages)

    state_there = on_device(options, state)
    read, out = options.method.prefill(state_there, q, k, v, lengths)
    return of_stores(host, state, read), out


def finish(options: Options, state: State) -> State:
    """Ends the prompt as the method does, with all of the layer on the device.

    What moves is in the host's memory afterwards, and no page of it on the device.
    """

    def decoded(store: Store) -> Store:
        kept = moving(options, store).items()
        return store._replace(**{n: decoding(options, store, x) for n, x in kept})

    return of_stores(decoded, from_device(options, state, options.method.finish))


def from_device(
    options: Options, state: State, change: Callable[[State], State]
) -> State:
    """Changes the state as the method knows it, and has rows in their memory again.

    Rows that are the same afterwards were there all the time, and do not go back.
    """
    there = on_device(options, state)

    def host(before: Store, known: Store, after: Store) -> Store:
        held, had = moving(options, before), moving(options, known)
        kept = moving(options, after)
        for name, rows in kept.items():
            pairs = jax.tree.leaves(had[name]), jax.tree.leaves(rows)
            is_same = len(pairs[0]) == len(pairs[1]) and all(map(operator.is_, *pairs))
            memory = hosted.memory_of(held[name])
            kept[name] = held[name] if is_same else hosted.place(rows, memory)
        return after._replace(**kept)

    return of_stores(host, state, there, change(there))


def seal(options: Options, inner: Callable[[State], State], state: State) -> State:
    """Seals the prompt as the method does: more of it may come."""
    return from_device(options, state, inner)


def decoding(options: Options, store: Store, rows: Hosted) -> Offloaded | Streamed:
    """Returns rows of a host as steps will read them."""
    if options.method.streamed is not None:
        return offloaded.streamed(rows, store.length)
    slots = options.slots(store.spec, rows)
    return offloaded.offloaded(rows, store.length, slots)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts what the method reads, over the link as if nothing were on the device."""
    method = options.method
    read = method.traffic(spec, length)
    if options.memory == "device":
        return read._replace(link=0)
    kept = accounting.kept_spec(method, spec)
    if method.streamed is not None:
        return read._replace(link=method.streamed(kept, length))
    lists = method.listed
    if lists is None:
        return read
    (store,) = stores_of(jax.eval_shape(lambda: method.init(spec)))
    link = 0
    for name, rows in moving(options, store).items():
        # Of tokens in slots each may come with its neighbours.
        size = rows.shape[3] if rows.ndim == 5 else hosted.tokens_together(kept)
        pages = min(lists.most(spec, length), -(-length // size))
        link += buffers.row_bytes(kept, size * pages, store.ROWS[name])
    return read._replace(link=link)


# --- the stores of a state


def is_store(part: Any) -> bool:
    """Says whether a part of a state holds every token."""
    return isinstance(part, tuple) and hasattr(part, "ROWS")


def stores_of(state: State) -> list[Store]:
    """Returns the stores of a state, in order."""
    return list(filter(is_store, jax.tree.leaves(state, is_leaf=is_store)))


def of_stores(change: Callable[..., Store], *states: State) -> State:
    """Returns the last state with its stores changed, by those of all states."""
    found = zip(*map(stores_of, states), strict=True)
    changed = iter([change(*stores) for stores in found])
    leaves, structure = jax.tree.flatten(states[-1], is_leaf=is_store)
    leaves = [next(changed) if is_store(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def moving(options: Options, store: Store) -> dict[str, Any]:
    """Returns what lies in the host's memory by its field: a `Hosted`, or rows.

    Pages of keys and values; or values alone, where steps look at every key; or both
    where they are listed or streamed.
    """
    lists, streamed = options.method.listed, options.method.streamed
    keys_too = streamed is not None or (lists is not None and lists.keys)
    return {
        name: getattr(store, name)
        for name, holds in store.ROWS.items()
        if keys_too or holds != "keys"
    }


def on_device(options: Options, state: State) -> State:
    """Returns the state as the method knows it."""

    def whole(store: Store) -> Store:
        kept = moving(options, store).items()
        return store._replace(**{name: hosted.on_device(x) for name, x in kept})

    return of_stores(whole, state)
