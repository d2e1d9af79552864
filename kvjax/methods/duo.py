"""A transform: retrieval heads by a method, the others sinks and a window (Duo)."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import files
from kvjax.attention import choices
from kvjax.attention.partials import Partial, merge, softmax_only
from kvjax.attention.typed import noted, typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, step
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Rows

Score = Literal["needle_mass", "retrieval"]
Scores = tuple[tuple[float, ...], ...]  # (L, Hq) or (L, Hkv): a row a layer


class Streaming(NamedTuple):
    """The keys and values of the streaming heads: sinks, and a ring of the newest."""

    spec: CacheSpec  # of these heads
    k: Float[Rows, "B Hs N D"]  # rotated at absolute positions; the first are sinks
    v: Float[Rows, "B Hs N D"]
    length: Int[Array, "B"]  # tokens seen, not slots used

    ROWS = buffers.KEYS_AND_VALUES


class Duo(NamedTuple):
    """State of :func:`duo`, one layer."""

    order: Int[Array, "B Hkv"]  # the layer's KV heads, retrieval heads first
    retrieval: Any  # the method's state of these; None if there is none
    streaming: Streaming | None  # of the others

    HEADS_TOGETHER = True  # which is of which kind differs from device to device


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`duo`, the wrapped method among them."""

    method: Method
    share: float
    budget: int
    num_sinks: int
    scores: Scores | None

    def __post_init__(self) -> None:
        share, budget, num_sinks = self.share, self.budget, self.num_sinks
        if not 0 <= share <= 1:
            raise ValueError(f"{share=} must be in [0, 1], a share of the KV heads.")
        if not 0 <= num_sinks < budget:
            raise ValueError(
                f"{num_sinks=} must be in [0, {budget=}); raise the budget."
            )

    @property
    def ring(self) -> int:
        """Slots of the ring, R."""
        return self.budget - self.num_sinks


def note(**options: Any) -> str | None:
    """Says that nothing is known of the heads, where no scores are given."""
    if options.get("heads") is not None:
        return None
    return (
        "duo without heads: the first heads of each layer stand for retrieval heads, "
        "which has its memory and speed, not its answers; give heads=FILE, written "
        "with: kvjax heads --json > FILE"
    )


@noted(note)
@typed
@softmax_only
def duo(
    method: Method,
    *,
    heads: str | Sequence[Sequence[float]] | None = None,
    share: float = 0.5,
    score: Score = "needle_mass",
    budget: int = 384,
    num_sinks: int = 128,
) -> Method:
    """Leaves retrieval heads to `method`; the others see sinks and the newest tokens.

    Heads that fetch what lies far back need the whole text, the others need not hold
    it (DuoAttention). A KV head is as much of a retrieval head as the most retrieving
    of its query heads; the `share` of all the model's KV heads that score highest are
    retrieval heads, so that a layer may have any number of them. Prompts obey the same
    rule, token by token: a streaming head reads them in constant memory.

    Without `heads` nothing is known of the heads, and each layer's first ones stand
    for retrieval heads: that has the memory and the speed of the method, not its
    answers.

    Args:
        method: of the retrieval heads: :func:`kvjax.full` in the paper.
        heads: file that `kvjax heads --json` wrote of this model, or scores of its
            layers' query heads, or KV heads, `(L, H)`.
        share: of the model's KV heads that are retrieval heads. Paper: 0.5 for models
            of grouped queries, 0.25 where each query head has a KV head.
        score: by which a file ranks heads: the mass on the needle, or how often the
            source has the most weight.
        budget: tokens that a streaming head attends to, sinks and the current one
            included. Paper: 384.
        num_sinks: first tokens that streaming heads always see. Paper: 128.

    Returns:
        A :class:`kvjax.Method` over :class:`Duo`.

    State: that of `method`, of the retrieval heads alone; of each streaming head k, v
        `(B, budget, D)` cache dtype.
    Reads per step and layer: as `method` of the retrieval heads; 2*min(budget,
        length)*D elements of KV for each streaming head, per row.
    Exact when: `method` is, and budget >= length or all heads are retrieval heads.

    Raises:
        ValueError: unless 0 <= share <= 1, 0 <= num_sinks < budget, and the scores can
            be read; from `init`, if they are of a model of other heads or layers, or
            `method` feeds more than one row a step.

    Source:
        Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval
        and Streaming Heads", ICLR 2025, arXiv:2410.10819, Sec. 2.
    Deviations:
        The paper learns a gate for each head by distillation on synthetic pass keys;
        here heads are ranked by what they do on pass keys (`kvjax heads`), or by
        anybody's scores. The number of tokens a streaming head sees counts the current
        one.

    Example:
        >>> method = kvjax.duo(kvjax.full(), heads="heads.json", budget=256)
        >>> state = method.init(spec)
    """
    choices.check_choice("score", score, Score)
    if method.rows != 1:
        raise ValueError(f"{method.rows=} must be 1: duo feeds the newest token alone.")
    scores = None
    if heads is not None:
        scores = read_scores(heads, score) if isinstance(heads, str) else floats(heads)
        check_scores(scores)
    options = Options(method, share, budget, num_sinks, scores)
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=method.exact_prompt and share == 1,
    )


