"""Attention layers alone, on what they see in a model under its own, full attention.

One pass over the windows records queries, keys and values of every layer. Each method
then reads the same prompt and decodes the same steps, all layers and windows as rows of
one batch: a program of one layer, which compiles in a second.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax import dense
from kvjax.attention.selection import is_listed
from kvjax.decoding import loop
from kvjax.evaluation.claims.session import SEED, Session
from kvjax.evaluation.tasks import needles
from kvjax.interface import (
    CacheSpec,
    Diagnostics,
    LanguageModel,
    Traffic,
    layer_specs,
)
from kvjax.stores import buffers


class Inputs(NamedTuple):
    """Un-rotated, head-major; row ``layer * windows + window``."""

    q: Float[Array, "R Hq S D"]
    k: Float[Array, "R Hkv S D"]
    v: Float[Array, "R Hkv S D"]


class Truth(NamedTuple):
    """Attention over every token, at the steps: of the model itself."""

    weights: Float[Array, "R Hq steps S"]
    out: Float[Array, "R Hq steps D"]


class Sums(NamedTuple):
    """Sums of one step, or over steps; a row R is a layer of a window."""

    error: Float[Array, "R Hq"]  # relative L2 error of the attention output
    dropped: Float[Array, "R Hq"]  # weight of what is not attended to
    support: Float[Array, "R Hq"]  # share of the tokens with weight that are
    exact: Float[Array, "R Hq"]  # 1 where proved exact
    read: Float[Array, "R"]  # tokens attended to, over all lists
    refreshed: Float[Array, "R"]  # 1 where the whole cache was read


class Layers(NamedTuple):
    """The losses of L layers in W windows."""

    found: Sums  # means over steps, arrays of (L, W, Hq) or (L, W)
    traffic: Traffic  # of a step of one layer and one row, as the method says
    token_bytes: float  # keys and values of a token of one list

    @property
    def error(self) -> Float[np.ndarray, "W"]:
        """Relative L2 error of the outputs, mean over layers and heads."""
        return np.asarray(self.found.error.mean((0, 2)))

    @property
    def dropped(self) -> Float[np.ndarray, "W"]:
        """Attention mass on what was not read."""
        return np.asarray(self.found.dropped.mean((0, 2)))

    @property
    def bytes_read(self) -> Float[np.ndarray, "W"]:
        """Bytes of a layer's step: of what was attended to, and of what chooses it."""
        counted = np.asarray(self.found.read.mean(0))
        return counted * self.token_bytes + self.traffic.metadata


def inputs(session: Session, name: str) -> Inputs:
    """The inputs of a model's layers in the session's windows."""

    def record() -> Inputs:
        windows = _windows(session, name)
        return record_inputs(session.model(name), np.array(windows, np.int32))

    return session.remember(("layers", name), record)


def _windows(session: Session, name: str) -> list[list[int]]:
    sizes = session.sizes

    def cut() -> list[list[int]]:
        return needles.windows(
            session.model(name).tokenizer,
            session.text,
            context=sizes.layer_context,
            n=sizes.layer_windows,
            seed=SEED,
        )

    return session.remember(("layer windows", name), cut)


def record_inputs(model: LanguageModel, tokens: np.ndarray) -> Inputs:
    """Queries, keys and values of all layers, for rows of tokens `(W, S)`."""
    # A row at a time: attention of all of them at once may not fit.
    rows = [_record_inputs(model.decoder, model.params, row[None]) for row in tokens]
    layers = model.decoder.num_layers

    def joined(*parts):  # (L, ...) each, to (L * W, ...)
        stacked = np.stack([np.asarray(part) for part in parts], 1)
        return jnp.asarray(stacked.reshape(layers * len(parts), *stacked.shape[2:]))

    return jax.tree.map(joined, *rows)


@functools.partial(jax.jit, static_argnums=0)
def _record_inputs(decoder, params, tokens):
    full = dense.method()
    specs = layer_specs(decoder, *tokens.shape)
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)

    def prefill(state, q, k, v, lengths):
        return Inputs(q, k, v), full.prefill(state, q, k, v, lengths)[1]

    states = tuple(full.init(spec) for spec in specs)
    recording = full._replace(prefill=prefill)
    found, _ = decoder.prefill(params, states, tokens, lengths, recording)
    return Inputs(*(jnp.concatenate(x) for x in zip(*found, strict=True)))


