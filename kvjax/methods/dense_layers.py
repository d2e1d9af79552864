"""A transform: the first layers attend in full, the others by another method."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from kvjax import dense as dense_attention
from kvjax.attention.typed import typed
from kvjax.interface import (
    CacheSpec,
    Diagnostics,
    FinishFn,
    Hooks,
    Method,
    PrefillFn,
    RewindFn,
    State,
    Traffic,
)
from kvjax.stores import contiguous, step


class Dense(NamedTuple):
    """State of a layer that :func:`dense_layers` leaves dense."""

    state: Any


class Sparse(NamedTuple):
    """State of a layer that :func:`dense_layers` gives to the method."""

    state: Any


Layer = Dense | Sparse


@typed
def dense_layers(method: Method, dense: Method, *, first: int = 2) -> Method:
    """Uses `dense` in the first layers and `method` in the rest.

    Attention of the first layers is spread over the whole context, so that selecting
    there costs most; Quest leaves two of them dense. Where `method` feeds more rows a
    step than `dense`, as `retro` does, so do the dense layers.

    Args:
        method: for the layers from `first` on.
        dense: for the layers before; spec strings give :func:`kvjax.full`.
        first: number of dense layers. Quest: 2.

    Returns:
        A :class:`kvjax.Method` over :class:`Dense` or :class:`Sparse`, by layer.

    State: that of the method in charge of the layer, and so is what becomes of what is
        appended.
    Reads per step and layer: as the method in charge of the layer.
    Exact when: `method` is, or all layers are dense.

    Raises:
        ValueError: if `first` is negative, `dense` has more rows than one and not those
            of `method`, or reads its prompt twice; from `init`, if `method` does and
            `dense` does not hold what it read in one store, as `full` does.

    Source:
        Tang et al., "Quest", ICML 2024, arXiv:2406.10774, Sec. 3.4.
    Deviations:
        none known.

    Example:
        >>> method = kvjax.dense_layers(kvjax.quest(budget=256), kvjax.full(), first=2)
    """
    check_options(method, dense, first)
    if method.rows != dense.rows == 1:
        dense = dense_attention.windowed(dense, method.rows)
    if method.rows != dense.rows:
        raise ValueError(f"{method.rows=} must equal {dense.rows=}.")

    def init(spec: CacheSpec, weights: Any = None) -> Layer:
        if spec.layer < first:
            return empty_dense(method, dense, spec)
        return Sparse(method.init(spec, weights))

    def in_charge(wrapped: Layer) -> Method:
        return dense if isinstance(wrapped, Dense) else method

    def prefill(
        state: Layer,
        q: Float[Array, "B Hq T D"],
        k: Float[Array, "B Hkv T D"],
        v: Float[Array, "B Hkv T D"],
        lengths: Int[Array, "B"],
    ) -> tuple[Layer, Float[Array, "B Hq T D"]]:
        inner, out = in_charge(state).prefill(state.state, q, k, v, lengths)
        return state._replace(state=inner), out

    def finish(state: Layer) -> Layer:
        return state._replace(state=in_charge(state).finish(state.state))

    def append(
        state: Layer, k: Float[Array, "B Hkv T D"], v: Float[Array, "B Hkv T D"]
    ) -> Layer:
        return state._replace(state=in_charge(state).append(state.state, k, v))

    def inspect_step(
        state: Layer, q: Float[Array, "B Hq T D"]
    ) -> tuple[Layer, Float[Array, "B Hq T D"], Diagnostics]:
        inner, out, diagnostics = in_charge(state).inspect_step(state.state, q)
        return state._replace(state=inner), out, diagnostics

    def traffic(spec: CacheSpec, length: int) -> Traffic:
        return (dense if spec.layer < first else method).traffic(spec, length)

    rewinds = None
    if method.rewind and dense.rewind:
        rewinds = functools.partial(rewind, dense.rewind, method.rewind)
    if again := method.reread:
        again = again._replace(prefill=functools.partial(read_again, again.prefill))
    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=traffic,
        rows=method.rows,
        rewind=rewinds,
        exact_prompt=method.exact_prompt and dense.exact_prompt,
        renumbers=method.renumbers and (dense.renumbers or first == 0),
        reread=again,
        hooks=forwarded(method, dense),
    )


def forwarded(method: Method, dense: Method) -> Hooks:
    """Returns the hooks of the method, for the layers that it is in charge of."""
    asked, hooks = method.hooks.asked, method.hooks
    if asked is not None:
        asked = asked._replace(
            probe=functools.partial(probe, dense, asked.probe),
            close=functools.partial(unless_dense, asked.close),
            settle=functools.partial(unless_dense, asked.settle),
        )
    return Hooks(
        asked=asked,
        settle=hooks.settle and functools.partial(settle_sparse, hooks.settle),
        seal=hooks.seal and functools.partial(unless_dense, hooks.seal),
    )


def settle_sparse(
    of_method: Callable[..., tuple[State, ...]], states: tuple[Layer, ...]
) -> tuple[Layer, ...]:
    """Lets the method decide over its layers: the dense ones have no part in it."""
    sparse = [state.state for state in states if isinstance(state, Sparse)]
    settled = iter(of_method(tuple(sparse)) if sparse else ())
    return tuple(
        Sparse(next(settled)) if isinstance(state, Sparse) else state
        for state in states
    )


def check_options(method: Method, dense: Method, first: int) -> None:
    """Raises ValueError unless layers can be dense so beside the method."""
    if first < 0:
        raise ValueError(f"{first=} must be at least 0 layers.")
    if dense.hooks.asked is not None:
        raise ValueError(
            f"{dense} is told where a prompt's question begins, and is of the first "
            f"{first}: use full."
        )
    if dense.hooks.settle is not None:
        raise ValueError(
            f"{dense} decides over all layers, and is of the first {first}: use full."
        )
    if dense.reread is not None:
        raise ValueError(
            f"{dense} reads its prompt twice, and dense layers beside {method} read it "
            "as full attention does: use full."
        )


def empty_dense(method: Method, dense: Method, spec: CacheSpec) -> Dense:
    """Makes the state of a dense layer, in which the method may read again."""
    state = dense.init(spec)
    if method.reread and not isinstance(state, contiguous.Contiguous):
        raise ValueError(
            f"{method} reads its prompt twice, and {dense} does not hold what it read "
            "in one store: use full."
        )
    return Dense(state)


def read_again(
    of_sparse: PrefillFn,
    state: Layer,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Layer, Float[Array, "B Hq T D"]]:
    """Attends to the prompt and the chunk, or leaves the second reading to the method.

    A dense layer learns nothing from it.
    """
    if isinstance(state, Dense):
        return state, step.read_again(state.state, q, k, v, lengths).out
    inner, out = of_sparse(state.state, q, k, v, lengths)
    return state._replace(state=inner), out


def probe(
    dense: Method,
    of_sparse: PrefillFn,
    state: Layer,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[Layer, Float[Array, "B Hq T D"]]:
    """Shows an instruction to a layer before it is read; a dense one forgets it."""
    if isinstance(state, Dense):
        return state, dense.prefill(state.state, q, k, v, lengths)[1]
    inner, out = of_sparse(state.state, q, k, v, lengths)
    return state._replace(state=inner), out


def unless_dense(of_sparse: FinishFn, state: Layer) -> Layer:
    """Does what the method wants of its layers; a dense one stays as it is."""
    if isinstance(state, Dense):
        return state
    return state._replace(state=of_sparse(state.state))


def rewind(
    of_dense: RewindFn,
    of_sparse: RewindFn,
    state: Layer,
    count: Int[Array, "B"],
    most: int,
) -> Layer:
    """Takes tokens back, by the method in charge of the layer."""
    in_charge = of_dense if isinstance(state, Dense) else of_sparse
    return state._replace(state=in_charge(state.state, count, most))
