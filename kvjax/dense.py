"""Attention to every token so far, by the model's normaliser: for the baselines."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.interface import CacheSpec, Diagnostics, Method, RewindFn, Traffic
from kvjax.stores import buffers, contiguous, step
from pallas_kernels.decode_attention import decode_logits
from pallas_kernels.entmax import entmax


def method() -> Method:
    """Keeps every key and value, and attends to all of them.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.contiguous.Contiguous`.
    """
    return Method(
        init=_init,
        prefill=step.prefill,
        finish=step.finish_unchanged,
        append=contiguous.extend,
        inspect_step=_inspect_step,
        traffic=_traffic,
        rewind=contiguous.rewind,
        exact_prompt=True,
        verifies=True,
    )


def _init(spec: CacheSpec, weights: Any = None) -> contiguous.Contiguous:
    del weights
    return contiguous.contiguous(spec)


def _inspect_step(
    state: contiguous.Contiguous, q: Float[Array, "B Hq T D"]
) -> tuple[contiguous.Contiguous, Float[Array, "B Hq T D"], Diagnostics]:
    rotated, positions = contiguous.rotate_queries(state.spec, q, state.length)
    out, lse = contiguous.attend(state, rotated, positions)
    slots = jnp.arange(state.spec.capacity, dtype=jnp.int32)
    attended = jnp.where(slots < state.length[:, None, None], slots, -1)
    attended = jnp.broadcast_to(attended, state.k.shape[:3])
    refreshed = jnp.ones_like(state.length, bool)
    exact = jnp.ones(q.shape[:2], bool)
    return state, out.astype(q.dtype), Diagnostics(attended, lse, refreshed, exact)


def _traffic(spec: CacheSpec, length: int) -> Traffic:
    return Traffic(kv=buffers.kv_bytes(spec, length), metadata=0)


class Windowed(NamedTuple):
    """State of :func:`windowed`, one layer."""

    store: contiguous.Contiguous  # of the method
    start: Int[Array, "B"]  # the first position that a step decoded


def windowed(method: Method, rows: int) -> Method:
    """Gives a method of one row in steps that feed the newest `rows` tokens.

    For beside, or below, a method that revises past tokens: of those that a step
    decoded it takes the new keys and values; the prompt's stay. Every row attends to
    all tokens up to its own.

    Args:
        method: attends to everything in one store, such as :func:`kvjax.full`.
        rows: tokens in a step, the new one included.

    Returns:
        A :class:`kvjax.Method` over :class:`Windowed`.

    Raises:
        ValueError: if `method` has more than one row; from `init`, if it does not keep
            every token in one store.
    """
    if method.rows != 1:
        raise ValueError(f"{method.rows=} must be 1 to be given {rows=}.")

    def init(spec: CacheSpec, weights: Any = None) -> Windowed:
        store = method.init(spec, weights)
        if not isinstance(store, contiguous.Contiguous):
            raise ValueError(
                f"a method with state {type(store).__name__} does not keep every token "
                f"in one store, so it cannot revise its last {rows} rows: use full."
            )
        return Windowed(store, buffers.lengths(spec))

    def prefill(
        state: Windowed,
        q: Float[Array, "B Hq T D"],
        k: Float[Array, "B Hkv T D"],
        v: Float[Array, "B Hkv T D"],
        lengths: Int[Array, "B"],
    ) -> tuple[Windowed, Float[Array, "B Hq T D"]]:
        store, out = method.prefill(state.store, q, k, v, lengths)
        return Windowed(store, store.length), out

    def finish(state: Windowed) -> Windowed:
        return state._replace(store=method.finish(state.store))

    def append(
        state: Windowed, k: Float[Array, "B Hkv T D"], v: Float[Array, "B Hkv T D"]
    ) -> Windowed:
        count = jnp.minimum(state.store.length - state.start + 1, rows)
        return state._replace(store=contiguous.revise(state.store, k, v, count))

    def inspect_step(
        state: Windowed, q: Float[Array, "B Hq T D"]
    ) -> tuple[Windowed, Float[Array, "B Hq T D"], Diagnostics]:
        store, out, diagnostics = method.inspect_step(state.store, q)
        return state._replace(store=store), out, diagnostics

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=method.traffic,
        rows=rows,
        rewind=method.rewind and functools.partial(_rewind_window, method.rewind),
        exact_prompt=method.exact_prompt,
    )


def _rewind_window(
    rewind: RewindFn, state: Windowed, count: Int[Array, "B"], most: int
) -> Windowed:
    store = rewind(state.store, count, most)
    return Windowed(store, store.length)


def weights(
    state: contiguous.Contiguous, q: Float[Array, "B Hq T D"]
) -> Float[Array, "B Hq T S"]:
    """Returns what a step gives each token: the weights behind its output, float32.

    Reads every key, and holds all weights at once.
    """
    spec = state.spec
    rotated, positions = contiguous.rotate_queries(spec, q, state.length)
    logits = decode_logits(rotated, state.k, positions, sm_scale=spec.sm_scale)
    if spec.alpha == 1:
        return jax.nn.softmax(logits, axis=-1)
    return entmax(logits, alpha=spec.alpha)
