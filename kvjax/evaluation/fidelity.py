"""How close a method stays to a reference, on the very same tokens.

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

from kvjax.interface import DecoderLM, Method, Params, State


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
    # A row at a time: float64 copies of all logits at once may not fit.
    rows = zip(reference, candidate, strict=True)
    kl = np.stack([_kl(*row) for row in rows])
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
    """State of :func:`side_by_side`, one layer."""

    reference: State
    candidate: State
    error: Float[Array, "B Hq"]  # sum over steps of the relative L2 error
    mass: Float[Array, "B Hq"]  # sum over steps of exp(lse_candidate - lse_reference)
    steps: Int[Array, "B"]


@functools.cache
def side_by_side(reference: Method, candidate: Method) -> Method:
    """Runs two methods on the same q, k, v and adds up how far they are apart.

    The model goes on with the reference's output. The relative L2 error of a step is
    ``|candidate - reference| / |reference|`` over the head's D elements; the recovered
    mass is the share of the reference's softmax denominator the candidate attends to
    (it may exceed 1 for a method that re-numbers positions; NaN for entmax attention).

    Args:
        reference: usually :func:`kvjax.full`.
        candidate: the method to look at.

    Returns:
        A :class:`kvjax.Method` over :class:`SideBySideState`.

    Raises:
        ValueError: if the two have a different number of query rows per step.
    """
    if reference.rows != candidate.rows:
        raise ValueError(
            f"reference rows={reference.rows} and candidate rows={candidate.rows} must "
            "be equal to run side by side."
        )

    def init(spec, weights=None):
        zeros = jnp.zeros((spec.batch, spec.num_q_heads), jnp.float32)
        # Entmax has no denominator to share: its `lse` tells no mass.
        mass = zeros if spec.alpha == 1 else jnp.full_like(zeros, jnp.nan)
        return SideBySideState(
            reference.init(spec),
            candidate.init(spec, weights),
            error=zeros,
            mass=mass,
            steps=jnp.zeros((spec.batch,), jnp.int32),
        )

    def prefill(state, q, k, v, lengths):
        first, out = reference.prefill(state.reference, q, k, v, lengths)
        second, _ = candidate.prefill(state.candidate, q, k, v, lengths)
        return state._replace(reference=first, candidate=second), out

    def finish(state):
        return state._replace(
            reference=reference.finish(state.reference),
            candidate=candidate.finish(state.candidate),
        )

    def append(state, k, v, lengths=None):
        return state._replace(
            reference=reference.append(state.reference, k, v),
            candidate=candidate.append(state.candidate, k, v),
        )

    def inspect_step(state, q):
        first, expected, seen = reference.inspect_step(state.reference, q)
        second, actual, found = candidate.inspect_step(state.candidate, q)
        wide = expected.astype(jnp.float32)
        gap = jnp.linalg.norm(actual.astype(jnp.float32) - wide, axis=-1)
        scale = jnp.linalg.norm(wide, axis=-1)
        relative = gap / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
        state = SideBySideState(
            first,
            second,
            error=state.error + relative.mean(-1),
            mass=state.mass + jnp.exp(found.lse - seen.lse).mean(-1),
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
    )


class LayerFidelity(NamedTuple):
    """Means over the decoded tokens, a layer at a time."""

    error: Float[np.ndarray, "L B Hq"]  # relative L2 error of the attention output
    mass: Float[np.ndarray, "L B Hq"]  # share of its softmax mass; NaN for entmax


def layers(states: tuple[State, ...]) -> LayerFidelity:
    """Reads the accumulators of :func:`side_by_side` out of a model's states."""

    def mean(name):
        totals = [
            getattr(s, name) / s.steps[:, None].astype(jnp.float32) for s in states
        ]
        return np.stack([np.asarray(total) for total in totals])

    return LayerFidelity(error=mean("error"), mass=mean("mass"))


@functools.partial(jax.jit, static_argnames=("decoder", "method"), donate_argnums=(3,))
def teacher_forced(
    decoder: DecoderLM,
    method: Method,
    params: Params,
    states: tuple[State, ...],
    tokens: Int[Array, "B T"],
) -> tuple[State, ...]:
    """Decodes given tokens and returns the states: for methods that keep a record.

    `states` are those of a prompt, after `finish`; `tokens` are what comes next.
    """

    def step(states, token):
        return decoder.decode_step(params, states, token[:, None], method)[0], None

    return jax.lax.scan(step, states, tokens.T)[0]
