"""The distance of a method from a reference, on the very same tokens.

At the end of the model: how often the likeliest token is the same, and how far the
distribution moved. In each layer: the error of the attention output, with every layer
fed the reference's input, so that no layer answers for another's error.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import accounting, copies, dense
from kvjax.attention.selection import is_listed
from kvjax.decoding import loop
from kvjax.interface import DecoderLM, Hooks, Method, Params, State
from kvjax.stores import contiguous, offloaded


class Agreement(NamedTuple):
    """Two predictions of the same tokens, compared position by position."""

    top1: Float[np.ndarray, "B T"]  # 1 where both put the same token first
    kl: Float[np.ndarray, "B T"]  # KL(reference || candidate), nats


def agreement(
    reference: Float[np.ndarray, "B T V"], candidate: Float[np.ndarray, "_ _ _"]
) -> Agreement:
    """Compares two models' logits of the same tokens.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"logits of shape {reference.shape} and {candidate.shape} do not compare."
        )
    same = reference.argmax(-1) == candidate.argmax(-1)
    kl = np.empty(same.shape, np.float64)
    # A token at a time: float64 copies of all logits at once may not fit.
    for place in np.ndindex(*same.shape):
        kl[place] = _kl(reference[place], candidate[place])
    return Agreement(same.astype(np.float64), kl)


def _kl(reference, candidate):
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    p = np.exp(log_p)
    # A token of probability 0 adds 0, also where its logit is -inf.
    gap = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)
    return np.maximum((p * gap).sum(-1), 0.0)


def _log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class SideBySideState(NamedTuple):
    """State of :func:`side_by_side`, one layer: sums over the steps so far."""

    reference: State
    candidate: State
    error: Float[Array, "B Hq"]  # relative L2 error of the output
    dropped: Float[Array, "B Hq"]  # of the reference's weights, where not attended to
    support: Float[Array, "B Hq"]  # share of the tokens with weight that are
    exact: Float[Array, "B Hq"]  # steps that are proved exact
    read: Float[Array, "B"]  # tokens attended to, over all lists
    refreshed: Float[Array, "B"]  # steps that read the whole cache
    steps: Int[Array, "B"]


@functools.cache
def in_steps_of(reference: Method, rows: int) -> Method:
    """The reference, in decode steps of as many query rows as a candidate's.

    Raises:
        ValueError: if the reference has several rows, and another number of them.
    """
    if rows != reference.rows == 1:
        reference = dense.windowed(reference, rows)
    if reference.rows != rows:
        raise ValueError(
            f"reference rows={reference.rows} and candidate rows={rows} must be equal "
            "to run side by side."
        )
    return reference


def joined(
    reference: State, candidate: State, batch: int, num_q_heads: int
) -> SideBySideState:
    """The state of :func:`side_by_side` of one layer before its first step."""
    sums = [jnp.zeros((batch, num_q_heads), jnp.float32) for _ in range(4)]
    return SideBySideState(
        reference,
        candidate,
        *sums,
        read=jnp.zeros((batch,), jnp.float32),
        refreshed=jnp.zeros((batch,), jnp.float32),
        steps=jnp.zeros((batch,), jnp.int32),
    )


