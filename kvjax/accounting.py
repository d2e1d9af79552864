"""The bytes a model reads and holds: each method's own `traffic`, over all layers."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax import parallel
from kvjax.interface import (
    CacheSpec,
    DecoderLM,
    Diagnostics,
    Method,
    State,
    Traffic,
    layer_specs,
)
from kvjax.stores.buffers import in_host, kv_bytes, num_bytes, row_bytes


def state_bytes(method: Method, spec: CacheSpec) -> int:
    """Returns the bytes one layer holds while decoding, every row, metadata too."""
    return num_bytes(jax.eval_shape(lambda: method.finish(method.init(spec))))


def prompt_bytes(method: Method, spec: CacheSpec) -> int:
    """Returns the bytes that one layer holds while the prompt is read, every row."""
    return num_bytes(jax.eval_shape(lambda: method.init(spec)))


class Held(NamedTuple):
    """Bytes of a state, by the memory that they lie in."""

    device: int
    host: int

    @property
    def total(self) -> int:
        return self.device + self.host


def held(
    method: Method, specs: Iterable[CacheSpec], mesh: parallel.AnyMesh | None = None
) -> list[tuple[Held, Held]]:
    """Returns what each layer holds while the prompt is read, and while decoding.

    Over a mesh, what each of its devices does. Memories are told from types, which are
    known where states are traced alone.
    """
    found = []

    def trace() -> None:
        for layer in specs:
            spec = layer if mesh is None else parallel.share_of(method, mesh, layer)
            prompt = method.init(spec)
            found.append((_by_memory(prompt), _by_memory(method.finish(prompt))))

    if mesh is None:
        jax.eval_shape(trace)
    else:
        parallel.shapes_of(mesh, trace)
    return found


def _by_memory(state: State) -> Held:
    hosted = num_bytes([leaf for leaf in jax.tree.leaves(state) if in_host(leaf)])
    return Held(num_bytes(state) - hosted, hosted)


def kept_spec(method: Method, spec: CacheSpec) -> CacheSpec:
    """Returns the spec that a layer's state carries while decoding: how rows are kept.

    That given, where the state carries none; the first, where parts of it differ.
    """

    def is_spec(leaf):
        return isinstance(leaf, CacheSpec)

    state = jax.eval_shape(lambda: method.finish(method.init(spec)))
    carried = filter(is_spec, jax.tree.leaves(state, is_leaf=is_spec))
    return next(carried, spec)


def token_bytes(method: Method, spec: CacheSpec) -> int:
    """Returns the bytes of a token's keys and values while decoding, of every KV head.

    In one row, as in pages, scales may take more room than in two.
    """

    def is_store(leaf):
        return hasattr(leaf, "ROWS")

    state = jax.eval_shape(lambda: method.finish(method.init(spec)))
    stores = filter(is_store, jax.tree.leaves(state, is_leaf=is_store))
    kept = kept_spec(method, spec)
    if any("both" in store.ROWS.values() for store in stores):
        return row_bytes(kept, 1, "both")
    return kv_bytes(kept, 1)


def bytes_held(
    method: Method, decoder: DecoderLM, capacity: int, max_new_tokens: int, batch=1
) -> int:
    """Returns the bytes that all layers hold while decoding, every row."""
    specs = layer_specs(decoder, batch, capacity, max_new_tokens)
    return sum(state_bytes(method, spec) for spec in specs)


def bytes_of_prompt(
    method: Method, decoder: DecoderLM, capacity: int, max_new_tokens: int, batch=1
) -> int:
    """Returns the bytes that all layers hold while the prompt is read, every row."""
    specs = layer_specs(decoder, batch, capacity, max_new_tokens)
    return sum(prompt_bytes(method, spec) for spec in specs)


@functools.cache
def check_diagnostics(method: Method, decoder: DecoderLM) -> None:
    """Refuses a method whose diagnostics cannot be counted, before anything is run.

    Bytes and fidelity are of the lists of `Diagnostics.attended`: a list is read by one
    KV head, or by one query head.

    Raises:
        ValueError: unless there are as many lists as KV heads, or as query heads.
    """
    spec = layer_specs(decoder, 1, decoder.context, method.rows)[0]
    rows = method.rows if spec.copies is None else spec.copies.count

    def step():
        def heads(count):
            return jnp.zeros((1, count, rows, spec.head_dim), spec.dtype)

        q, kv = heads(spec.num_q_heads), heads(spec.num_kv_heads)
        state = method.finish(method.init(spec))
        return method.inspect_step(method.append(state, kv, kv), q)[2]

    check_lists(jax.eval_shape(step), spec)


def check_lists(diagnostics: Diagnostics, spec: CacheSpec) -> None:
    """Raises ValueError unless lists are as many as KV heads, or as query heads."""
    shape, heads = diagnostics.attended.shape, (spec.num_kv_heads, spec.num_q_heads)
    if len(shape) != 3 or shape[1] not in heads:
        raise ValueError(
            f"Diagnostics.attended of shape {shape} must be (B, H, N) with a list for "
            f"each of {heads[0]} KV heads or for each of {heads[1]} query heads: else "
            "what is read is miscounted."
        )


# Tokens of a prompt, and generated ones: beyond every budget and window.
_MANY, _MORE = 1 << 24, 1 << 25


@functools.cache
def grows_with_prompt(method: Method, decoder: DecoderLM) -> bool:
    """Says whether any layer holds more the longer the prompt is, read or decoded."""
    return _held(method, decoder, _MANY, _MANY) != _held(method, decoder, _MORE, _MANY)


@functools.cache
def grows_with_generated(method: Method, decoder: DecoderLM) -> bool:
    """Says whether any layer holds more the more tokens are to be generated."""
    return _held(method, decoder, _MANY, _MANY) != _held(method, decoder, _MANY, _MORE)


def reads_any_length(method: Method, decoder: DecoderLM) -> bool:
    """Says whether prompts of any length fit, beyond the model's context too.

    Such a method holds no more for a longer prompt, and re-numbers positions.
    """
    return method.renumbers and not grows_with_prompt(method, decoder)


def is_endless(method: Method, decoder: DecoderLM) -> bool:
    """Says whether a text may grow for ever, read and generated, in the same memory."""
    reads = reads_any_length(method, decoder)
    return reads and not grows_with_generated(method, decoder)


def _held(method, decoder, prompt, generated) -> list[tuple[int, int]]:
    """Returns the bytes of each layer, while a prompt is read and afterwards."""
    specs = layer_specs(decoder, 1, prompt + generated, generated)
    return [(prompt_bytes(method, s), state_bytes(method, s)) for s in specs]


def traffic(
    method: Method, decoder: DecoderLM, length: int, max_new_tokens: int = 0
) -> Traffic:
    """Returns the bytes that all layers read for one token of a row of `length`.

    Over a mesh, those that each of its devices reads.
    """
    mesh = parallel.of(decoder)
    layers = layer_specs(decoder, 1, length, min(max_new_tokens, length))
    if mesh is not None:
        layers = [parallel.share_of(method, mesh, spec) for spec in layers]
    parts = [method.traffic(spec, length) for spec in layers]
    return Traffic(*map(sum, zip(*parts, strict=True)))


def prompt_pairs(method: Method, decoder: DecoderLM, length: int) -> int:
    """Returns the query-key pairs of a query head in a prompt, of all layers.

    All of them, of a method that does not count them (`hooks.work`).
    """
    every = length * (length + 1) // 2
    work, specs = method.hooks.work, layer_specs(decoder, 1, length)
    return sum(every if work is None else work(spec, length) for spec in specs)


def prompt_share(method: Method, decoder: DecoderLM, length: int) -> float:
    """Returns :func:`prompt_pairs` over those of attention to every token."""
    every = decoder.num_layers * (length * (length + 1) // 2)
    return prompt_pairs(method, decoder, length) / every


def bytes_read(
    method: Method, decoder: DecoderLM, length: int, max_new_tokens: int = 0
) -> int:
    """Returns the total of :func:`traffic`."""
    return traffic(method, decoder, length, max_new_tokens).total
