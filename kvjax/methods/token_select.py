"""TokenSelect: the heads of a layer vote on the tokens that all of them read."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import heads, selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Lists, Method, Traffic
from kvjax.stores import buffers, contiguous, hosted, offloaded, step
from kvjax.stores.hosted import Hosted
from pallas_kernels.decode_attention import (
    decode_attention,
    decode_logits,
    streamed_attention,
)
from pallas_kernels.shared.quantized import Rows, floats

PAPER = {"num_sinks": 128, "window": 512, "budget": 2688}


class TokenSelectState(NamedTuple):
    """State of :func:`token_select`, one layer."""

    spec: CacheSpec
    k: Float[Rows, "B Hkv S D"]  # not rotated: places change from step to step
    v: Float[Rows, "B Hkv S D"]  # a `Hosted` or `Offloaded` beyond the device
    query: Float[Array, "B Hq D"]  # of the last choice, not rotated; 0 before the first
    chosen: Int[Array, "B 1 K"]  # by it, ascending, -1 = none
    length: Int[Array, "B"]

    ROWS = buffers.KEYS_AND_VALUES
    KEEPS_NEWEST = True


class Parts(NamedTuple):
    """The three parts of the list of tokens that a step attends to."""

    sinks: int
    chosen: int
    newest: int


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`token_select`."""

    budget: int
    num_sinks: int
    window: int
    threshold: float | None

    def __post_init__(self) -> None:
        budget, num_sinks = self.budget, self.num_sinks
        window, threshold = self.window, self.threshold
        if num_sinks < 0 or window < 1 or num_sinks + window >= budget:
            raise ValueError(
                f"{num_sinks=} >= 0 and {window=} >= 1 must together be below "
                f"{budget=}; raise the budget."
            )
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"{threshold=} must be in (0, 1], or None.")

    def parts(self, spec: CacheSpec) -> Parts:
        """Cuts the list to what the cache can hold: a step costs no more."""
        sinks = min(self.num_sinks, spec.capacity)
        newest = min(self.window, spec.capacity - sinks)
        chosen = self.budget - self.num_sinks - self.window
        return Parts(sinks, min(chosen, spec.capacity - sinks - newest), newest)