@functools.cache
def side_by_side(reference: Method, candidate: Method) -> Method:
    """Runs two methods on the same q, k, v and adds up how far they are apart.

    The model goes on with the reference's output. The relative L2 error of a step is
    ``|candidate - reference| / |reference|`` over the head's D elements. The dropped
    mass is what the reference, which sees every token, weighs the tokens with that the
    candidate does not attend to; the support retained is the share of those with any
    weight that it does attend to. Under softmax every token has weight. Of a step of
    several rows the newest token's is judged.

    Args:
        reference: attends to everything: :func:`kvjax.full` or
            :func:`kvjax.entmax_full`.
        candidate: the method to look at. Nobody tells it where a question begins.

    Returns:
        A :class:`kvjax.Method` over :class:`SideBySideState`.

    Raises:
        ValueError: if the reference has more query rows per step than one, and not as
            many as the candidate; from `init`, if the reference does not keep every
            token in one store; from its steps, if the candidate's lists are neither
            one a KV head nor one a query head.
    """
    reference = in_steps_of(reference, candidate.rows)

    def init(spec, weights=None):
        copies.refuse(spec.copies, "methods side by side")
        first = reference.init(spec)
        if not isinstance(_store(first), contiguous.Contiguous):
            raise ValueError(
                f"a reference with state {type(first).__name__} does not keep every "
                "token in one store, whose weights are the truth: use full."
            )
        second = candidate.init(spec, weights)
        return joined(first, second, spec.batch, spec.num_q_heads)

    def prefill(state, q, k, v, lengths):
        first, out = reference.prefill(state.reference, q, k, v, lengths)
        second, *_ = candidate.prefill_layer(state.candidate, q, k, v, lengths)
        return state._replace(reference=first, candidate=second), out

    again = candidate.reread

    def read_again(state, q, k, v, lengths):
        if again is None:
            raise ValueError("the candidate reads no prompt again.")
        second, out = again.prefill(state.candidate, q, k, v, lengths)
        return state._replace(candidate=second), out

    def finish(state):
        return state._replace(
            reference=reference.finish(state.reference),
            candidate=candidate.finish(state.candidate),
        )

    over_all = candidate.hooks.settle

    def settle(states):
        if over_all is None:
            return states
        settled = over_all(tuple(state.candidate for state in states))
        return tuple(
            state._replace(candidate=own)
            for state, own in zip(states, settled, strict=True)
        )

    def append(state, k, v, lengths=None):
        return state._replace(
            reference=reference.append(state.reference, k, v),
            candidate=candidate.append(state.candidate, k, v),
        )

    def inspect_step(state, q):
        truth = dense.weights(_store(state.reference), q[:, :, -1:])
        first, expected, _ = reference.inspect_step(state.reference, q)
        second, actual, found = candidate.inspect_step(state.candidate, q)
        accounting.check_lists(found, _store(state.reference).spec)
        wide = expected[:, :, -1:].astype(jnp.float32)
        newest = actual[:, :, -1:].astype(jnp.float32)
        gap = jnp.linalg.norm(newest - wide, axis=-1)
        scale = jnp.linalg.norm(wide, axis=-1)
        relative = gap / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)

        seen = is_listed(found.attended, truth.shape[-1])
        seen = jnp.repeat(seen, q.shape[1] // seen.shape[1], axis=1)[:, :, None]
        has_weight = truth > 0
        kept = (has_weight & seen).sum(-1) / has_weight.sum(-1)
        state = SideBySideState(
            first,
            second,
            error=state.error + relative.mean(-1),
            dropped=state.dropped + jnp.where(seen, 0.0, truth).sum(-1).mean(-1),
            support=state.support + kept.astype(jnp.float32).mean(-1),
            exact=state.exact + found.exact.astype(jnp.float32),
            read=state.read + (found.attended >= 0).sum((1, 2)).astype(jnp.float32),
            refreshed=state.refreshed + found.refreshed.astype(jnp.float32),
            steps=state.steps + 1,
        )
        return state, expected, found

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=candidate.traffic,
        rows=candidate.rows,
        reread=again and again._replace(prefill=read_again),
        hooks=Hooks(settle=over_all and settle),
        repeats=candidate.repeats,
    )


def _store(state):
    return state.store if isinstance(state, dense.Windowed) else state


class LayerFidelity(NamedTuple):
    """Means over the decoded tokens, a layer at a time."""

    error: Float[np.ndarray, "L B Hq"]  # relative L2 error of the attention output
    dropped: Float[np.ndarray, "L B Hq"]  # attention mass on what was not attended to
    support: Float[np.ndarray, "L B Hq"]  # share of the tokens with weight that was
    exact: Float[np.ndarray, "L B Hq"]  # share of steps proved exact
    read: Float[np.ndarray, "L B"]  # tokens attended to, over all lists
    refreshed: Float[np.ndarray, "L B"]  # share of steps that read the whole cache
    asked: Float[np.ndarray, "L B"]  # bytes of a host's memory that a step lists
    moved: Float[np.ndarray, "L B"]  # those of them that the device did not have


SUMS = ("error", "dropped", "support", "exact", "read", "refreshed")


def layers(states: tuple[State, ...]) -> LayerFidelity:
    """Reads the accumulators of :func:`side_by_side` out of a model's states."""

    def mean(name):
        def of_state(state):
            total = np.asarray(getattr(state, name))
            steps = np.asarray(state.steps, np.float32)
            return total / steps.reshape(-1, *[1] * (total.ndim - 1))

        return np.stack([of_state(state) for state in states])

    def counted(name):
        def of_state(state):
            found = offloaded.crossed(state.candidate)
            steps = np.asarray(state.steps, np.float64)
            return 0.0 * steps if found is None else getattr(found, name) / steps

        return np.stack([of_state(state) for state in states])

    sums = {name: mean(name) for name in SUMS}
    return LayerFidelity(**sums, asked=counted("asked"), moved=counted("moved"))