def layer_spec(session: Session, name: str, windows: int | None = None) -> CacheSpec:
    """The spec of one layer whose rows are all layers of so many windows, or of all."""
    model, sizes = session.model(name), session.sizes
    rows = model.decoder.num_layers * (windows or sizes.layer_windows)
    return model.decoder.cache_spec(rows, sizes.layer_context, sizes.layer_steps)


def truth(session: Session, name: str) -> Truth:
    """The results of full attention at the steps of the session's windows."""

    def measure() -> Truth:
        return _truth(layer_spec(session, name), inputs(session, name))

    return session.remember(("truth", name), measure)


def run(session: Session, name: str, method: str) -> Layers:
    """A method's steps on the session's windows, beside full attention's."""

    def measure() -> Layers:
        sizes = session.sizes
        spec, parsed = layer_spec(session, name), session.method(method)
        sums = _sums(session, name, method)
        one = dataclasses.replace(spec, batch=1)
        token = buffers.kv_bytes(one, 1) / one.num_kv_heads
        return Layers(sums, parsed.traffic(one, sizes.layer_context - 1), float(token))

    return session.remember(("layers", name, method), measure)


def _sums(session: Session, name: str, method: str) -> Sums:
    """Means over steps of what a method loses, of all windows: (L, W, Hq) or (L, W)."""
    sizes, parsed = session.sizes, session.method(method)

    def split(x):  # (L * W, ...) to (L, W, ...)
        x = np.asarray(x) / sizes.layer_steps
        return x.reshape(session.model(name).decoder.num_layers, -1, *x.shape[1:])

    if sizes.batch is None:
        given, expected = inputs(session, name), truth(session, name)
        spec = layer_spec(session, name)
        return jax.tree.map(split, _decoded(parsed, spec, given, expected))

    def make(given: Inputs) -> list:
        spec = layer_spec(session, name, 1)
        sums = _decoded(parsed, spec, given, _truth(spec, given))
        return [_short(part[:, 0]) for part in jax.tree.map(split, sums)]

    found = _by_window(session, name, ("layers", name, method), make)
    parts: Any = (np.array(x).swapaxes(0, 1) for x in zip(*found, strict=True))
    return Sums(*parts)


def each_window(
    session: Session, name: str, key: tuple, make: Callable[[Inputs], Any]
) -> list[Any]:
    """Values of each window, JSON-ready, from the inputs of its layers, a row each."""
    if session.sizes.batch is not None:
        return _by_window(session, name, key, make)
    given, count = inputs(session, name), session.sizes.layer_windows
    return [
        make(jax.tree.map(lambda x, first=first: x[first::count], given))
        for first in range(count)
    ]


def _by_window(session: Session, name: str, key: tuple, make) -> list:
    """Values of the inputs of a window at a time: those of many may not fit."""
    sizes, model = session.sizes, session.model(name)

    def of_windows(first: int, last: int) -> list:
        rows = np.array(_windows(session, name)[first:last], np.int32)
        return [make(record_inputs(model, row[None])) for row in rows]

    key = *key, sizes.layer_context, sizes.layer_steps
    found = session.samples.values(key, sizes.layer_windows, of_windows, batch=1)
    loop.free(_record_inputs, _truth, _decoded, _entropies)
    return found


def _short(values: np.ndarray) -> list:
    """Values as lists, of as many digits as float32 has."""
    flat = [float(f"{x:.7g}") for x in np.ravel(values).tolist()]
    return np.array(flat).reshape(values.shape).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _truth(spec, given):
    full, state, ahead = _begun(dense.method(), spec, given)

    def step(state, x):
        q, k, v = (part[:, :, None] for part in x)
        state = full.append(state, k, v)
        weights = dense.weights(state, q)[:, :, 0]
        return state, Truth(weights, full.decode_step(state, q)[1][:, :, 0])

    _, found = jax.lax.scan(step, state, ahead)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), found)


