"""RetroAttention: a step's pages also serve the tokens before it, which improve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.attention.partials import Partial
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.methods.retro import history
from kvjax.stores import buffers, contiguous, kept_slots, paged
from pallas_kernels.page_attention import page_attention


class RetroState(NamedTuple):
    """State of :func:`retro`, one layer."""

    store: paged.Paged  # of the wrapped method
    window: history.Window


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
        float32; last_loaded `(B, H, NP)` int32, H lists of pages.
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
            "retro merges softmax attention over listed pages, which this method does "
            "not list: wrap quest itself, as in 'dense_layers+retro+quest'."
        )
    if window == 1:
        return method

    def choose(store, rotated):
        return method.select(store, rotated[:, :, -1:])

    def shape_of_choice(store):
        spec = store.spec
        q = jax.ShapeDtypeStruct(
            (spec.batch, spec.num_q_heads, 1, spec.head_dim), spec.dtype
        )
        return jax.eval_shape(choose, store, q).shape

    def init(spec, weights=None):
        store = method.init(spec, weights)
        lists, num_pages = shape_of_choice(store)[1], store.pages.shape[2]
        return RetroState(store, history.empty(spec, window, lists, num_pages))

    def prefill(state, q, k, v, lengths):
        store, out = method.prefill(state.store, q, k, v, lengths)
        return RetroState(store, history.end(state.window, store.length)), out

    def finish(state):
        return state._replace(store=method.finish(state.store))

    def append(state, k, v):
        rows = k.shape[2]
        if rows != window:
            raise ValueError(
                f"{rows=} must be {window=}: feed the newest `method.rows` tokens."
            )
        decoded = state.store.length - state.window.start
        count = jnp.minimum(decoded + 1, window)
        return state._replace(store=paged.revise(state.store, k, v, count))

    def inspect_step(state, q):
        store, held = state
        rotated, positions = contiguous.rotate_queries(store.spec, q, store.length)
        chosen = choose(store, rotated)
        # O_up: attention over the union, of the stored output and the supplement.
        found = Partial(
            *page_attention(
                rotated,
                store.pages,
                chosen,
                positions,
                history.unseen(held, chosen, positions),
                initial=tuple(history.seen(held, positions)),
                sm_scale=store.spec.sm_scale,
            )
        )
        held = history.advance(held, chosen, store.length - 1, found)
        attended = paged.tokens_of(chosen, store.pages.shape[3], store.length)
        exact = kept_slots.holds_all(attended, store.length, q.shape[1])
        alike = kept_slots.turns_alike(
            store.spec, store.length
        )  # revised keys, to old ones
        diagnostics = Diagnostics(attended, found.lse, exact.all(-1), exact & alike)
        return RetroState(store, held), found.out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        inner = method.traffic(spec, length)
        state = jax.eval_shape(lambda: init(spec))
        page_size = state.store.pages.shape[3]
        held = buffers.num_bytes((state.window.out, state.window.lse))
        # An int of last_loaded with each page; keys are half of a page.
        pages = inner.kv // buffers.kv_bytes(spec, page_size)
        loaded = 4 * spec.batch * spec.num_kv_heads * pages
        again = min(-(-(window - 1) // page_size) + 1, -(-length // page_size))
        keys = buffers.kv_bytes(spec, again * page_size) // 2
        return Traffic(inner.kv, inner.metadata + held + loaded + keys)

    def rewind(state, count, most):
        store = method.rewind(state.store, count, most)
        return RetroState(store, history.end(state.window, store.length))

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=traffic,
        rows=window,
        rewind=rewind if method.rewind else None,
        exact_prompt=method.exact_prompt,
    )