def teacher_forced(
    decoder: DecoderLM,
    method: Method,
    params: Params,
    states: tuple[State, ...],
    tokens: Int[Array | np.ndarray, "B T"],
    recent: Int[Array | np.ndarray, "B R"] | None = None,
) -> tuple[State, ...]:
    """Decodes given tokens and returns the states: for methods that keep a record.

    `states` are those of a prompt, after `finish`, and used up; `recent` its newest
    `method.rows` tokens, which methods of one row do not need; `tokens` are what comes
    next.

    Raises:
        ValueError: if the method has several rows and there is no `recent`.
    """
    if recent is None:
        if method.rows > 1:
            raise ValueError(f"{method.rows=} needs the newest tokens: give recent.")
        recent = np.zeros((len(tokens), 1), np.int32)
    return _fed(loop.GIVEN, decoder, method, params, states, tokens, recent).states


def _fed(rule, decoder, method, params, states, tokens, recent) -> loop.Steps:
    """Feeds given tokens behind a prompt; the states are used up."""
    tokens, size = jnp.asarray(tokens), tokens.shape[1]
    window = loop.pushed(jnp.asarray(recent), tokens[:, 0])
    ahead = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    run, limit = loop.steps(rule), jnp.int32(size)
    return run(decoder, method, size, params, states, window, None, ahead, limit)


class Steps(NamedTuple):
    """The inputs of a layer's decode steps, T of them, in turn."""

    q: Float[Array, "T B Hq R D"]
    k: Float[Array, "T B Hkv R D"]
    v: Float[Array, "T B Hkv R D"]


class Recorded(NamedTuple):
    """A layer's state, and the inputs of its newest step."""

    state: State
    q: Float[Array, "B Hq R D"]
    k: Float[Array, "B Hkv R D"]
    v: Float[Array, "B Hkv R D"]


@functools.cache
def _recording(method: Method) -> Method:
    """The method over :class:`Recorded` states, for decode steps."""

    def append(state, k, v):
        return state._replace(state=method.append(state.state, k, v), k=k, v=v)

    def inspect_step(state, q):
        inner, out, found = method.inspect_step(state.state, q)
        return state._replace(state=inner, q=q), out, found

    return method._replace(append=append, inspect_step=inspect_step)


def _newest(before: tuple[State, ...], after: tuple[State, ...]) -> tuple[Steps, ...]:
    del before
    return tuple(Steps(layer.q, layer.k, layer.v) for layer in after)


_RECORDED = loop.GIVEN._replace(watch=_newest)


def record_steps(
    decoder: DecoderLM,
    method: Method,
    params: Params,
    states: tuple[State, ...],
    tokens: Int[Array | np.ndarray, "B T"],
    recent: Int[Array | np.ndarray, "B R"],
) -> tuple[Steps, ...]:
    """Decodes given tokens and returns what each layer was given.

    Arguments as of :func:`teacher_forced`; the states stay as they are.
    """
    spec = decoder.cache_spec(1, 1)

    def nothing(heads):
        return jnp.zeros((len(tokens), heads, method.rows, spec.head_dim), spec.dtype)

    begun = tuple(
        Recorded(
            jax.tree.map(jnp.copy, state),
            nothing(spec.num_q_heads),
            nothing(spec.num_kv_heads),
            nothing(spec.num_kv_heads),
        )
        for state in states
    )
    recorder = _recording(method)
    taken = _fed(_RECORDED, decoder, recorder, params, begun, tokens, recent)
    return taken.kept[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run_layer(method: Method, state: State, steps: Steps) -> State:
    """Takes one layer through its steps; a program for all layers of equal specs."""

    def step(state, given):
        q, k, v = given
        return method.inspect_step(method.append(state, k, v), q)[0], None

    return jax.lax.scan(step, state, steps)[0]


def drop_programs() -> None:
    """Frees what was compiled to compare layers, of every method."""
    for rule in (loop.GIVEN, _RECORDED):
        loop.drop_programs(rule)
    loop.free(run_layer)
