"""Questions asked of prompts that were read and ended: one reading for many of them.

The tokens of a question go through decode steps, as if they had been generated: a
method keeps or evicts them as it does those. Nothing of the prompt is read again, so
what a question costs does not depend on how the prompt was read.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.decoding import generate, reader
from kvjax.decoding.checks import check_model, check_vocabulary, token_rows
from kvjax.decoding.generate import Forced, Generation
from kvjax.decoding.options import Options
from kvjax.decoding.reader import PAD, Prefilled
from kvjax.interface import (
    CacheSpec,
    LanguageModel,
    Method,
    State,
    with_layer,
    with_specs,
)
from kvjax.registry import as_method


def ask(
    model: LanguageModel,
    method: Method | str,
    prefilled: Prefilled,
    questions: Sequence[Sequence[int]],
    **options: Any,
) -> list[Generation]:
    """Asks questions of prompts that were read, and decodes an answer to each.

    `prefilled` is not used up: its rows are copied, once for all these questions, and
    what is asked next begins where the prompts ended.

    Args:
        prefilled: prompts, read with room for the longest question and its answer:
            `max_new_tokens` of :func:`kvjax.decoding.reader.prefill` is for both.
        questions: token ids, of any lengths, none too: the answer then goes on with the
            prompt.
        **options: of :func:`stream`.

    Returns:
        One :class:`kvjax.decoding.generate.Generation` a question, in order: what comes
        behind it.

    Raises:
        ValueError: as :func:`stream`.
    """
    events = stream(model, method, prefilled, questions, **options)
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def stream(
    model: LanguageModel,
    method: Method | str,
    prefilled: Prefilled,
    questions: Sequence[Sequence[int]],
    *,
    rows: Sequence[int] | None = None,
    keep: bool = True,
    longest: int = 0,
    seen: Bool[np.ndarray, "B V"] | None = None,
    **options: Any,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Yields `(question, new text)`; the generator returns what :func:`ask` does.

    Args:
        prefilled, questions: as :func:`ask`.
        rows: of each question the row of `prefilled` that it is asked of, any number
            of times. Without, question i is asked of row i.
        keep: False uses `prefilled` up, and copies nothing that need not be.
        longest: tokens of a question to make room for, where none is so long: calls of
            the same number then share their compiled code, even in buckets.
        seen: tokens of each question's prompt, which a repetition penalty needs.
        **options: of :func:`kvjax.decoding.generate.generate`: `max_new_tokens` is of
            an answer alone, `sampling`, `stop`, `eos_ids`, `seed`, `stream_every`.

    Raises:
        ValueError: if there is no question, one is of a row that is not there or holds
            an unknown token; if the number of rows cannot be changed, because the
            method's sizes depend on it; and as
            :func:`kvjax.decoding.generate.generate`.
    """
    method = as_method(method)
    check_model(model)
    wanted = Options(**options)
    asked = token_rows(questions)
    batch = len(prefilled.recent)
    rows = chosen_rows(batch, len(asked), rows)
    check_vocabulary(model.decoder, asked)
    if keep or rows != list(range(batch)):
        prefilled = taken(method, prefilled, rows)
    size = reader.bucket(max(longest, 1, *map(len, asked)))
    tokens = np.full((len(asked), size), PAD, np.int32)
    for row, question in enumerate(asked):
        tokens[row, : len(question)] = question
    forced = Forced(tokens, np.array([len(question) for question in asked], np.int32))
    return generate.go_on(model, method, prefilled, wanted, seen, forced)


def chosen_rows(batch: int, count: int, rows: Sequence[int] | None) -> list[int]:
    """Returns the row that each of `count` questions is asked of; in order if None.

    Raises:
        ValueError: if there is no question, or one is of a row that is not there.
    """
    if not count:
        raise ValueError("questions is empty: give at least one.")
    if rows is None and count != batch:
        raise ValueError(
            f"{count} questions are asked of {batch} prompts: give `rows`, the prompt "
            "of each."
        )
    rows = list(range(batch) if rows is None else rows)
    if len(rows) != count or not all(0 <= row < batch for row in rows):
        raise ValueError(
            f"{rows=} must name one of {batch} prompts, from 0 on, for each of {count} "
            "questions."
        )
    return rows


def taken(method: Method, prefilled: Prefilled, rows: Sequence[int]) -> Prefilled:
    """Returns copies of some rows of prompts that were read, in that order.

    Raises:
        ValueError: if there are more or fewer than before, and the method's sizes
            depend on how many.
    """
    index = np.asarray(rows, np.int32)
    before = len(prefilled.recent)
    if not allows_rows(method, prefilled, len(index)):
        raise ValueError(
            f"what {method!r} keeps depends on the number of rows: of {before} prompts "
            f"ask {before} questions at a time, not {len(index)}."
        )
    states, kept = [], layouts(method, prefilled, len(index))
    for state, layout in zip(prefilled.states, kept, strict=True):
        leaves, structure = jax.tree.flatten(_of_rows(state, len(index)))
        leaves = _take(leaves, index, layout.have_rows)
        states.append(jax.tree.unflatten(structure, leaves))
    known, specs = prefilled.before, prefilled.specs
    return Prefilled(
        tuple(states),
        prefilled.hidden[index],
        prefilled.recent[index],
        None if known is None else known[index],
        specs and tuple(dataclasses.replace(x, batch=len(index)) for x in specs),
    )


