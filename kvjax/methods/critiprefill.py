"""A transform: segments of the prompt read the blocks that are critical to them."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import accounting
from kvjax.attention import choices, criticality, selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import (
    CacheSpec,
    Diagnostics,
    Hooks,
    Method,
    PrefillFn,
    State,
    Traffic,
)
from kvjax.stores import contiguous, paged, segments
from pallas_kernels.shared.quantized import Quantized

# Capacities beyond all budgets and windows.
MANY, MORE = 1 << 24, 1 << 25


class CritiPrompt(NamedTuple):
    """State of :func:`critiprefill` while the prompt is read, one sparse layer."""

    inner: Any
    store: paged.Paged | None  # None if the method's own pages serve
    spec: CacheSpec


class CritiDecoding(NamedTuple):
    """State of :func:`critiprefill` behind the prompt, and of a dense layer."""

    inner: Any
    spec: CacheSpec


Critical = CritiPrompt | CritiDecoding


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`critiprefill`, the wrapped method among them."""

    method: Method
    budget: int
    segment: int
    block: int
    dense_tokens: int
    first: int
    fusion: float
    score: criticality.Score
    group_reduce: selection.Reduce

    def __post_init__(self) -> None:
        budget, segment, block = self.budget, self.segment, self.block
        dense_tokens, first, fusion = self.dense_tokens, self.first, self.fusion
        if block < 1:
            raise ValueError(f"{block=} must be at least 1 token.")
        if budget < 1 or budget % block:
            raise ValueError(f"{budget=} must be a positive multiple of {block=}.")
        if segment < 1 or segment % block:
            raise ValueError(f"{segment=} must be a positive multiple of {block=}.")
        if dense_tokens < 0:
            raise ValueError(f"{dense_tokens=} must be at least 0 tokens.")
        if first < 0:
            raise ValueError(f"{first=} must be at least 0 layers.")
        if not 0 <= fusion < 1:
            raise ValueError(f"{fusion=} must be in [0, 1).")
        choices.check_choice("score", self.score, criticality.Score)
        selection.check_reduce(group_reduce=self.group_reduce)


