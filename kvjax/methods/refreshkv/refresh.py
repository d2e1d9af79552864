"""The transform `refresh`: pages that any method chose serve several steps."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import heads
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, SelectFn, Traffic
from kvjax.methods.refreshkv import policy
from kvjax.stores import buffers, contiguous, paged, step
from pallas_kernels.page_attention import page_attention


class RefreshState(NamedTuple):
    """State of :func:`refresh`, one layer."""

    store: paged.Paged  # of the wrapped method
    chosen: Int[Array, "B H K"]  # pages attended to, the lowest score last, -1 = none
    since: Int[Array, "B"]  # steps since they were chosen
    reference: Float[Array, "B D"]  # mean query of the step that chose them, float32
    steps: Int[Array, "B"]
    refreshes: Int[Array, "B"]  # choices among them: steps / refreshes is the stride

    KEEPS_NEWEST = True


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`refresh`, the wrapped method among them."""

    method: Method
    select: SelectFn  # the method's
    stride: int
    schedule: Literal["fixed", "qc"]
    threshold: float


@typed
def refresh(
    method: Method,
    *,
    stride: int = 5,
    schedule: Literal["fixed", "qc"] = "fixed",
    threshold: float = 0.85,
) -> Method:
    """Chooses pages by `method` now and then, and attends to them until the next time.

    RefreshKV's schedule over anyone's scores: what queries look for changes little from
    one token to the next, so that a choice need not be made at every step. Pages that
    begin in the meantime join it in the place of those that scored lowest. The first
    step after the prompt chooses.

    Args:
        method: one that lists pages, for example :func:`kvjax.quest`.
        stride: a choice is due every so many steps.
        schedule: whether what is due is done: `fixed` always, `qc` (query comparison)
            if the query has turned away from the one that chose last.
        threshold: of `qc`: done unless the cosine of the two queries, each the mean
            over heads, exceeds it. RefreshKV: 0.85.

    Returns:
        A :class:`kvjax.Method` over :class:`RefreshState`.

    State: that of `method`, and the list of pages. What is appended is kept.
    Reads per step and layer: pages as `method`; what it reads to choose once in
        `stride` steps, and the list.
    Exact when: `method` is.

    Raises:
        ValueError: if `stride` < 1, or `method` does not list pages.

    Source:
        Xu, Goyal, Choi, "RefreshKV: Updating Small KV Cache During Long-form
        Generation", ACL 2025, arXiv:2411.05787.
    Deviations:
        The paper chooses tokens by the attention of a full step, as
        :func:`kvjax.refreshkv` does; pages and other scorers are ours.

    Example:
        >>> method = kvjax.refresh(kvjax.quest(budget=256), stride=5)
        >>> state = method.init(spec)
    """
    if stride < 1:
        raise ValueError(f"{stride=} must be at least 1 step.")
    if schedule not in ("fixed", "qc"):
        raise ValueError(f"{schedule=} must be 'fixed' or 'qc'.")
    if method.select is None or method.rows != 1:
        raise ValueError(
            f"refresh keeps a list of pages, which {method} does not make: wrap quest "
            "itself, as in 'dense_layers+refresh+quest'."
        )
    options = Options(method, method.select, stride, schedule, threshold)
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=method.exact_prompt,
        listed=method.listed,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> RefreshState:
    """Makes the method's store, and a list of no pages."""
    store = options.method.init(spec, weights)
    shape = (spec.batch, spec.num_q_heads, 1, spec.head_dim)
    q = jax.ShapeDtypeStruct(shape, spec.dtype)
    ended = jax.eval_shape(options.method.finish, store)
    chosen = jax.eval_shape(options.select, ended, q)
    return RefreshState(
        store,
        buffers.allocate(chosen.shape, chosen.dtype, fill=-1.0),
        since=buffers.lengths(spec),
        reference=buffers.allocate((spec.batch, spec.head_dim), jnp.float32, 0.0),
        steps=buffers.lengths(spec),
        refreshes=buffers.lengths(spec),
    )


def prefill(
    options: Options,
    state: RefreshState,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[RefreshState, Float[Array, "B Hq T D"]]:
    """Leaves the prompt to the method."""
    store, out = options.method.prefill(state.store, q, k, v, lengths)
    return state._replace(store=store), out


def finish(options: Options, state: RefreshState) -> RefreshState:
    """Leaves the store to the method."""
    return state._replace(store=options.method.finish(state.store))


def append(
    options: Options,
    state: RefreshState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> RefreshState:
    """Leaves the next token to the method."""
    return state._replace(store=options.method.append(state.store, k, v))


def inspect_step(
    options: Options, state: RefreshState, q: Float[Array, "B Hq 1 D"]
) -> tuple[RefreshState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to the listed pages, which rows that are due choose anew."""
    store = state.store
    page_size = store.pages.shape[3]
    rotated, _ = contiguous.rotate_queries(store.spec, q, store.length)
    query = heads.mean(store.spec, rotated[:, :, 0].astype(jnp.float32))
    due = is_due(options, state, query)
    by_row = due[:, None, None]
    chosen = lax.cond(
        due.any(),
        lambda: jnp.where(by_row, options.select(store, rotated), state.chosen),
        lambda: state.chosen,
    )
    # A page that has begun since goes first, and the lowest score out.
    current = ((store.length - 1) // page_size)[:, None, None]
    newest = jnp.broadcast_to(current, (*chosen.shape[:2], 1))
    moved = jnp.concatenate([newest, chosen[:, :, :-1]], axis=-1)
    is_listed = (chosen == current).any(-1, keepdims=True)
    chosen = jnp.where(is_listed, chosen, moved)

    store, there = paged.bring(store, chosen)
    out, lse = page_attention(
        rotated,
        there.pages,
        there.page_ids,
        there.positions,
        sm_scale=store.spec.sm_scale,
    )
    attended = paged.tokens_of(chosen, page_size, store.length)
    diagnostics = step.diagnose(attended, lse, store.length)
    state = RefreshState(
        store,
        chosen,
        since=jnp.where(due, 0, state.since) + 1,
        reference=jnp.where(due[:, None], query, state.reference),
        steps=state.steps + 1,
        refreshes=state.refreshes + due.astype(jnp.int32),
    )
    return state, out.astype(q.dtype), diagnostics


def is_due(
    options: Options, state: RefreshState, query: Float[Array, "B D"]
) -> Bool[Array, "B"]:
    """Says which rows choose anew in this step."""
    due = state.steps % options.stride == 0
    if options.schedule == "qc":
        due &= (state.refreshes == 0) | policy.has_turned(
            query,
            state.reference,
            state.since,
            threshold=options.threshold,
            stride=options.stride,
            max_gap=jnp.iinfo(jnp.int32).max,
        )
    return due


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the method, of its choice a share, and those of the list."""
    inner = options.method.traffic(spec, length)
    chosen = jax.eval_shape(lambda: init(options, spec)).chosen
    listed = buffers.num_bytes(chosen)
    return Traffic(inner.kv, -(-inner.metadata // options.stride) + listed)