def _begun(method, spec, given):
    """A method, its state at the prompt's end, and what the steps are fed, in turn."""
    if method.reread is not None:
        raise ValueError(
            f"{method} reads its prompt twice, and one reading was recorded: "
            "measure it by kvjax compare."
        )
    if method.hooks.settle is not None:
        raise ValueError(
            f"{method} decides over all layers, and one was recorded: measure it by "
            "kvjax compare."
        )
    before = given.k.shape[2] - spec.max_new_tokens
    prompt = [x[:, :, :before] for x in given]
    lengths = jnp.full((spec.batch,), before, jnp.int32)
    # Nobody asks what the prompt's tokens attend to: XLA drops it where it can.
    state = method.finish(method.prefill(method.init(spec), *prompt, lengths)[0])
    ahead = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, before:], 2, 0), given)
    return method, state, ahead


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decoded(method, spec, given, expected):
    method, state, ahead = _begun(method, spec, given)

    def step(carry, x):
        state, sums = carry
        (q, k, v), (weights, out) = x
        q, k, v = (part[:, :, None] for part in (q, k, v))
        state, actual, found = method.inspect_step(method.append(state, k, v), q)
        new = compared(weights, out, actual[:, :, 0], found)
        return (state, jax.tree.map(jnp.add, sums, new)), None

    truth = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), expected)
    heads = jnp.zeros(given.q.shape[:2], jnp.float32)
    sums = Sums(*[heads] * 4, *[heads[:, 0]] * 2)
    (_, sums), _ = jax.lax.scan(step, (state, sums), (ahead, truth))
    return sums


def compared(
    weights: Float[Array, "R Hq S"],
    expected: Float[Array, "R Hq D"],
    actual: Float[Array, "R Hq D"],
    found: Diagnostics,
) -> Sums:
    """One step beside full attention's weights and outputs; see :class:`Sums`."""
    seen = is_listed(found.attended, weights.shape[-1])
    seen = jnp.repeat(seen, weights.shape[1] // seen.shape[1], axis=1)
    has_weight = weights > 0
    kept = (has_weight & seen).sum(-1) / has_weight.sum(-1)
    gap = jnp.linalg.norm(actual - expected, axis=-1)
    scale = jnp.linalg.norm(expected, axis=-1)
    return Sums(
        error=gap / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny),
        dropped=jnp.where(seen, 0.0, weights).sum(-1),
        support=kept.astype(jnp.float32),
        exact=found.exact.astype(jnp.float32),
        read=(found.attended >= 0).sum((1, 2)).astype(jnp.float32),
        refreshed=found.refreshed.astype(jnp.float32),
    )


def entropies(
    session: Session, name: str, *, num_sinks: int, tail: int
) -> Float[np.ndarray, "L Hq"]:
    """Entropy of attention over the middle, over its logarithm: 1 is uniform.

    The middle is what a prompt has between its sinks and its tail; weights are
    renormalised there, and means over windows and steps taken.
    """
    sizes = session.sizes
    middle = num_sinks, sizes.layer_context - sizes.layer_steps - tail
    if sizes.batch is None:
        spec, given = layer_spec(session, name), inputs(session, name)
        found = np.asarray(_entropies(spec, middle, given))  # (L * W, Hq)
        return found.reshape(-1, sizes.layer_windows, found.shape[1]).mean(1)

    def make(given: Inputs) -> list:
        spec = layer_spec(session, name, 1)
        return _short(np.asarray(_entropies(spec, middle, given)))

    return np.mean(_by_window(session, name, ("entropy", name, *middle), make), axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _entropies(spec, middle, given):
    first, last = middle
    length, steps = given.k.shape[2], spec.max_new_tokens
    positions = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, (spec.batch, length))
    q = spec.rope(given.q[:, :, -steps:], positions[:, -steps:])
    k = spec.rope(given.k, positions)[:, :, first:last]
    grouped = q.reshape(q.shape[0], k.shape[1], spec.group, steps, q.shape[3])
    logits = spec.sm_scale * jnp.einsum("bkgtd,bksd->bkgts", grouped, k)
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    entropy = -(jnp.exp(logs) * logs).sum(-1) / np.log(last - first)
    return entropy.mean(-1).reshape(q.shape[:2])