@typed
@softmax_only
def token_select(
    *,
    budget: int = 1024,
    num_sinks: int | None = None,
    window: int | None = None,
    threshold: float | None = None,
) -> Method:
    """Keeps every token; per step reads all keys, or none, to choose the few it uses.

    A head's votes are the softmax of its query's product with each key between the
    first tokens and the newest ones, at one distance from all of them and unscaled as
    in the official code; the votes of all query heads of the layer are added up, and
    all heads attend to the same tokens. What is attended to is numbered 0, 1, 2, ... in
    order, so that decode steps stay within the model's positions however long the
    context is. A query much like that of the last choice takes the tokens chosen then
    (Selection Cache). The prompt is attended to in full, at its own positions.

    Args:
        budget: tokens attended to per step, the current one included. Paper: 2,688.
        num_sinks: first tokens that are always read; None: the paper's share of the
            budget, 128 of 2,688.
        window: newest tokens that are always read, the current one among them; None:
            the paper's share, 512 of 2,688, and at least 1.
        threshold: of the cosine, over all heads, of the query and that of the last
            choice: below it the step chooses anew. Paper: 0.9. None, as the official
            code has it: every step does.

    Returns:
        A :class:`kvjax.Method` over :class:`TokenSelectState`.

    State: k, v `(B, Hkv, S, D)` and query `(B, Hq, D)`, cache dtype; chosen
        `(B, 1, min(budget, S) - num_sinks - window)` int32. What is appended is kept. A
        chunk of the prompt rotates a copy of all keys.
    Reads per step and layer: 2*min(budget, length)*D*Hkv elements of KV, and
        length*D*Hkv elements of keys to choose, per row; under a `threshold` the keys
        only at steps that do (`Diagnostics.refreshed`), which the accounting, made of
        shapes alone, takes for all.
    Exact when: budget >= length; under `dynamic` RoPE up to the original context.

    Raises:
        ValueError: unless num_sinks >= 0, window >= 1, num_sinks + window < budget and
            threshold is None or in (0, 1].

    Source:
        Wu et al., "TokenSelect: Efficient Long-Context Inference and Length
        Extrapolation for LLMs via Dynamic Token-Level KV Cache Selection", EMNLP 2025,
        arXiv:2411.02886.
    Deviations:
        The prompt is attended to in full; the paper chooses tokens for each 512 of its
        queries by their mean, and so reads prompts longer than the model's context.

    Example:
        >>> method = kvjax.token_select(budget=256)
        >>> state = method.init(spec)
    """
    if num_sinks is None:
        num_sinks = budget * PAPER["num_sinks"] // PAPER["budget"]
    if window is None:
        window = max(1, budget * PAPER["window"] // PAPER["budget"])
    options = Options(budget, num_sinks, window, threshold)
    return Method(
        init=functools.partial(init, options),
        prefill=prefill,
        finish=step.finish_unchanged,
        append=extend,
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=True,
        listed=Lists(functools.partial(listed, options)),
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> TokenSelectState:
    """Makes an empty cache, and a list that holds nothing."""
    del weights
    shape = (spec.batch, spec.num_kv_heads, spec.capacity)
    query = (spec.batch, spec.num_q_heads, spec.head_dim)
    return TokenSelectState(
        spec,
        k=buffers.allocate_rows(spec, shape, "keys"),
        v=buffers.allocate_rows(spec, shape, "values"),
        query=buffers.allocate(query, spec.dtype, fill=0.0),
        chosen=jnp.full((spec.batch, 1, options.parts(spec).chosen), -1, jnp.int32),
        length=buffers.lengths(spec),
    )


def extend(
    state: TokenSelectState,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None = None,
) -> TokenSelectState:
    """Writes the next tokens, not rotated; `lengths=None` means all T."""
    _, valid = buffers.chunk_positions(state.length, lengths, k.shape[2])
    count = valid.sum(-1, dtype=jnp.int32)
    return state._replace(
        k=buffers.write_run(state.k, k, state.length, count),
        v=offloaded.write_run(state.v, v, state.length, count),
        length=state.length + count,
    )


def prefill(
    state: TokenSelectState,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[TokenSelectState, Float[Array, "B Hq T D"]]:
    """Attends to everything, of which it rotates a copy; block by block from a host."""
    state = extend(state, k, v, lengths)
    spec = state.spec
    rotated, positions = contiguous.rotate_queries(spec, q, state.length, lengths)
    if isinstance(state.v, Hosted):
        take = functools.partial(take_block, state)
        size = hosted.num_slots(state.v)
        out, _ = streamed_attention(
            rotated, take, size, positions, sm_scale=spec.sm_scale
        )
    else:
        out, _ = decode_attention(
            rotated,
            rotate_keys(state, state.k, 0),
            state.v,
            positions,
            sm_scale=spec.sm_scale,
        )
    return state, out.astype(q.dtype)


def rotate_keys(
    state: TokenSelectState, k: Float[Rows, "B Hkv N D"], start: int | Int[Array, ""]
) -> Float[Array, "B Hkv N D"]:
    """Rotates keys of adjacent tokens, from position `start` on."""
    places = start + jnp.arange(k.shape[2], dtype=jnp.int32)
    places = jnp.broadcast_to(places, (k.shape[0], k.shape[2]))
    return state.spec.rope(floats(k), places, state.length)


def take_block(
    state: TokenSelectState, start: int | Int[Array, ""], size: int
) -> tuple[Float[Array, "B Hkv N D"], Float[Rows, "B Hkv N D"]]:
    """Takes keys of a block, which it rotates, and values from the host's memory."""
    keys = rotate_keys(state, hosted.block(state.k, start, size), start)
    return keys, hosted.block(state.v, start, size)


def inspect_step(
    options: Options, state: TokenSelectState, q: Float[Array, "B Hq 1 D"]
) -> tuple[TokenSelectState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the chosen tokens between the first and the newest, renumbered."""
    spec, parts = state.spec, options.parts(state.spec)
    state, is_due = choose(options, state, q)
    length = state.length[:, None, None]
    first = jnp.arange(parts.sinks, dtype=jnp.int32)
    first = jnp.where(first < length, first, -1)
    newest = length - parts.newest + jnp.arange(parts.newest, dtype=jnp.int32)
    newest = jnp.where(newest >= parts.sinks, newest, -1)
    attended = jnp.concatenate([first, state.chosen, newest], axis=-1)

    is_listed = attended >= 0
    place = jnp.where(is_listed, jnp.cumsum(is_listed, -1, dtype=jnp.int32) - 1, -1)
    count = is_listed[:, 0].sum(-1, dtype=jnp.int32)
    keys = spec.rope(
        buffers.gather(state.k, attended), jnp.maximum(place[:, 0], 0), count
    )
    rotated, positions = contiguous.rotate_queries(spec, q, count)
    held, values = offloaded.gather(state.v, attended, state.length)
    state = state._replace(v=held)
    out, lse = decode_attention(
        rotated,
        keys,
        values,
        positions,
        place,
        sm_scale=spec.sm_scale,
    )
    attended = jnp.broadcast_to(attended, (*keys.shape[:2], attended.shape[-1]))
    diagnostics = step.diagnose(attended, lse, state.length, spec)
    refreshed = is_due | diagnostics.refreshed
    return state, out.astype(q.dtype), diagnostics._replace(refreshed=refreshed)


def listed(options: Options, spec: CacheSpec, length: int) -> int:
    """Counts the tokens whose values a step reads at most."""
    return min(sum(options.parts(spec)), length)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the tokens of a step, and of all keys where it chooses."""
    budget = options.budget
    keys = buffers.row_bytes(spec, length, "keys") if length > budget else 0
    return Traffic(kv=buffers.kv_bytes(spec, min(budget, length)), metadata=keys)


# --- the choice


def choose(
    options: Options, state: TokenSelectState, q: Float[Array, "B Hq 1 D"]
) -> tuple[TokenSelectState, Bool[Array, "B"]]:
    """Puts what :func:`vote` gives into the rows that need it.

    Returns:
        The state, and which rows these are.
    """
    spec, parts = state.spec, options.parts(state.spec)
    is_due = is_over = state.length > min(options.budget, spec.capacity)
    if not parts.chosen:
        return state, is_due  # sinks and window have room for the whole cache
    if options.threshold is not None:
        is_due &= cosine(spec, q[:, :, 0], state.query) < options.threshold
    by_row = is_due[:, None, None]
    # While the budget holds everything there is nothing to choose.
    place = parts.sinks + jnp.arange(parts.chosen, dtype=jnp.int32)
    is_held = place < (state.length - parts.newest)[:, None, None]
    whole = jnp.where(is_held, place, -1)
    before = jnp.where(is_over[:, None, None], state.chosen, whole)
    chosen = lax.cond(
        is_due.any(),
        lambda: jnp.where(by_row, vote(options, state, q), before),
        lambda: before,
    )
    query = jnp.where(by_row, q[:, :, 0].astype(state.query.dtype), state.query)
    return state._replace(chosen=chosen, query=query), is_due


def cosine(
    spec: CacheSpec, query: Float[Array, "B Hq D"], reference: Float[Array, "B Hq D"]
) -> Float[Array, "B"]:
    """Returns the cosine between the queries of all heads as one vector, in float32."""
    query, reference = (x.astype(jnp.float32) for x in (query, reference))
    pairs = ((query, reference), (query, query), (reference, reference))
    products = jnp.stack([(x * y).sum(-1) for x, y in pairs], axis=-1)
    product, squared, other = jnp.moveaxis(heads.total(spec, products), -1, 0)
    norms = jnp.sqrt(squared) * jnp.sqrt(other)
    return product / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def vote(
    options: Options, state: TokenSelectState, q: Float[Array, "B Hq 1 D"]
) -> Int[Array, "B 1 K"]:
    """Returns the tokens between sinks and window with most votes, ascending."""
    parts = options.parts(state.spec)
    newest = (state.length - 1)[:, None]
    near = state.spec.rope(q, jnp.full_like(newest, parts.newest), state.length)
    logits = decode_logits(near, state.k, newest, sm_scale=1.0)[:, :, 0]
    slots = jnp.arange(state.spec.capacity, dtype=jnp.int32)
    is_between = slots < (state.length - parts.newest)[:, None, None]
    is_between &= slots >= parts.sinks
    # Finite, so that a row with nothing between has votes too.
    logits = jnp.where(is_between, logits, jnp.finfo(logits.dtype).min)
    votes = heads.total(state.spec, jax.nn.softmax(logits, axis=-1))[:, None]
    best = selection.top_slots(votes, parts.chosen, is_between)
    return selection.in_order(best)
