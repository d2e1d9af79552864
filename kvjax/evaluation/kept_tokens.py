"""The tokens that a method attends to at each step of a text."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax.decoding import reader
from kvjax.decoding.checks import check_reread, check_vocabulary
from kvjax.interface import LanguageModel, Method


class Kept(NamedTuple):
    """Positions that one KV head attends to, moment by moment."""

    name: str  # of the method
    times: list[int]  # tokens seen, the newest included
    positions: list[Int[np.ndarray, "N"]]  # ascending, one list a moment
    layer: int
    head: int


def kept(
    model: LanguageModel,
    method: Method,
    tokens: Sequence[int],
    *,
    every: int,
    name: str = "",
    layer: int = -1,
    head: int = 0,
) -> Kept:
    """Reads a text and asks, every so many tokens, what a decode step attends to.

    Args:
        model: decoder, weights and tokenizer.
        method: any; its state at each moment is as if the prompt ended there.
        tokens: of the text, at least `every`.
        every: tokens from one moment to the next.
        name: of the method, for the picture.
        layer: negative counts from the last.
        head: KV head, or the first query head that reads it.

    Raises:
        ValueError: if `every` is not in [1, tokens], or there is no such layer or head.
    """
    decoder, params = model.decoder, model.params
    check_vocabulary(decoder, [tokens])
    if not 1 <= every <= len(tokens):
        raise ValueError(f"{every=} must be in [1, {len(tokens)}], the text's tokens.")
    check_reread(model, method, [len(tokens) // every * every - 1])
    spec = decoder.cache_spec(1, 1)
    if not -decoder.num_layers <= layer < decoder.num_layers:
        raise ValueError(f"{layer=}: the model has {decoder.num_layers} layers.")
    if not 0 <= head < spec.num_kv_heads:
        raise ValueError(f"{head=}: the model has {spec.num_kv_heads} KV heads.")

    @jax.jit
    def probe(params, states, token):
        attended = []

        def inspect_step(state, q):
            state, out, diagnostics = method.inspect_step(state, q)
            attended.append(diagnostics.attended)
            return state, out, diagnostics

        recorder = method._replace(inspect_step=inspect_step)
        decoder.decode_step(params, states, token, recorder)
        return attended[layer]

    reading = reader.begin(decoder, method, 1, len(tokens), 1)
    times, positions = [], []
    # The newest token of a moment is asked by a decode step, and read afterwards.
    for start in range(0, len(tokens) // every * every, every):
        before, newest = np.zeros((2, 1, every), np.int32)
        before[0] = tokens[start : start + every]
        newest[0, 0] = before[0, -1]
        reading = reader.read(model, method, reading, [(before, _count(every - 1))])
        # More is read afterwards, and a second reading uses up what it reads.
        begun = reading
        if method.reread is not None:
            begun = jax.tree.map(jnp.copy, reading)
        read = tokens[: start + every - 1]
        ended = reader.finish(model, method, begun, [read], len(tokens)).states
        window = np.full((1, method.rows), newest[0, 0], np.int32)
        attended = np.asarray(probe(params, ended, window))[0]
        reading = reader.read(model, method, reading, [(newest, _count(1))])
        attended = attended[head * attended.shape[0] // spec.num_kv_heads]
        times.append(start + every)
        positions.append(np.unique(attended[attended >= 0]))
    return Kept(name, times, positions, layer % decoder.num_layers, head)


def _count(tokens: int) -> Int[np.ndarray, "1"]:
    return np.array([tokens], np.int32)
