"""The one loop of decode steps: several on the device, states in place.

What becomes of the logits of each step is a :class:`Rule`: a sampled token and its
checks (:mod:`kvjax.decoding.generate`), a given token and how likely it was
(:mod:`kvjax.decoding.scoring`, :mod:`kvjax.decoding.feeding`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import parallel
from kvjax.interface import DecoderLM, Method, Params, State


class Rule(NamedTuple):
    """The use a step makes of its logits; static: one object for many calls.

    Fields:
        choose: `choose(logits, index, memory, given) -> (tokens, memory, out)`: of
            logits `(B, V)` the tokens `(B,)` that are fed next, what to remember until
            the next step, and what to keep of this one. `index` counts the steps of
            a call; `memory` and `given` are the caller's.
        is_over: `is_over(memory) -> ()`: whether to end before the limit.
        watch: `watch(before, after) -> arrays` to keep of a step's states.
    """

    choose: Callable[..., tuple[Array, Any, Any]]
    is_over: Callable[[Any], Array] | None = None
    watch: Callable[[tuple[State, ...], tuple[State, ...]], Any] | None = None


class Steps(NamedTuple):
    """The outcome of some decode steps."""

    states: tuple[State, ...]
    window: Int[Array, "B R"]  # the newest tokens of each row; the last is not fed yet
    memory: Any
    kept: Any  # of every step what `choose` keeps and what `watch` does, `(size, ...)`
    taken: Int[Array, ""]  # how many of them


def pushed(window: Int[Array, "B R"], tokens: Int[Array, "B"]) -> Int[Array, "B R"]:
    """Returns the window one token later."""
    return jnp.concatenate([window[:, 1:], tokens[:, None]], axis=1)


def choose_first(
    rule: Rule,
    decoder: DecoderLM,
    params: Params,
    hidden: Float[Array, "B E"],
    window: Int[Array, "B R"],
    memory: Any,
    given: Any,
) -> tuple[Int[Array, "B R"], Any, Any]:
    """Chooses the tokens that follow a prompt, by its hidden states.

    Returns the window with them in, the memory, and what `choose` keeps.
    """
    logits = decoder.logits(params, hidden)
    tokens, memory, out = rule.choose(logits, jnp.int32(0), memory, given)
    begun = pushed(window, tokens), memory, out
    return parallel.everywhere(parallel.of(decoder), begun)


def take_steps(
    rule: Rule,
    decoder: DecoderLM,
    method: Method,
    size: int,
    params: Params,
    states: tuple[State, ...],
    window: Int[Array, "B R"],
    memory: Any,
    given: Any,
    limit: Int[Array, ""],
) -> Steps:
    """Takes up to `limit <= size` steps, each on the tokens that the last one chose."""
    mesh = parallel.of(decoder)
    method = parallel.over(method, mesh)
    batch, spec = window.shape[0], decoder.cache_spec(1, 1)
    hidden = jax.ShapeDtypeStruct((batch, decoder.width), spec.dtype)

    def watched(before, after):
        if rule.watch is None:
            return ()
        return rule.watch(parallel.inside(before), parallel.inside(after))

    def look(hidden, before, after):
        """Returns what a step keeps: for its shapes the model is not traced again."""
        logits = decoder.logits(params, hidden)
        out = rule.choose(logits, jnp.int32(0), memory, given)[2]
        return out, watched(before, after)

    shapes = jax.eval_shape(look, hidden, states, states)
    kept = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)

    def running(carry: Steps):
        goes_on = carry.taken < limit
        if rule.is_over is not None:
            goes_on &= ~rule.is_over(carry.memory)
        return goes_on

    def step(carry: Steps):
        states, hidden = decoder.decode_step(params, carry.states, carry.window, method)
        logits = decoder.logits(params, hidden[:, -1])
        tokens, memory, out = rule.choose(logits, carry.taken, carry.memory, given)
        seen = watched(carry.states, states)
        kept = jax.tree.map(
            lambda x, new: x.at[carry.taken].set(new), carry.kept, (out, seen)
        )
        rest = pushed(carry.window, tokens), memory, kept, carry.taken + 1
        return Steps(states, *parallel.everywhere(mesh, rest))

    begun = Steps(states, window, memory, kept, jnp.int32(0))
    taken = jax.lax.while_loop(running, step, begun)
    # As it was given, for the next call to run the same program.
    rest = parallel.everywhere(mesh, tuple(taken)[1:])
    return Steps(parallel.in_parts(taken.states), *rest)


@functools.cache
def first(rule: Rule) -> Any:
    """Returns :func:`choose_first` of a rule as a program."""
    return jax.jit(functools.partial(choose_first, rule), static_argnums=0)


@functools.cache
def steps(rule: Rule) -> Any:
    """Returns :func:`take_steps` of a rule as a program that uses its states up."""
    run = functools.partial(take_steps, rule)
    return jax.jit(run, static_argnums=(0, 1, 2), donate_argnums=4)


def drop_programs(rule: Rule) -> None:
    """Frees what was compiled of a rule, for every method."""
    free(first(rule), steps(rule))


def free(*programs: Any) -> None:
    """Frees what was compiled of jitted functions."""
    for program in programs:
        program.clear_cache()


def _next_given(logits, index, memory, given):
    del logits
    return given[:, index], memory, ()


# Feeds given tokens `(B, size)`, for what methods record in their states, or a watch.
GIVEN = Rule(_next_given)
