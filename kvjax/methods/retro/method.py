"""RetroAttention: a step's pages also serve the tokens before it, which improve."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.partials import Partial
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, RewindFn, SelectFn, Traffic
from kvjax.methods.retro import history
from kvjax.stores import buffers, contiguous, paged, step
from pallas_kernels.page_attention import page_attention


class RetroState(NamedTuple):
    """State of :func:`retro`, one layer."""

    store: paged.Paged  # of the wrapped method
    window: history.Window

    KEEPS_NEWEST = True


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`retro`, the wrapped method among them."""

    method: Method
    select: SelectFn  # the method's
    window: int


@typed
def retro(method: Method, *, window: int = 2) -> Method:
    """Lets the newest tokens attend, step by step, to what later steps read.

    A sparse step's output is approximate, and so are the keys and values that deeper
    layers make of it, for good. Here the last window - 1 tokens go through the model
    again with each new one. They attend to those pages the new token's step reads that
    they have not seen, the result is merged into what they had, and their new keys and
    values take the old ones' place. No page is read for them alone.

    A step has `window` query rows: the newest tokens, from their embeddings on. Tokens
    of the prompt are exact and stay as they are. Only the newest token chooses pages.

    Layers that are to stay dense go outside: `dense_layers+retro+quest`.

    Args:
        method: one that lists pages, for example :func:`kvjax.quest`.
        window: tokens in a step, the new one included; 1 is `method` itself. Paper: 2,
            and up to 8.

    Returns:
        A :class:`kvjax.Method` over :class:`RetroState`, of `window` rows.

    State: that of `method`; out `(B, Hq, window-1, D)` and lse `(B, Hq, window-1)`
        float32; last_loaded `(B, H, NP)` int32, H lists of pages. What is appended is
        kept, and revised while it is in the window.
    Reads per step and layer: as `method`; out, lse and last_loaded of the pages read;
        the keys of the newest window/P + 1 pages, whose extremes are taken again.
    Exact when: `method` is; under `dynamic` RoPE up to the original context.

    Raises:
        ValueError: if `window` < 1, or `method` does not list pages to be merged; from
            a step, if it is not fed `window` rows.

    Source:
        Choi, Kang, Jo, Kim, "Retrospective Sparse Attention for Efficient Long-Context
        Generation" (RetroAttention), ICLR 2026, arXiv:2508.09001.
    Deviations:
        No official code is public; where the paper is silent: the log-sum-exp is kept
        with the output, new keys are written before pages are chosen, a past token
        never attends to what comes after it, extremes of pages are taken again.

    Example:
        >>> method = kvjax.retro(kvjax.quest(budget=256), window=4)
        >>> state = method.init(spec)
    """
    if window < 1:
        raise ValueError(f"{window=} must be at least 1 token: the new one.")
    if method.select is None or method.rows != 1:
        raise ValueError(
            f"retro merges softmax attention over pages that its method lists for one "
            f"row a step, as {method} does not: wrap quest itself, as in "
            "'dense_layers+retro+quest'."
        )
    if window == 1:
        return method
    options = Options(method, method.select, window)
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        rows=window,
        rewind=method.rewind and functools.partial(rewind, method.rewind),
        exact_prompt=method.exact_prompt,
    )


def choose(
    options: Options, store: paged.Paged, rotated: Float[Array, "B Hq T D"]
) -> Int[Array, "B H K"]:
    """Lists the pages that the newest token chooses."""
    return options.select(store, rotated[:, :, -1:])


def init(options: Options, spec: CacheSpec, weights: Any = None) -> RetroState:
    """Makes the method's store, and a window that has seen nothing."""
    store = options.method.init(spec, weights)
    ended = jax.eval_shape(options.method.finish, store)
    lists, num_pages = shape_of_lists(options, spec, ended)[1], ended.pages.shape[2]
    return RetroState(store, history.empty(spec, options.window, lists, num_pages))


def shape_of_lists(
    options: Options, spec: CacheSpec, store: paged.Paged
) -> tuple[int, ...]:
    """Returns batch, lists and pages of what a step chooses."""
    q = jax.ShapeDtypeStruct(
        (spec.batch, spec.num_q_heads, 1, spec.head_dim), spec.dtype
    )
    return jax.eval_shape(functools.partial(choose, options), store, q).shape


def prefill(
    options: Options,
    state: RetroState,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[RetroState, Float[Array, "B Hq T D"]]:
    """Leaves the prompt to the method; its tokens are not revised."""
    store, out = options.method.prefill(state.store, q, k, v, lengths)
    return RetroState(store, history.end(state.window, store.length)), out


def finish(options: Options, state: RetroState) -> RetroState:
    """Leaves the store to the method."""
    return state._replace(store=options.method.finish(state.store))


def append(
    options: Options,
    state: RetroState,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
) -> RetroState:
    """Writes the newest token, and those that a step decoded before it anew."""
    rows, window = k.shape[2], options.window
    if rows != window:
        raise ValueError(
            f"{rows=} must be {window=}: feed the newest `method.rows` tokens."
        )
    decoded = state.store.length - state.window.start
    count = jnp.minimum(decoded + 1, window)
    return state._replace(store=paged.revise(state.store, k, v, count))


def inspect_step(
    options: Options, state: RetroState, q: Float[Array, "B Hq T D"]
) -> tuple[RetroState, Float[Array, "B Hq T D"], Diagnostics]:
    """Attends to the chosen pages, in each row to those that it has not seen."""
    store, window = state
    rotated, positions = contiguous.rotate_queries(store.spec, q, store.length)
    chosen = choose(options, store, rotated)
    out, lse = history.attention_so_far(window, positions)
    # O_up: attention over the union, of the stored output and the supplement.
    updated = Partial(
        *page_attention(
            rotated,
            store.pages,
            chosen,
            positions,
            history.unseen(window, chosen, positions),
            initial=(out, lse),
            sm_scale=store.spec.sm_scale,
        )
    )
    window = history.advance(window, chosen, store.length - 1, updated)
    attended = paged.tokens_of(chosen, store.pages.shape[3], store.length)
    # Revised keys are rotated later than those beside them.
    diagnostics = step.diagnose(attended, updated.lse, store.length, store.spec)
    return RetroState(store, window), updated.out.astype(q.dtype), diagnostics


def rewind(
    rewind_store: RewindFn, state: RetroState, count: Int[Array, "B"], most: int
) -> RetroState:
    """Takes tokens back; those before them are revised no more."""
    store = rewind_store(state.store, count, most)
    return RetroState(store, history.end(state.window, store.length))


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of the method, of the window, and of keys that are read anew."""
    inner = options.method.traffic(spec, length)
    state = jax.eval_shape(lambda: finish(options, init(options, spec)))
    page_size = state.store.pages.shape[3]
    results = buffers.num_bytes((state.window.out, state.window.lse))
    # An int of last_loaded with each page; keys are half of a page.
    kept = state.store.spec  # as the method keeps it
    page = buffers.row_bytes(kept, page_size, "both")
    pages = inner.kv // page * spec.num_kv_heads
    # Not what a method reads beside its lists, such as a residual.
    _, lists, listed = shape_of_lists(options, spec, state.store)
    pages = min(pages, lists * min(listed, -(-length // page_size)))
    loaded = 4 * spec.batch * pages
    most = -(-(options.window - 1) // page_size) + 1
    again = min(most, -(-length // page_size))
    keys = buffers.row_bytes(kept, again * page_size, "keys")
    return Traffic(inner.kv, inner.metadata + results + loaded + keys)
