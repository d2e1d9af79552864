"""The one reader of prompts: chunks of few shapes, layer by layer.

A :class:`Reading` is a prompt that was read so far; :func:`ended`, a :class:`Prefilled`
is ready to decode. With a judge, the reader also says of each token how likely it was.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import copies, interface, parallel
from kvjax.decoding import ending, instructions, loop, timing
from kvjax.decoding.checks import (
    check_model,
    check_prompts,
    check_repeats,
    token_rows,
)
from kvjax.decoding.cutting import PAD as PAD
from kvjax.decoding.cutting import Chunk, bucket, chunks, cut, recent
from kvjax.decoding.cutting import chunk_tokens as chunk_tokens
from kvjax.decoding.ending import finish_layers as finish_layers
from kvjax.decoding.ending import seal_layers as seal_layers
from kvjax.decoding.options import Options
from kvjax.interface import (
    CacheSpec,
    DecoderLM,
    LanguageModel,
    LayerwiseLM,
    Method,
    Params,
    State,
    with_layer,
)
from kvjax.registry import as_method
from kvjax.stores import buffers
from kvjax.text import encoding
from kvjax.text.stream import CONTEXT

NO_TOKEN = -1  # where a row has none
POSITIONS = 64  # positions whose logits exist at once

# Of logits `(B, V)` and tokens `(B,)`: arrays of the tokens' shape.
Judge = Callable[[Array, Array], Any]


class Reading(NamedTuple):
    """The prompts of a batch in the caches, as far as they were read."""

    states: tuple[State, ...]  # one a layer, `finish` not yet applied
    hidden: Float[Array, "B E"]  # of each row's newest token; zeros before the first


class Prefilled(NamedTuple):
    """A prompt in the caches, ready to decode."""

    states: tuple[State, ...]  # one a layer, `finish` applied
    hidden: Float[Array, "B E"]  # of each row's last prompt token
    recent: Int[Array, "B R"]  # the newest `method.rows` tokens of each row
    # Those whose text the new one follows; `recent` if None.
    before: Int[np.ndarray, "B C"] | None = None
    # The layers that the states were made for; None if nobody says.
    specs: tuple[CacheSpec, ...] | None = None


def prefill(
    model: LanguageModel,
    method: Method | str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    chunk_size: int = 512,
    longest: int = 0,
    instruction: int | Sequence[int] | None = None,
) -> Prefilled:
    """Runs the prompts through the model, leaving room for `max_new_tokens` each.

    Prompts of up to `longest` tokens then share their compiled code, even in buckets.
    `instruction` is that of :func:`kvjax.decoding.generate.generate`.

    Raises:
        ValueError: as :func:`kvjax.decoding.generate.generate`.
    """
    method = as_method(method)
    check_model(model)
    prompts = token_rows(prompts)
    options = Options(
        max_new_tokens=max_new_tokens,
        chunk_size=chunk_size,
        longest=longest,
        instruction=instruction,
    )
    check_prompts(model, method, prompts, options.max_new_tokens)
    instructions.counts(method, prompts, options.instruction)
    return read_whole(model, method, prompts, options)


def read_whole(
    model: LanguageModel,
    method: Method,
    prompts: Sequence[Sequence[int]],
    options: Options,
) -> Prefilled:
    """Reads prompts that were checked, and ends them."""
    with timing.stretch("prompt") as part:
        reading, specs = read_unended(model, method, prompts, options)
        part.tokens = sum(map(len, prompts))
        longest = max(options.longest, *map(len, prompts))
        return ended(model, method, reading, prompts, specs, longest)


def read_unended(
    model: LanguageModel,
    method: Method,
    prompts: Sequence[Sequence[int]],
    options: Options,
) -> tuple[Reading, tuple[CacheSpec, ...]]:
    """Reads prompts that were checked once; returns the layers that have room too."""
    decoder, longest = model.decoder, max(options.longest, *map(len, prompts))
    sizes = len(prompts), longest, options.max_new_tokens
    reading = begin(decoder, method, *sizes)
    for now, _ in read_prompts(model, method, reading, prompts, options):
        reading = now
    return reading, layer_specs(decoder, *sizes)


def read_prompts(
    model: LanguageModel,
    method: Method,
    reading: Reading,
    prompts: Sequence[Sequence[int]],
    options: Options,
    judge: Judge | None = None,
) -> Iterator[tuple[Reading, Any]]:
    """Reads whole prompts as :func:`read_and_judge` does, chunk by chunk.

    With the calls between two chunks that `method.hooks.asked` wants.
    """
    asked, longest = method.hooks.asked, max(options.longest, *map(len, prompts))
    if asked is None:
        size, granule = options.chunk_size, method.hooks.granule
        parts = chunks(model.decoder, prompts, size, longest, granule)
        yield from read_and_judge(model, method, reading, parts, judge)
        return
    size = chunk_tokens(model.decoder, longest, options.chunk_size)
    told = instructions.counts(method, prompts, options.instruction)
    probing = method._replace(prefill=asked.probe)
    for act, part in instructions.acts(asked, prompts, told, size):
        if part is None:
            ending = method._replace(finish=getattr(asked, act))
            states = finish_layers(ending, reading.states)
            reading = reading._replace(states=states)
        elif act == "probe":
            probed = read(model, probing, reading, [part])
            reading = probed._replace(hidden=reading.hidden)
        else:
            for now, judged in read_and_judge(model, method, reading, [part], judge):
                reading = now
                yield now, judged


def begin(
    decoder: DecoderLM, method: Method, batch: int, longest: int, max_new_tokens: int
) -> Reading:
    """Returns prompts of up to `longest` tokens of which nothing was read yet."""
    states = empty_states(decoder, method, batch, longest, max_new_tokens)
    return Reading(states, no_hidden(decoder, batch))


def no_hidden(decoder: DecoderLM, batch: int) -> Float[Array, "B E"]:
    """Returns what stands for hidden states before the first token of a prompt."""
    hidden = jnp.zeros((batch, decoder.width), decoder.cache_spec(1, 1).dtype)
    return parallel.whole(parallel.of(decoder), hidden)


def empty_states(
    decoder: DecoderLM, method: Method, batch: int, longest: int, max_new_tokens: int
) -> tuple[State, ...]:
    """Returns states of every layer for prompts up to `longest`, in bucketed sizes.

    Raises:
        ValueError: if the model feeds copies of a token, and the method takes none.
    """
    check_repeats(decoder, method)
    specs = layer_specs(decoder, batch, longest, max_new_tokens)
    return _init(parallel.over(method, parallel.of(decoder)), specs)


def layer_specs(
    decoder: DecoderLM, batch: int, longest: int, max_new_tokens: int
) -> tuple[CacheSpec, ...]:
    """Returns the layers of prompts up to `longest`, in bucketed sizes."""
    new_tokens = bucket(max_new_tokens)
    capacity = bucket(longest + new_tokens)
    return interface.layer_specs(decoder, batch, capacity, new_tokens)


def shapes_held(
    decoder: DecoderLM,
    method: Method,
    batch: int,
    longest: int,
    max_new_tokens: int,
    is_finished: bool,
    is_sealed: bool = False,
) -> tuple[State, ...]:
    """Returns shapes of every layer's state, each in its memory of the default device.

    Of :func:`empty_states`, or sealed, or behind `finish`.
    """
    in_host = []

    def held() -> tuple[State, ...]:
        states = empty_states(decoder, method, batch, longest, max_new_tokens)
        states = seal_layers(method, states) if is_sealed else states
        states = finish_layers(method, states) if is_finished else states
        in_host.extend(map(buffers.in_host, jax.tree.leaves(states)))
        return states

    leaves, structure = jax.tree.flatten(jax.eval_shape(held))
    device = jnp.zeros(()).devices().pop()
    placed = []
    for leaf, is_host in zip(leaves, in_host, strict=True):
        kind = "pinned_host" if is_host else None
        place = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        placed.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))
    return jax.tree.unflatten(structure, placed)


def read(
    model: LanguageModel, method: Method, reading: Reading, parts: Iterable[Chunk]
) -> Reading:
    """Reads chunks of the prompts, one after the other; `reading` is used up."""
    for now, _ in read_and_judge(model, method, reading, parts, None):
        reading = now
    return reading


def read_and_judge(
    model: LanguageModel,
    method: Method,
    reading: Reading,
    parts: Iterable[Chunk],
    judge: Judge | None,
) -> Iterator[tuple[Reading, Any]]:
    """Reads chunks of the prompts and judges each token by the logits before it.

    Args:
        reading: of what comes before them; used up.
        judge: static: use one object for many calls; None judges nothing.

    Returns:
        An iterator of the reading behind each chunk, which the next one uses up, and
        what the judge said of the chunk's tokens: arrays `(B, T)` on the host, T the
        most that a row has in it. What it says of the first token of a prompt, and of
        none, is undefined.

    Raises:
        ValueError: if a model that feeds copies of a token is to judge a prompt, whose
            originals predict nothing.
    """
    if judge is not None:
        copies.refuse(copies.of(model.decoder), "scores of a prompt")
    run = program(judge)
    for tokens, lengths in parts:
        reading, judged = run(
            model.decoder, method, model.params, reading, tokens, lengths
        )
        reading = timing.settled(reading)
        longest = int(lengths.max())
        yield reading, jax.tree.map(lambda x, n=longest: np.asarray(x)[:, :n], judged)


@functools.cache
def program(judge: Judge | None) -> Any:
    """Returns a judge's `run(decoder, method, params, reading, tokens, lengths)`.

    It reads one right-padded chunk, whose rows have `lengths` tokens in it, uses
    `reading` up, and returns the :class:`Reading` behind it and what the judge says.
    The first chunk and those behind it run the same programs.
    """

    def run(decoder, method, params, reading, tokens, lengths):
        states, hidden = reading
        if isinstance(decoder, LayerwiseLM):
            states, hidden = _by_layer(decoder, method, params, states, tokens, lengths)
            end = _normalised(judge)
        else:
            states, hidden = _whole(decoder, method, params, states, tokens, lengths)
            end = _as_it_is(judge)
        newest, judged = end(decoder, params, hidden, reading.hidden, tokens, lengths)
        return Reading(states, newest), judged

    return run


def _by_layer(decoder, method, params, states, tokens, lengths):
    """Reads a chunk layer by layer, all by one program where their shapes agree."""
    method = parallel.over(method, parallel.of(decoder))
    states, x, handed = list(states), _embed(decoder, params, tokens, lengths), None
    for layer, own in enumerate(decoder.layer_params(params)):
        # Without the layer's number, which would make a program of its own.
        given, states[layer] = with_layer(states[layer], 0), None
        state, x, handed = _layer(decoder, method, own, given, x, lengths, handed)
        states[layer] = with_layer(state, layer)
    return tuple(states), x


@functools.partial(jax.jit, static_argnums=0)
def _embed(decoder, params, tokens, lengths):
    return decoder.embed(params, copies.called(copies.of(decoder), tokens, lengths))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _layer(decoder, method, layer_params, state, x, lengths, below):
    handed = below

    def attend(q, k, v):
        nonlocal state, handed
        state, out, handed = method.prefill_layer(state, q, k, v, lengths, below)
        return out

    x = decoder.run_layer(layer_params, x, attend)
    return state, x, handed


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _whole(decoder, method, params, states, tokens, lengths):
    method = parallel.over(method, parallel.of(decoder))
    return decoder.prefill(params, states, tokens, lengths, method)


@functools.cache
def _normalised(judge):
    """Returns :func:`end_chunk` of a judge, of what the last layer gives."""

    def end(decoder, params, x, newest, tokens, lengths):
        hidden = decoder.normalise(params, x)
        hidden = copies.of_tokens(copies.of(decoder), hidden, lengths)
        return end_chunk(judge, decoder, params, hidden, newest, tokens, lengths)

    return jax.jit(end, static_argnums=0)


@functools.cache
def _as_it_is(judge):
    """Returns :func:`end_chunk` of a judge as a program."""
    return jax.jit(functools.partial(end_chunk, judge), static_argnums=0)


def end_chunk(
    judge: Judge | None,
    decoder: DecoderLM,
    params: Params,
    hidden: Float[Array, "B T E"],
    newest: Float[Array, "B E"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B E"], Any]:
    """Returns the hidden states of each row's newest token, and what the judge says.

    Args:
        hidden: of the chunk.
        newest: of each row's newest token before the chunk.
    """
    judged = None
    if judge is not None:
        before = jnp.concatenate([newest[:, None], hidden[:, :-1]], axis=1)
        judged = by_position(decoder, judge, params, before, tokens)
    index = jnp.maximum(lengths - 1, 0)[:, None, None]
    last = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
    newest = jnp.where((lengths > 0)[:, None], last, newest)
    return parallel.everywhere(parallel.of(decoder), (newest, judged))


def by_position(
    decoder: Any,
    judge: Judge,
    params: Params,
    hidden: Float[Array, "B T E"],
    tokens: Int[Array, "B T"],
) -> Any:
    """Judges tokens by hidden states, some positions at a time: not all logits fit.

    Of the decoder it needs `logits` alone.
    """

    def one_position(at):  # (B, E), (B,)
        hidden, tokens = at
        return judge(decoder.logits(params, hidden), tokens)

    pairs = hidden.swapaxes(0, 1), tokens.T
    judged = jax.lax.map(one_position, pairs, batch_size=POSITIONS)
    return jax.tree.map(jnp.transpose, judged)


def reread(
    model: LanguageModel,
    method: Method,
    reading: Reading,
    prompts: Sequence[Sequence[int]],
    longest: int = 0,
) -> Reading:
    """Reads whole prompts once more if the method asks for it; `reading` is used up.

    The tokens of `method.reread.words` come before each chunk. A row's chunks begin
    where they would if it were alone; one whose prompt has ended has no tokens.
    """
    again = method.reread
    if again is None:
        return reading
    words = encoding.inside(model.tokenizer.encode, again.words)
    # Prompts of up to `longest` tokens share their programs.
    size = min(again.chunk, bucket(max(longest, *map(len, prompts))))
    second = method._replace(prefill=again.prefill, hooks=interface.Hooks())
    parts = (_behind(words, chunk) for chunk in cut(prompts, size))
    return read(model, second, reading, parts)._replace(hidden=reading.hidden)


def _behind(words: Sequence[int], chunk: Chunk) -> Chunk:
    """Returns the chunk with the words before it, in rows that have tokens in it."""
    tokens, lengths = chunk
    before = np.broadcast_to(np.asarray(words, np.int32), (len(tokens), len(words)))
    lengths = np.where(lengths > 0, lengths + len(words), 0)
    return np.concatenate([before, tokens], axis=1), lengths.astype(np.int32)


def ended(
    model: LanguageModel,
    method: Method,
    reading: Reading,
    prompts: Sequence[Sequence[int]],
    specs: tuple[CacheSpec, ...] | None = None,
    longest: int = 0,
) -> Prefilled:
    """Ends prompts that were read; `reading` is used up.

    With a method that reads them again, prompts of up to `longest` tokens share their
    compiled code.
    """
    finished = finish(model, method, reading, prompts, longest)
    return ready(method, timing.settled(finished), prompts, specs)


def ready(
    method: Method,
    finished: Reading,
    prompts: Sequence[Sequence[int]],
    specs: tuple[CacheSpec, ...] | None = None,
) -> Prefilled:
    """Makes prompts whose states are finished ready to decode."""
    newest = jnp.asarray(recent(prompts, method.rows))
    newest = parallel.beside(finished.hidden, newest)
    before = recent(prompts, CONTEXT, NO_TOKEN)
    return Prefilled(finished.states, finished.hidden, newest, before, specs)


def finish(
    model: LanguageModel,
    method: Method,
    reading: Reading,
    prompts: Sequence[Sequence[int]],
    longest: int = 0,
) -> Reading:
    """Returns the prompts with states that are finished.

    A method that reads them again does so before, and uses `reading` up.
    """
    reading = reread(model, method, reading, prompts, longest)
    return reading._replace(states=finish_layers(method, reading.states))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(method, specs):
    return tuple(map(method.init, specs))


def programs(judge: Judge | None = None) -> tuple[Any, ...]:
    """Returns what is compiled to read prompts and judge them so, of every method."""
    ends = _normalised(judge), _as_it_is(judge)
    return (_init, _embed, _layer, _whole, *ends, *ending.programs())


def drop_programs(judge: Judge | None = None) -> None:
    """Frees the programs of a judge, of every method."""
    loop.free(*programs(judge))