@typed
@softmax_only
def critiprefill(
    method: Method,
    *,
    budget: int = 2048,
    segment: int = 512,
    block: int = 32,
    dense_tokens: int = 4096,
    first: int = 1,
    fusion: float = 0.25,
    score: Literal["midrange", "bound"] = "midrange",
    group_reduce: selection.Reduce = "mean",
) -> Method:
    """Reads a long prompt faster: segments of it attend to critical blocks alone.

    Neighbouring queries look for the same part of the past. So a segment of queries
    chooses, by one score for each block of keys before it, what all of them read, and
    reads itself besides. The first layers and the start of the prompt are dense; so is
    what a call has of a segment that does not come whole, and the reader of prompts
    cuts the last one: what is asked at the end sees everything, but under `dynamic`
    RoPE beyond the original context, where a prompt comes at once. Nothing is
    evicted, and steps are those of `method`, over keys and values that differ from
    those of a dense prompt in the layers above the first sparse one.

    Of embedded models, whose contexts are short:
    `critiprefill:segment=64,block=16,budget=128,dense_tokens=128,first=2+full`.

    Args:
        method: for the steps; any whose prompt attention is exact.
        budget: tokens of the chosen blocks of a segment and KV head. Official: 2048.
        segment: queries that share a choice. Official: 512.
        block: keys that are chosen together; 128 suits a TPU. Official: 32.
        dense_tokens: segments that begin before it are dense. Official: 4096, and 1024
            in its demo.
        first: layers that read the prompt densely. Official: 1.
        fusion: share of the layer below's weights in the choice. Official: 0.25.
        score: of a block: `midrange`, the official one, or `bound`, which is at least
            any product of a query and a key of the pair.
        group_reduce: `mean` or `max` of the scores over a group. Official: mean.

    Returns:
        A :class:`kvjax.Method` over :class:`CritiPrompt`, and :class:`CritiDecoding`
        once the prompt has ended.

    State: that of `method`. While the prompt is read, in layers from `first` on, also
        pages `(B, Hkv, NP, block, 2*D)` and page_min, page_max `(B, Hkv, NP, D)` in the
        cache dtype, unless the pages of `method` divide a block and have extremes.
    Reads per step and layer: as `method`.
    Exact when: `method` is, and the prompt was read so: budget >= its length, or fewer
        tokens than `dense_tokens` and a segment, or first >= layers.

    Raises:
        ValueError: unless `budget` and `segment` are positive multiples of `block`,
            `dense_tokens` and `first` at least 0, and 0 <= fusion < 1; from `init`, if
            `method` reads prompts in a way of its own; from `prefill`, if no layer
            below hands anything up and fusion > 0.

    Source:
        Lv, Feng, Xie, Jia, Peng, Xie, "CritiPrefill: A Segment-wise Criticality-based
        Approach for Prefilling Acceleration in LLMs", ICASSP 2025, arXiv:2409.12490.
        Official code: 66RING/CritiPrefill@3067f1e.
    Deviations:
        Known from the official code and the paper's first page: the body could not be
        consulted. Scores are scaled as attention's logits are before their softmax, and
        weights stay float32; the official ones are unscaled and rounded to bfloat16,
        which matters to the fusion alone. The middle of the extremes takes the place of
        the mean of two products, which it equals. Segments and blocks lie at multiples
        from position 0 of the text, whatever was read before; a segment with fewer
        blocks before it than the budget reads those, where the official code lists
        blocks that are not there; rows of other lengths are masked. `bound` and `max`
        are ours.

    Example:
        >>> method = kvjax.critiprefill(kvjax.quest(budget=1024), budget=1024)
        >>> state = method.init(spec)
    """
    options = Options(
        method,
        budget,
        segment,
        block,
        dense_tokens,
        first,
        fusion,
        score,
        group_reduce,
    )
    rewinds, again = None, method.reread
    if method.rewind:
        rewinds = functools.partial(rewind, options)
    if again:
        again = again._replace(prefill=functools.partial(read_again, again.prefill))
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        rows=method.rows,
        rewind=rewinds,
        renumbers=method.renumbers,
        reread=again,
        hooks=Hooks(
            granule=segment,
            prefill_after=functools.partial(prefill_after, options),
            work=functools.partial(work, options),
        ),
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> Critical:
    """Makes the method's state, and in a sparse layer pages for the prompt.

    Raises:
        ValueError: if the method reads prompts in a way of its own.
    """
    inner = options.method.init(spec, weights)
    serves = has_pages(inner, options.block)
    check_method(options.method, spec, serves)
    if spec.layer < options.first:
        return CritiDecoding(inner, spec)
    return CritiPrompt(inner, None if serves else pages_for(options, spec), spec)


def check_method(method: Method, spec: CacheSpec, has_pages: bool) -> None:
    """Raises ValueError unless the method's prompt attention is to every token.

    Of quantised keys it is in no case exact: those in pages alone are known to be all.
    """
    sizes = [
        accounting.prompt_bytes(method, dataclasses.replace(spec, capacity=capacity))
        for capacity in (MANY, MORE)
    ]
    reads_all = method.exact_prompt or (method.lossy and has_pages)
    if sizes[0] == sizes[1] or not reads_all:
        raise ValueError(
            f"critiprefill takes the place of exact attention to the prompt, and "
            f"{method} has a prompt attention of its own: use it alone."
        )


def has_pages(inner: State, block: int) -> bool:
    """Says whether a method's state is pages that lists of blocks can be read from."""
    if not isinstance(inner, paged.Paged) or inner.page_min is None:
        return False
    is_here = isinstance(inner.pages, jax.Array | Quantized)
    return is_here and block % inner.pages.shape[3] == 0


def pages_for(options: Options, spec: CacheSpec) -> paged.Paged:
    """Makes an empty store of the prompt, a page a block."""
    return paged.paged(spec, options.block)


def prefill(
    options: Options,
    state: Critical,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Critical, Float[Array, "B Hq T D"]]:
    """Reads a chunk of the prompt in a layer that knows of no other.

    Raises:
        ValueError: if the layer below is to have a share in the choice.
    """
    if isinstance(state, CritiPrompt) and options.fusion > 0:
        raise ValueError(
            f"fusion={options.fusion} mixes in what the layer below hands up, and none "
            "is handed: use fusion=0, or a decoder that calls Method.prefill_layer."
        )
    return prefill_after(options, state, q, k, v, lengths, None)[:2]