def put(
    method: Method,
    states: Sequence[State],
    alone: Prefilled,
    place: int,
    count: int,
) -> tuple[State, ...]:
    """Returns the states of `count` rows with one row written over, in place.

    Args:
        states: of every layer; used up.
        alone: one prompt, which was read with as much room as the rows were.
        place: the row that becomes its.
    """
    joined, index = [], np.int32(place)
    layers = zip(states, alone.states, layouts(method, alone, count), strict=True)
    for rows, own, layout in layers:
        leaves, structure = jax.tree.flatten(rows)
        leaves = written(leaves, jax.tree.leaves(own), layout.have_rows, index)
        joined.append(jax.tree.unflatten(structure, leaves))
    return tuple(joined)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def written(
    leaves: list[Array],
    own: list[Array],
    have_rows: tuple[bool, ...],
    place: Int[Array, ""],
) -> list[Array]:
    """Returns arrays with one row written over, in place; those without rows stay."""
    return [
        _with_row(leaf, one, place) if has_rows else leaf
        for leaf, one, has_rows in zip(leaves, own, have_rows, strict=True)
    ]


def _with_row(leaf: Array, one: Array, place: Int[Array, ""]) -> Array:
    one = jax.device_put(one, jax.typeof(leaf).memory_space)
    return jax.lax.dynamic_update_slice_in_dim(leaf, one, place, 0)


def allows_rows(method: Method, prefilled: Prefilled, count: int) -> bool:
    """Says whether :func:`taken` can make so many rows of those that were read."""
    if count == len(prefilled.recent):
        return True
    return all(layout.fits for layout in layouts(method, prefilled, count))


class Layout(NamedTuple):
    """The arrays of a layer's state: of each, whether its first axis are the rows."""

    have_rows: tuple[bool, ...]
    fits: bool  # no other axis depends on the number of rows


@functools.partial(jax.jit, static_argnums=2)
def _take(leaves: list[Array], index: Int[Array, "B"], have_rows: tuple[bool, ...]):
    return [
        _rows(leaf, index) if has_rows else jnp.copy(leaf)
        for leaf, has_rows in zip(leaves, have_rows, strict=True)
    ]


def _rows(leaf: Array, index: Int[Array, "B"]) -> Array:
    memory = jax.typeof(leaf).memory_space
    here = jax.device_put(leaf, jax.memory.Space.Device)
    return jax.device_put(here[index], memory)  # a host does not gather


def layouts(method: Method, prefilled: Prefilled, count: int) -> list[Layout]:
    """Returns the layout of every layer, each found out once."""
    before = len(prefilled.recent)
    other = count if count != before else before + 1
    specs = prefilled.specs or [None] * len(prefilled.states)
    known, found = {}, []
    for state, spec in zip(prefilled.states, specs, strict=True):
        leaves, structure = jax.tree.flatten(with_layer(state, 0))
        shapes = tuple(leaf.shape for leaf in leaves)
        if (structure, shapes) not in known:
            # If nobody says what it was made for, whatever is as long as the rows.
            layout = Layout(tuple(x[:1] == (before,) for x in shapes), True)
            if spec is not None:
                layout = _layout(method, spec, shapes, other) or layout
            known[structure, shapes] = layout
        found.append(known[structure, shapes])
    return found


@functools.cache
def _layout(
    method: Method, spec: CacheSpec, held: tuple[tuple[int, ...], ...], count: int
) -> Layout | None:
    """Finds the axes that change with the number of rows, from shapes alone.

    Returns:
        None if those of the spec are not what is held: made by weights, say.
    """

    def shapes(batch: int) -> dict[Any, tuple[int, ...]]:
        layer = dataclasses.replace(spec, batch=batch)
        state = jax.eval_shape(lambda: method.finish(method.init(layer)))
        return {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(state)}

    one, other = shapes(spec.batch), shapes(count)
    if tuple(one.values()) != held:
        return None
    have_rows, fits = [], one.keys() == other.keys()
    for path, shape in one.items():
        with_rows = (count, *shape[1:])
        there = other.get(path, with_rows)
        has_rows = (shape[:1], there[:1]) == ((spec.batch,), (count,))
        fits &= there == (with_rows if has_rows else shape)
        have_rows.append(has_rows)
    return Layout(tuple(have_rows), fits)


def _of_rows(state: State, count: int) -> State:
    """Returns the state with every spec in it of so many rows."""

    def of_rows(spec: CacheSpec) -> CacheSpec:
        parts = 1 if spec.share is None else spec.share.rows
        if count % parts:
            raise ValueError(
                f"{count} rows do not go over data={parts} devices, as those that were "
                "read did: ask a multiple."
            )
        return dataclasses.replace(spec, batch=count // parts)

    return with_specs(state, of_rows)
