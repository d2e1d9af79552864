"""The end of prompts, and their sealing: layer by layer, then over all layers."""

import functools
from typing import Any

import jax

from kvjax import parallel
from kvjax.interface import Method, State, with_layer


def finish_layers(method: Method, states: tuple[State, ...]) -> tuple[State, ...]:
    """Ends prompts that were read as often as the method asks for.

    Layer by layer: at most one layer is held in both shapes. Then the method decides
    what it does over all layers, if anything.
    """
    finished = list(states)
    for layer in range(len(finished)):
        finished[layer] = finish_layer(method, finished[layer], layer)
    return settled(method, tuple(finished))


def finish_layer(method: Method, state: State, layer: int) -> State:
    """Ends the prompts in one layer, which is not settled yet."""
    # Without the layer's number one program serves all. Not donated: shapes may
    # change, and a buffer passed through is not copied.
    method = parallel.of_state(method, state)
    return with_layer(_finish(method, with_layer(state, 0)), layer)


def settled(method: Method, states: tuple[State, ...]) -> tuple[State, ...]:
    """Lets the method decide what it does over all layers of ended prompts."""
    if method.hooks.settle is None:
        return states
    return _settle(parallel.of_state(method, states[0]), states)


def seal_layers(method: Method, states: tuple[State, ...]) -> tuple[State, ...]:
    """Makes of prompts what the method can make once for all that comes behind them."""
    if method.hooks.seal is None:
        return states
    sealed = list(states)
    for layer in range(len(sealed)):
        one = parallel.of_state(method, sealed[layer])
        state = _seal(one, with_layer(sealed[layer], 0))
        sealed[layer] = with_layer(state, layer)
    return tuple(sealed)


@functools.partial(jax.jit, static_argnums=0)
def _finish(method, state):
    return method.finish(state)


@functools.partial(jax.jit, static_argnums=0)
def _settle(method, states):
    return method.hooks.settle(states)


@functools.partial(jax.jit, static_argnums=0)
def _seal(method, state):
    return method.hooks.seal(state)


def programs() -> tuple[Any, ...]:
    """Returns what is compiled to end prompts, of every method."""
    return _finish, _settle, _seal
