"""Attention to every token so far, by the model's normaliser: for the baselines."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.interface import CacheSpec, Diagnostics, Method, State, Traffic
from kvjax.stores import buffers, contiguous
from pallas_kernels.decode_attention import decode_logits
from pallas_kernels.entmax import entmax


def method() -> Method:
    """Keeps every key and value, and attends to all of them.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.contiguous.Contiguous`.
    """
    return Method(
        init=_init,
        prefill=_prefill,
        finish=_finish,
        append=contiguous.extend,
        inspect_step=_inspect_step,
        traffic=_traffic,
        rewind=_rewind,
        exact_prompt=True,
    )


def _finish(state: contiguous.Contiguous) -> contiguous.Contiguous:
    return state


def _init(spec: CacheSpec, weights=None) -> contiguous.Contiguous:
    del weights
    return contiguous.contiguous(spec)


def _prefill(state, q, k, v, lengths) -> tuple[State, Array]:
    state = contiguous.extend(state, k, v, lengths)
    rotated, positions = contiguous.rotate_queries(state.spec, q, state.length, lengths)
    return state, contiguous.attend(state, rotated, positions).out.astype(q.dtype)


def _inspect_step(state, q) -> tuple[State, Array, Diagnostics]:
    rotated, positions = contiguous.rotate_queries(state.spec, q, state.length)
    out, lse = contiguous.attend(state, rotated, positions)
    slots = jnp.arange(state.spec.capacity, dtype=jnp.int32)
    attended = jnp.where(slots < state.length[:, None, None], slots, -1)
    attended = jnp.broadcast_to(attended, state.k.shape[:3])
    refreshed = jnp.ones_like(state.length, bool)
    exact = jnp.ones(q.shape[:2], bool)
    return state, out.astype(q.dtype), Diagnostics(attended, lse, refreshed, exact)


def _rewind(state, count, most) -> contiguous.Contiguous:
    del most
    return state._replace(length=state.length - count)


class Windowed(NamedTuple):
    """State of :func:`windowed`, one layer."""

    store: contiguous.Contiguous  # of the method
    start: Int[Array, "B"]  # the first position that a step decoded


def windowed(method: Method, rows: int) -> Method:
    """A method of one row, in steps that feed the newest `rows` tokens.

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

    def init(spec, weights=None):
        store = method.init(spec, weights)
        if not isinstance(store, contiguous.Contiguous):
            raise ValueError(
                f"a method with state {type(store).__name__} does not keep every token "
                f"in one store, so it cannot revise its last {rows} rows: use full."
            )
        return Windowed(store, buffers.lengths(spec))

    def prefill(state, q, k, v, lengths):
        store, out = method.prefill(state.store, q, k, v, lengths)
        return Windowed(store, store.length), out

    def finish(state):
        return state._replace(store=method.finish(state.store))

    def append(state, k, v):
        count = jnp.minimum(state.store.length - state.start + 1, rows)
        return state._replace(store=contiguous.revise(state.store, k, v, count))

    def inspect_step(state, q):
        store, out, diagnostics = method.inspect_step(state.store, q)
        return state._replace(store=store), out, diagnostics

    def rewind(state, count, most):
        store = method.rewind(state.store, count, most)
        return Windowed(store, store.length)

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=method.traffic,
        rows=rows,
        rewind=rewind if method.rewind else None,
        exact_prompt=method.exact_prompt,
    )


def weights(
    state: contiguous.Contiguous, q: Float[Array, "B Hq T D"]
) -> Float[Array, "B Hq T S"]:
    """What a step gives each token: the weights behind its output, float32.

    Reads every key, and holds all weights at once.
    """
    spec = state.spec
    rotated, positions = contiguous.rotate_queries(spec, q, state.length)
    logits = decode_logits(rotated, state.k, positions, sm_scale=spec.sm_scale)
    if spec.alpha == 1:
        return jax.nn.softmax(logits, axis=-1)
    return entmax(logits, alpha=spec.alpha)


def _traffic(spec: CacheSpec, length: int) -> Traffic:
    return Traffic(kv=buffers.kv_bytes(spec, length), metadata=0)