# --- which heads


def floats(scores: Sequence[Sequence[float]]) -> Scores:
    """Returns scores, of whatever sequences, as tuples."""
    return tuple(tuple(float(one) for one in layer) for layer in scores)


def read_scores(path: str, score: str) -> Scores:
    """Reads the scores of all query heads from what `kvjax heads --json` printed."""
    name = "heads.json" if pathlib.Path(path).is_dir() else path  # "" is a folder
    fix = f"write it with: kvjax heads --json > {name}"
    what = "cannot be read"
    try:
        text = files.read_text(path)
        what = "is no JSON"
        document = json.loads(text)
        what = f"has no scores {score!r}"
        return floats(document[score])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"heads={path!r} {what} ({why}); {fix}") from error


def check_scores(scores: Scores) -> None:
    """Raises ValueError unless all layers have finite scores of as many heads."""
    widths = sorted({len(layer) for layer in scores})
    finite = all(math.isfinite(one) for layer in scores for one in layer)
    if len(widths) != 1 or not widths[0] or not finite:
        raise ValueError(
            f"heads has layers of {widths} scores: each must have one for every head, "
            "and all must be finite."
        )


@functools.cache
def best_heads(
    scores: Scores, share: float, num_kv_heads: int
) -> tuple[tuple[int, ...], ...]:
    """Returns each layer's retrieval heads: the best `share` of all KV heads.

    Ties go to the lower layer, then to the lower head.
    """
    group = len(scores[0]) // num_kv_heads
    of_kv = [
        (max(layer[head * group : (head + 1) * group]), index, head)
        for index, layer in enumerate(scores)
        for head in range(num_kv_heads)
    ]
    ranked = sorted(of_kv, key=lambda one: (-one[0], one[1], one[2]))
    best = ranked[: math.floor(share * len(ranked) + 0.5)]
    return tuple(
        tuple(sorted(head for _, layer, head in best if layer == index))
        for index in range(len(scores))
    )


def retrieval_heads(options: Options, spec: CacheSpec) -> tuple[int, ...]:
    """Returns the KV heads of the spec's layer that are retrieval heads, in order."""
    heads, scores = spec.num_kv_heads, options.scores
    if scores is None:
        return tuple(range(math.floor(options.share * heads + 0.5)))
    width, layers = len(scores[0]), len(scores)
    if width not in (heads, spec.num_q_heads):
        raise ValueError(
            f"heads has scores of {width} heads, and the model has {spec.num_q_heads} "
            f"query heads on {heads} KV heads: they are of another model."
        )
    if spec.layer >= layers or spec.num_layers not in (0, layers):
        raise ValueError(
            f"heads has scores of {layers} layers, and the model has "
            f"{spec.num_layers or 'more'}: they are of another model."
        )
    return best_heads(scores, options.share, heads)[spec.layer]


def part(spec: CacheSpec, heads: int) -> CacheSpec:
    """Returns the spec of so many of a layer's KV heads."""
    return dataclasses.replace(spec, num_kv_heads=heads, num_q_heads=heads * spec.group)


# --- the functions of a method


def init(options: Options, spec: CacheSpec, weights: Any = None) -> Duo:
    """Makes the method's state of the retrieval heads, and a ring for the others."""
    first = retrieval_heads(options, spec)
    heads, rows = spec.num_kv_heads, spec.batch
    others = [head for head in range(heads) if head not in first]
    order = jnp.asarray([*first, *others], jnp.int32)
    retrieval = streaming = None
    if first:
        retrieval = options.method.init(part(spec, len(first)), weights)
    if others:
        shape = (rows, len(others), options.budget)
        streaming = Streaming(
            part(spec, len(others)),
            buffers.allocate_rows(spec, shape, "keys"),
            buffers.allocate_rows(spec, shape, "values"),
            buffers.lengths(spec),
        )
    return Duo(jnp.broadcast_to(order, (rows, heads)), retrieval, streaming)


