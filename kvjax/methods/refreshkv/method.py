"""RefreshKV: small-cache steps, and now and then a full one that refills the cache."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import heads, selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.methods.refreshkv import policy, streamed
from kvjax.stores import buffers, contiguous, hosted, kept_slots, step
from kvjax.stores.offloaded import Streamed
from pallas_kernels.decode_attention import decode_attention, decode_logits
from pallas_kernels.shared.quantized import Rows


class RefreshKVPrompt(NamedTuple):
    """State of :func:`refreshkv` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    query: Float[Array, "B Hq 1 D"]  # of the newest token, un-rotated


class RefreshKVState(NamedTuple):
    """State of :func:`refreshkv`, one layer."""

    store: contiguous.Contiguous  # every token
    # The small cache, a ring in the order of eviction: a selection of budget - 1
    # tokens behind a slot for the next one, the lowest score first.
    k: Float[Rows, "B Hkv N D"]
    v: Float[Rows, "B Hkv N D"]
    positions: Int[Array, "B Hkv N"]  # -1 = empty
    since: Int[Array, "B"]  # tokens put in since the last selection
    reference: Float[Array, "B D"]  # mean query of the last full step, float32
    steps: Int[Array, "B"]
    refreshes: Int[Array, "B"]  # full steps among them: steps / refreshes is the stride


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`refreshkv`."""

    budget: int
    stride: int
    schedule: policy.Schedule
    threshold: float
    kernel: int
    group_reduce: selection.Reduce
    max_gap: int | None
    self_mode: policy.SelfMode
    qc_rope: policy.QcRope
    qc_batch: policy.QcBatch
    full_attend: bool
    refresh: bool

    def __post_init__(self) -> None:
        policy.check(
            self.budget,
            self.stride,
            self.kernel,
            self.max_gap,
            schedule=self.schedule,
            self_mode=self.self_mode,
            qc_rope=self.qc_rope,
            qc_batch=self.qc_batch,
        )
        selection.check_reduce(group_reduce=self.group_reduce)
        threshold = self.threshold
        if math.isnan(threshold):
            raise ValueError(f"{threshold=} must be a number: no cosine is below it.")

    @property
    def longest_gap(self) -> int:
        """The most small steps between two full ones, of `qc`."""
        if not self.refresh:
            return jnp.iinfo(jnp.int32).max
        return self.budget - 1 if self.max_gap is None else self.max_gap


@typed
@softmax_only
def refreshkv(
    *,
    budget: int = 1024,
    stride: int = 5,
    schedule: policy.Schedule = "qc",
    threshold: float = 0.85,
    kernel: int = 7,
    group_reduce: selection.Reduce = "max",
    max_gap: int | None = None,
    self_mode: policy.SelfMode = "paper",
    qc_rope: policy.QcRope = "post",
    qc_batch: policy.QcBatch = "per_row",
    full_attend: bool = True,
    refresh: bool = True,
) -> Method:
    """Keeps every key; most steps read a small cache that full steps refill.

    A full step attends to everything, and its own attention says which tokens the next
    steps need. A small step attends to those and the newest token, which then takes the
    place of the token that scored lowest. The prompt is attended to in full, and its
    last token makes the first selection.

    Args:
        budget: tokens attended to in a small step, the current one included.
        stride: a full step is due every so many steps. Paper: 5 and 10.
        schedule: whether a due step is full: `fixed` always, `qc` (query comparison)
            if the query has turned away from that of the layer's last full step,
            `never` for no refresh at all.
        threshold: of `qc`: full unless the cosine of the two queries, each the mean
            over heads, exceeds it. Paper: 0.85 (Llama 3.1), 0.95 (Qwen2); tune it.
        kernel: width of the max pooling of scores, odd. Paper: 7.
        group_reduce: `max` or `mean` over the query heads that share a KV head.
        max_gap: of `qc`: a due step is full at any rate if the next one would come
            after more small steps than that. None means budget - 1, after which the
            small cache would forget what was generated.
        self_mode: in a selection, the token of the full step itself competes as any
            other (`paper`), is always kept (`snapkv`), or never is (`drop`).
        qc_rope: compares queries after (`post`) or before (`pre`) rotation.
        qc_batch: a row that needs a full step takes it alone (`per_row`; the step then
            takes the time of both kinds), or every row with it (`any`, which makes a
            row's result depend on its neighbours).
        full_attend: False attends to the refilled small cache in full steps too: their
            values are not read, half the bytes.
        refresh: False leaves the selection as the prompt made it (an ablation).

    Returns:
        A :class:`kvjax.Method`; its state is :class:`RefreshKVState` after `finish`.

    State: k, v `(B, Hkv, S, D)` and the small `(B, Hkv, budget, D)`, cache dtype.
        What is appended is kept; it evicts from the small cache alone.
    Reads per step and layer: 2*budget*D*Hkv elements of KV in small steps, 2*length*D*
        Hkv in full ones, per row.
    Exact when: budget >= length, or the step is full.

    Raises:
        ValueError: for options out of range.

    Source:
        Xu, Goyal, Choi, "RefreshKV: Updating Small KV Cache During Long-form
        Generation", ACL 2025, arXiv:2411.05787.
    Deviations:
        The paper's K excludes the current token, so its K is budget - 1. Tokens enter
        the full cache at once, not at the next full step. max_gap.

    Example:
        >>> method = kvjax.refreshkv(budget=256, stride=10)
        >>> state = method.init(spec)
    """
    options = Options(
        budget,
        stride,
        schedule,
        threshold,
        kernel,
        group_reduce,
        max_gap,
        self_mode,
        qc_rope,
        qc_batch,
        full_attend,
        refresh,
    )
    return Method(
        init=init,
        prefill=prefill,
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=True,
        streamed=functools.partial(streamed_bytes, options),
    )


def init(spec: CacheSpec, weights: Any = None) -> RefreshKVPrompt:
    """Makes an empty store of every token, and room for a query."""
    del weights
    shape = (spec.batch, spec.num_q_heads, 1, spec.head_dim)
    query = buffers.allocate(shape, spec.dtype)
    return RefreshKVPrompt(contiguous.contiguous(spec), query)


def prefill(
    state: RefreshKVPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[RefreshKVPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything, and keeps the newest query."""
    store, chunk = step.read_chunk(state.store, q, k, v, lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None, None]
    newest = jnp.take_along_axis(q, last, axis=2).astype(state.query.dtype)
    is_new = lengths[:, None, None, None] > 0
    query = jnp.where(is_new, newest, state.query)
    return RefreshKVPrompt(store, query), chunk.out


def finish(options: Options, state: RefreshKVPrompt) -> RefreshKVState:
    """Makes the first selection, by the prompt's last token."""
    store, spec = state.store, state.store.spec
    rotated, positions = contiguous.rotate_queries(spec, state.query, store.length)
    logits = decode_logits(rotated, store.k, positions, sm_scale=spec.sm_scale)
    chosen = select(options, store, logits)
    kept = kept_slots.take(store, chosen)
    reference = mean_query(options, store.spec, state.query, rotated)
    reference = jnp.where(store.length[:, None] > 0, reference, 0.0)
    return RefreshKVState(
        store,
        kept.k,
        kept.v,
        chosen,
        since=buffers.lengths(spec),
        reference=reference,
        steps=buffers.lengths(spec),
        refreshes=buffers.lengths(spec),
    )


def append(
    options: Options,
    state: RefreshKVState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> RefreshKVState:
    """Writes the next token into the store, and over the lowest score of the ring."""
    store = contiguous.extend(state.store, k, v)
    # The rows that the step will see in the small cache, as the full one has them.
    itself = (store.length - 1)[:, None, None]
    count = jnp.ones_like(state.since)
    if isinstance(store.k, Streamed):
        rows = store.spec.rope(k, itself[:, 0], store.length), v
    else:
        rows = buffers.take(store.k, itself), buffers.take(store.v, itself)
    fresh = (
        *rows,
        jnp.broadcast_to(itself, (*k.shape[:2], 1)),
    )
    ring = (state.k, state.v, state.positions)
    k, v, positions = (
        buffers.write_run(buffer, row, state.since % options.budget, count)
        for buffer, row in zip(ring, fresh, strict=True)
    )
    return state._replace(
        store=store, k=k, v=v, positions=positions, since=state.since + 1
    )


def inspect_step(
    options: Options, state: RefreshKVState, q: Float[Array, "B Hq 1 D"]
) -> tuple[RefreshKVState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the small cache, or to everything in rows that need a full step."""
    store, spec = state.store, state.store.spec
    rotated, positions = contiguous.rotate_queries(spec, q, store.length)
    query = mean_query(options, store.spec, q, rotated)
    full = is_full(options, state, query)
    # Caches go into the branches and only small arrays come out: a cache that came
    # out of one would be copied.
    is_streamed = isinstance(store.k, Streamed)
    if is_streamed:
        state, (out, lse, chosen) = streamed.step(
            state,
            rotated,
            positions,
            full,
            ranking=ranking(options),
            small_step=small_step,
            full_attend=options.full_attend,
        )
    else:
        out, lse, chosen = lax.cond(
            full.any(),
            lambda: full_step(options, state, rotated, positions, full),
            lambda: small_step(state, rotated, positions),
        )
    place = jnp.arange(max(spec.capacity, options.budget), dtype=jnp.int32)
    whole = jnp.where(place < store.length[:, None, None], place, -1)
    padding = ((0, 0), (0, 0), (0, len(place) - options.budget))
    listed = jnp.pad(chosen, padding, constant_values=-1)
    is_whole = (full & options.full_attend)[:, None, None]
    attended = jnp.where(is_whole, whole, listed)
    diagnostics = step.diagnose(attended, lse, store.length)._replace(refreshed=full)
    if options.refresh and not is_streamed:
        state = refill(state, full, chosen)
    state = state._replace(
        reference=jnp.where(full[:, None], query, state.reference),
        steps=state.steps + 1,
        refreshes=state.refreshes + full.astype(jnp.int32),
    )
    return state, out.astype(q.dtype), diagnostics


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of a step, full ones at their share; under `qc` the most."""
    held = min(options.budget, length)
    small = buffers.kv_bytes(spec, held)
    metadata = spec.batch * spec.num_kv_heads * held * jnp.dtype(jnp.int32).itemsize
    if options.schedule == "never" or length <= 1:
        return Traffic(small, metadata)
    whole, stride = buffers.kv_bytes(spec, length), options.stride
    if options.full_attend:
        return Traffic((whole + (stride - 1) * small) // stride, metadata)
    keys = buffers.row_bytes(spec, length, "keys")
    return Traffic(small, metadata + keys // stride)


def streamed_bytes(options: Options, spec: CacheSpec, length: int) -> int:
    """Counts the bytes that a step reads of the full cache: full ones' share."""
    if options.schedule == "never" or length <= 1:
        return 0
    read = buffers.row_bytes(spec, length, "keys")
    if options.full_attend:
        read += buffers.row_bytes(spec, length, "values")
    if options.refresh and options.group_reduce == "mean":
        read += buffers.row_bytes(spec, length, "keys")  # once more
    if options.refresh:
        read += buffers.kv_bytes(spec, options.budget * hosted.tokens_together(spec))
    return read // options.stride


def ranking(options: Options) -> streamed.Ranking | None:
    """Returns what a full step over a host's rows selects by; None if it does not."""
    if not options.refresh:
        return None
    return streamed.Ranking(
        options.budget, options.kernel, options.group_reduce, options.self_mode
    )


# --- both kinds of step

# Output and log-sum-exp, and the positions in the small cache after the step.
Attended = tuple[
    Float[Array, "B Hq 1 D"], Float[Array, "B Hq 1"], Int[Array, "B Hkv N"]
]


def small_step(
    state: RefreshKVState,
    rotated: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
) -> Attended:
    """Attends to the small cache."""
    out, lse = decode_attention(
        rotated,
        state.k,
        state.v,
        positions,
        state.positions,
        sm_scale=state.store.spec.sm_scale,
    )
    return out, lse, state.positions


def full_step(
    options: Options,
    state: RefreshKVState,
    rotated: Float[Array, "B Hq 1 D"],
    positions: Int[Array, "B 1"],
    full: Bool[Array, "B"],
) -> Attended:
    """Reads every key, and selects by them; the rows that are not `full` stay small."""
    store, chosen = state.store, state.positions
    sm_scale = store.spec.sm_scale
    out = lse = None
    if options.full_attend:
        out, lse, logits = decode_attention(
            rotated, store.k, store.v, positions, sm_scale=sm_scale, with_logits=True
        )
    else:
        logits = decode_logits(rotated, store.k, positions, sm_scale=sm_scale)
    if options.refresh:
        chosen = select(options, store, logits)
    if out is None or lse is None:
        kept = kept_slots.take(store, chosen)
        out, lse = decode_attention(
            rotated, kept.k, kept.v, positions, chosen, sm_scale=sm_scale
        )
    if options.qc_batch == "per_row" and store.spec.batch > 1:
        others = small_step(state, rotated, positions)
        by_row = full[:, None, None]
        out = jnp.where(by_row[..., None], out, others[0])
        lse = jnp.where(by_row, lse, others[1])
        chosen = jnp.where(by_row, chosen, others[2])
    return out, lse, chosen


def is_full(
    options: Options, state: RefreshKVState, query: Float[Array, "B D"]
) -> Bool[Array, "B"]:
    """Says which rows need a full step now."""
    if options.schedule == "never":
        return jnp.zeros_like(state.since, bool)
    full = (state.steps + 1) % options.stride == 0
    if options.schedule == "qc":
        full &= policy.has_turned(
            query,
            state.reference,
            state.since - 1,  # `append` has counted this step
            threshold=options.threshold,
            stride=options.stride,
            max_gap=options.longest_gap,
        )
    if options.qc_batch == "per_row":
        return full
    return jnp.broadcast_to(full.any(), full.shape)


def mean_query(
    options: Options,
    spec: CacheSpec,
    q: Float[Array, "B Hq 1 D"],
    rotated: Float[Array, "B Hq 1 D"],
) -> Float[Array, "B D"]:
    """The mean over heads of the query that `qc` compares, float32."""
    compared = rotated if options.qc_rope == "post" else q
    return heads.mean(spec, compared[:, :, 0].astype(jnp.float32))


def select(
    options: Options,
    store: contiguous.Contiguous,
    logits: Float[Array, "B Hq 1 S"],
) -> Int[Array, "B Hkv N"]:
    """Selects what the newest token attends to most, in the order of eviction."""
    return policy.select(
        logits[:, :, 0],
        store.length - 1,
        store.spec.num_kv_heads,
        budget=options.budget,
        kernel=options.kernel,
        group_reduce=options.group_reduce,
        self_mode=options.self_mode,
    )


def refill(
    state: RefreshKVState, full: Bool[Array, "B"], chosen: Int[Array, "B Hkv N"]
) -> RefreshKVState:
    """Fills the small cache of `full` rows with the tokens at `chosen` positions."""

    def fill(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, *ring = carry
        fresh = (
            buffers.take(state.store.k, chosen),
            buffers.take(state.store.v, chosen),
            chosen,
        )
        return jnp.bool_(False), *buffers.where(full, fresh, tuple(ring))

    # A loop of one turn or none: what a loop carries is updated in place.
    ring = (full.any(), state.k, state.v, state.positions)
    _, k, v, positions = lax.while_loop(lambda carry: carry[0], fill, ring)
    since = jnp.where(full, 0, state.since)
    return state._replace(k=k, v=v, positions=positions, since=since)