def prefill_after(
    options: Options,
    state: Critical,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
    below: Float[Array, "B Hkv n NB"] | None,
) -> tuple[Critical, Float[Array, "B Hq T D"], Float[Array, "B Hkv n NB"] | None]:
    """Reads a chunk of the prompt, and hands up what each segment gives each block.

    The weights of a slot of a segment sum to 1, or are 0 where nothing was scored.
    """
    if options.fusion == 0:
        below = None
    elif below is None:
        below = nothing_below(options, state.spec, q.shape[2])
    inner, out = options.method.prefill(state.inner, q, k, v, lengths)
    if isinstance(state, CritiDecoding):
        return state._replace(inner=inner), out, below
    store = state.store
    if store is not None:
        store = paged.extend(store, k, v, lengths)
    read: paged.Paged = inner if store is None else store
    # The method's own attention to the prompt is not used, and XLA drops it.
    rotated, _ = contiguous.rotate_queries(state.spec, q, read.length, lengths)
    out, above = segments.attend(
        segments.blocks_of(read, options.block),
        rotated,
        lengths,
        functools.partial(choose, options, state.spec),
        None if below is None else jnp.moveaxis(below, 2, 0),
        tokens=options.segment,
        dense_tokens=options.dense_tokens,
    )
    above = None if above is None else jnp.moveaxis(above, 0, 2)
    return state._replace(inner=inner, store=store), out, above


def nothing_below(
    options: Options, spec: CacheSpec, rows: int
) -> Float[Array, "B Hkv n NB"]:
    """Makes what a layer hands up that has scored nothing."""
    number = segments.num_slots(rows, options.segment)
    blocks = -(-spec.capacity // options.block)
    shape = spec.batch, spec.num_kv_heads, number, blocks
    return jnp.zeros(shape, criticality.wide(spec.dtype))


def choose(
    options: Options,
    spec: CacheSpec,
    blocks: segments.Blocks,
    slot: segments.Slot,
    below: Float[Array, "B Hkv NB"] | None,
) -> tuple[Int[Array, "B Hkv K"], Float[Array, "B Hkv NB"] | None]:
    """Chooses blocks before a segment by its scores and the layer below's weights."""
    scores = criticality.scores(
        criticality.extremes(slot.q, slot.valid),
        blocks.low,
        blocks.high,
        score=options.score,
        group_reduce=options.group_reduce,
    )
    before = segments.is_before(blocks, slot) & slot.is_sparse[:, None]
    count = options.budget // options.block
    if below is None:
        return criticality.choose(scores, before, count), None
    weights = criticality.shares(scores, before, spec.sm_scale)
    weights = criticality.fused(weights, below, options.fusion)
    return criticality.choose(weights, before, count), weights


def read_again(
    of_method: PrefillFn,
    state: Critical,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Critical, Float[Array, "B Hq T D"]]:
    """Leaves the second reading to the method."""
    inner, out = of_method(state.inner, q, k, v, lengths)
    return state._replace(inner=inner), out


def finish(options: Options, state: Critical) -> CritiDecoding:
    """Leaves the end of the prompt to the method; the prompt's pages go."""
    return CritiDecoding(options.method.finish(state.inner), state.spec)


def append(
    options: Options,
    state: CritiDecoding,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
) -> CritiDecoding:
    """Leaves the next token to the method."""
    return state._replace(inner=options.method.append(state.inner, k, v))


def inspect_step(
    options: Options, state: CritiDecoding, q: Float[Array, "B Hq T D"]
) -> tuple[CritiDecoding, Float[Array, "B Hq T D"], Diagnostics]:
    """Attends as the method does."""
    inner, out, diagnostics = options.method.inspect_step(state.inner, q)
    return state._replace(inner=inner), out, diagnostics


def rewind(
    options: Options, state: CritiDecoding, count: Int[Array, "B"], most: int
) -> CritiDecoding:
    """Takes tokens back as the method does."""
    if options.method.rewind is None:
        raise ValueError(f"{options.method} takes no token back.")
    return state._replace(inner=options.method.rewind(state.inner, count, most))


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the method's steps."""
    return options.method.traffic(spec, length)


def work(options: Options, spec: CacheSpec, length: int) -> int:
    """Counts the query-key pairs of a prompt that the reader cuts; see `Hooks`."""
    pairs = length * (length + 1) // 2
    if spec.layer < options.first:
        return pairs
    starts = range(0, length, options.segment)[:-1]  # the last one is cut
    # What a sparse segment leaves out of all that is before it.
    left_out = [
        max(at - options.budget, 0) for at in starts if at >= options.dense_tokens
    ]
    return pairs - options.segment * sum(left_out)