def prefill(
    options: Options,
    state: Duo,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Duo, Float[Array, "B Hq T D"]]:
    """Attends by the method, and from streaming heads to sinks and windows."""
    retrieval, streaming, outs = state.retrieval, state.streaming, []
    (near_q, near_k, near_v), (far_q, far_k, far_v) = split(state, q, k, v)
    if retrieval is not None:
        retrieval, out = options.method.prefill(retrieval, far_q, far_k, far_v, lengths)
        outs.append(out)
    if streaming is not None:
        streaming, out = read(options, streaming, near_q, near_k, near_v, lengths)
        outs.append(out.astype(q.dtype))
    state = state._replace(retrieval=retrieval, streaming=streaming)
    return state, in_place(state, outs)


def finish(options: Options, state: Duo) -> Duo:
    """Leaves the end of the prompt to the method."""
    if state.retrieval is None:
        return state
    return state._replace(retrieval=options.method.finish(state.retrieval))


def append(
    options: Options,
    state: Duo,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> Duo:
    """Writes the next token of each head where its kind has it."""
    retrieval, streaming = state.retrieval, state.streaming
    (near_k, near_v), (far_k, far_v) = split(state, k, v)
    if retrieval is not None:
        retrieval = options.method.append(retrieval, far_k, far_v)
    if streaming is not None:
        streaming, _ = write(options, streaming, near_k, near_v, None)
    return state._replace(retrieval=retrieval, streaming=streaming)


def inspect_step(
    options: Options, state: Duo, q: Float[Array, "B Hq 1 D"]
) -> tuple[Duo, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends from each head as its kind does."""
    retrieval, streaming = state.retrieval, state.streaming
    (near_q,), (far_q,) = split(state, q)
    outs, parts = [], []
    if retrieval is not None:
        retrieval, out, found = options.method.inspect_step(retrieval, far_q)
        outs.append(out)
        parts.append(found)
    if streaming is not None:
        spec = streaming.spec
        rotated, positions = contiguous.rotate_queries(spec, near_q, streaming.length)
        held = slots_hold(options, streaming.length)
        out, lse = decode_attention(
            rotated,
            streaming.k,
            streaming.v,
            positions,
            held,
            sm_scale=spec.sm_scale,
        )
        outs.append(out.astype(q.dtype))
        lists = (len(held), spec.num_kv_heads, options.budget)
        attended = jnp.broadcast_to(held, lists)
        parts.append(step.diagnose(attended, lse, streaming.length))
    state = state._replace(retrieval=retrieval, streaming=streaming)
    return state, in_place(state, outs), merged(state, parts)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the method's heads, and of the windows of the others."""
    first = len(retrieval_heads(options, spec))
    kv = metadata = link = 0
    if first:
        kv, metadata, link = options.method.traffic(part(spec, first), length)
    if others := spec.num_kv_heads - first:
        kv += buffers.kv_bytes(part(spec, others), min(options.budget, length))
    return Traffic(kv, metadata, link)


# --- heads of two kinds


def heads_of(state: Duo, count: int) -> Int[Array, "B H"]:
    """Returns the order of `count` heads: KV heads, or query heads in their groups."""
    rows, heads = state.order.shape
    group = count // heads
    inside = jnp.arange(group, dtype=jnp.int32)
    return (state.order[:, :, None] * group + inside).reshape(rows, count)


def split(state: Duo, *arrays: Array) -> tuple[list[Array], list[Array]]:
    """Returns each array's streaming heads, and its retrieval heads."""
    near, far = [], []
    heads = state.order.shape[1]
    others = 0 if state.streaming is None else state.streaming.k.shape[1]
    for array in arrays:
        count = array.shape[1]
        order = heads_of(state, count)[:, :, None, None]
        sorted_heads = jnp.take_along_axis(array, order, axis=1)
        end = count // heads * (heads - others)
        far.append(sorted_heads[:, :end])
        near.append(sorted_heads[:, end:])
    return near, far


def in_place(state: Duo, parts: Sequence[Array]) -> Array:
    """Returns arrays `(B, H, ...)` of both kinds of heads as one, in their places."""
    joined = jnp.concatenate(parts, axis=1)
    place = jnp.argsort(heads_of(state, joined.shape[1]), axis=1)
    place = place.reshape(*place.shape, *[1] * (joined.ndim - 2))
    return jnp.take_along_axis(joined, place, axis=1)


def merged(state: Duo, parts: Sequence[Diagnostics]) -> Diagnostics:
    """Returns the diagnostics of all heads, from those of both kinds."""
    exact = in_place(state, [one.exact for one in parts])
    longest = max(one.attended.shape[2] for one in parts)
    # A method may list what each query head attends to.
    group = exact.shape[1] // state.order.shape[1]
    by_query = any(one.attended.shape[1] == one.exact.shape[1] for one in parts)
    lists = []
    for one in parts:
        attended = one.attended
        if by_query and attended.shape[1] != one.exact.shape[1]:
            attended = jnp.repeat(attended, group, axis=1)
        padding = ((0, 0), (0, 0), (0, longest - attended.shape[2]))
        lists.append(jnp.pad(attended, padding, constant_values=-1))
    refreshed = functools.reduce(jnp.logical_and, [one.refreshed for one in parts])
    return Diagnostics(
        in_place(state, lists),
        in_place(state, [one.lse for one in parts]),
        refreshed,
        exact,
    )


# --- streaming heads


def slots_hold(options: Options, length: Int[Array, "B"]) -> Int[Array, "B 1 N"]:
    """Returns the position in each slot after `length` tokens, -1 = none.

    Sinks have their own slots; the newest others a ring behind them.
    """
    slots = jnp.arange(options.budget, dtype=jnp.int32)
    last = length[:, None] - 1
    newest = last - (last - slots) % options.ring
    in_ring = jnp.where(newest >= options.num_sinks, newest, -1)
    sinks = jnp.where(slots <= last, slots, -1)
    return jnp.where(slots < options.num_sinks, sinks, in_ring)[:, None, :]


def write(
    options: Options,
    state: Streaming,
    k: Float[Array, "B Hs T D"],
    v: Float[Array, "B Hs T D"],
    lengths: Int[Array, "B"] | None,
) -> tuple[Streaming, Float[Array, "B Hs T D"]]:
    """Rotates and writes the next tokens; returns the state and the rotated keys."""
    num_sinks, ring = options.num_sinks, options.ring
    positions, valid = buffers.chunk_positions(state.length, lengths, k.shape[2])
    length = state.length + valid.sum(-1, dtype=jnp.int32)
    k = state.spec.rope(k, positions, length)
    is_sink = positions < num_sinks
    # Of the tokens that share a slot only the newest may be written.
    valid &= is_sink | (positions >= (length - ring)[:, None])
    slots = jnp.where(is_sink, positions, num_sinks + (positions - num_sinks) % ring)
    written = state._replace(
        k=buffers.write(state.k, k, slots, valid),
        v=buffers.write(state.v, v, slots, valid),
        length=length,
    )
    return written, k


def read(
    options: Options,
    state: Streaming,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B Hs T D"],
    v: Float[Array, "B Hs T D"],
    lengths: Int[Array, "B"],
) -> tuple[Streaming, Float[Array, "B H T D"]]:
    """Reads a chunk of the prompt: each token sees the sinks and its own window."""
    num_sinks, spec = options.num_sinks, state.spec
    before = slots_hold(options, state.length)
    new, rotated_keys = write(options, state, k, v, lengths)
    rotated, positions = contiguous.rotate_queries(spec, q, new.length, lengths)
    fresh = jnp.where(positions < new.length[:, None], positions, -1)
    held = jnp.concatenate([before, fresh[:, None]], axis=2)

    def joined(old: Rows, chunk: Array) -> Array:
        return jnp.concatenate(
            [quantized.floats(old), quantized.as_stored(old, chunk)], axis=2
        )

    out = Partial(
        *decode_attention(
            rotated,
            joined(state.k, rotated_keys),
            joined(state.v, v),
            positions,
            jnp.where(held >= num_sinks, held, -1),
            sm_scale=spec.sm_scale,
            window=options.ring,
        )
    )
    if num_sinks:
        first_k, first_v = jax.tree.map(lambda x: x[:, :, :num_sinks], (new.k, new.v))
        sinks = Partial(
            *decode_attention(
                rotated,
                first_k,
                first_v,
                positions,
                sm_scale=spec.sm_scale,
            )
        )
        out = merge(sinks, out)
    return new, out.out
