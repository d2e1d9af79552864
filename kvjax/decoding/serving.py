"""Continuous rows: a batch whose finished rows take the next prompt.

A batch that is read and decoded as one waits for its longest prompt and its longest
answer. Here each prompt is read alone, into room for the longest, and takes the place
of a row that has ended; the steps of all rows are one program. For evaluation and
generation of many prompts; not a server: prompts wait for a row, and nobody is asked.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from kvjax.decoding import asking, loop, reader, timing
from kvjax.decoding.checks import check_counts, check_model, check_prompts, token_rows
from kvjax.decoding.continuing import (
    SAMPLED,
    Generation,
    Tail,
    behind,
    fresh_tail,
    generations,
    text_rows,
)
from kvjax.decoding.detokenize import TextRow
from kvjax.decoding.finite import not_finite
from kvjax.decoding.options import Options
from kvjax.decoding.reader import Prefilled
from kvjax.decoding.sampling import active, keys_of, mentioned
from kvjax.interface import LanguageModel, Method, State
from kvjax.registry import as_method


def serve_rows(
    model: LanguageModel,
    method: Method | str,
    prompts: Iterable[str | Sequence[int]],
    *,
    batch: int = 8,
    longest: int = 0,
    **options: Any,
) -> Iterator[tuple[int, Generation]]:
    """Continues many prompts, `batch` at a time, and yields each as soon as it ends.

    A prompt's tokens are those that :func:`kvjax.decoding.generate.generate` gives for
    all the prompts at once, whatever `batch` is. Nothing compiles again between them.

    Args:
        model: decoder, weights and tokenizer.
        method: as of :func:`kvjax.decoding.generate.generate`.
        prompts: texts, or token ids. Of a sequence all are checked before any work;
            anything else is asked for the next one when a row is free.
        batch: rows that decode together.
        longest: the most tokens of a prompt, for which each row has room; of a sequence
            0 finds it.
        **options: of :func:`kvjax.decoding.generate.generate`: `max_new_tokens`,
            `sampling`, `stop`, `eos_ids`, `seed`, `chunk_size`, `stream_every`.

    Yields:
        The number of a prompt, from 0 on, and its
        :class:`kvjax.decoding.generate.Generation`: in the order in which they end.

    Raises:
        TypeError: if `prompts` is one text.
        ValueError: as :func:`kvjax.decoding.generate.generate`; if prompts that come
            one by one have no `longest`, or one is longer; if the method's sizes depend
            on the number of rows; if the model is on a mesh.
    """
    method = as_method(method)
    check_model(model, on_one_device="a batch whose rows change")
    check_counts(batch=batch)
    if isinstance(prompts, Sequence):
        known = token_rows(prompts, model.tokenizer)
        check_prompts(model, method, known, Options(**options).max_new_tokens)
        longest = max(longest, *map(len, known))
        batch, prompts = min(batch, len(known)), known
    elif longest < 1:
        raise ValueError(
            f"prompts that come one by one need room, and {longest=}: give the most "
            "tokens that one of them has, or a list of all."
        )
    rows = _Rows(model, method, Options(**options, longest=longest), batch)
    return _served(rows, iter(prompts))


def _served(rows: "_Rows", prompts: Iterator) -> Iterator[tuple[int, Generation]]:
    """Yields what ended, while prompts or rows that decode are left."""
    coming = next(prompts, None)
    while True:
        while coming is not None and (free := rows.free()) is not None:
            ended = rows.admit(free, coming)
            if ended is not None:
                yield ended
            coming = next(prompts, None)
        if not rows.busy():
            return
        yield from rows.step(until_free=coming is not None)


class _Seat(NamedTuple):
    """A row that decodes: which prompt's it is, and its tokens."""

    number: int  # of the prompt
    row: TextRow

    @property
    def ended(self) -> tuple[int, Generation] | None:
        """The number and what is said, if it has ended."""
        if self.row.finish_reason is None:
            return None
        (said,) = generations([self.row])
        return self.number, said


class _Held(NamedTuple):
    """The arrays of every row that the loop of steps takes, on the device."""

    states: tuple[State, ...]
    window: Array | np.ndarray  # (B, R), the newest tokens
    seen: Array | np.ndarray | None  # (B, V), only under a repetition penalty


class _Rows:
    """The rows of a batch, each at its own place in its own text."""

    def __init__(
        self, model: LanguageModel, method: Method, options: Options, batch: int
    ):
        self.model, self.method, self.options = model, method, options
        self._eos_ids = np.array(sorted(options.ends(model)), np.int32)
        self._sampling = active(options.sampling)
        self._seats: list[_Seat | None] = [None] * batch
        self._admitted = 0
        self._held: _Held | None = None  # before the first prompt

    def free(self) -> int | None:
        """Returns a row that has nothing to do, if there is one."""
        return self._seats.index(None) if None in self._seats else None

    def busy(self) -> list[_Seat]:
        """Returns the rows that decode."""
        return [seat for seat in self._seats if seat is not None]

    def admit(
        self, place: int, prompt: str | Sequence[int]
    ) -> tuple[int, Generation] | None:
        """Reads a prompt into a free row; returns what is said if it ends at once."""
        decoder, params, tokenizer = self.model[:3]
        number, self._admitted = self._admitted, self._admitted + 1
        (tokens,) = token_rows([prompt], tokenizer, number)
        self._check(number, tokens)
        read = reader.read_whole(self.model, self.method, [tokens], self.options)
        seen = None
        if self._sampling.repetition_penalty is not None:
            seen = mentioned([tokens], decoder.vocab_size)
        window, tail, said = loop.first(SAMPLED)(
            decoder,
            params,
            read.hidden,
            read.recent,
            fresh_tail(1, seen),
            self._given([number]),
        )
        if not np.asarray(tail.finite).all():
            raise not_finite(decoder, f"at token 1 of prompt {number}")
        (row,) = text_rows(self.model, self.options, behind(read))
        row.push(np.asarray(said).tolist())
        seat = _Seat(number, row)
        if seat.ended is None:
            self._seats[place] = seat
            self._put(place, read, window, tail.seen)
        return seat.ended

    def _check(self, number: int, tokens: list[int]) -> None:
        """Raises ValueError unless there is room for the prompt, and it can be read."""
        if len(tokens) > self.options.longest:
            raise ValueError(
                f"prompt {number} has {len(tokens)} tokens and the rows have room for "
                f"{self.options.longest}: give longest={len(tokens)}."
            )
        new_tokens = self.options.max_new_tokens
        check_prompts(self.model, self.method, [tokens], new_tokens, first=number)

    def _given(self, numbers: Sequence[int]) -> tuple[Any, ...]:
        """Returns what every step is given: the prompts' keys, sampling, ends."""
        keys = None
        if self._sampling.temperature is not None:
            keys = keys_of(self.options.seed, np.array(numbers))
        return keys, self._sampling, self._eos_ids

    def _put(
        self, place: int, read: Prefilled, window: Array, seen: Array | None
    ) -> None:
        """Puts a prompt that was read alone where the row is."""
        batch = len(self._seats)
        if self._held is None:
            _check_rows(self.method, read, batch)
            # Every row a copy of the first prompt, until one of its own comes.
            states = asking.taken(self.method, read, [0] * batch).states
            few = jax.tree.map(
                lambda x: np.repeat(np.asarray(x), batch, axis=0), (window, seen)
            )
            self._held = _Held(states, *few)
            return
        states = asking.put(self.method, self._held.states, read, place, batch)
        rows, structure = jax.tree.flatten((self._held.window, self._held.seen))
        own = jax.tree.leaves((window, seen))
        rows = asking.written(rows, own, (True,) * len(rows), np.int32(place))
        self._held = _Held(states, *jax.tree.unflatten(structure, rows))

    def step(self, until_free: bool) -> Iterator[tuple[int, Generation]]:
        """Takes some steps and yields the rows that ended.

        Args:
            until_free: a prompt waits for a row: end with the first that is done.
        """
        if self._held is None:
            return
        batch, busy, options = len(self._seats), self.busy(), self.options
        of_seats = [(s.number, len(s.row.tokens)) if s else (0, 0) for s in self._seats]
        numbers, chosen = np.array(of_seats, np.int32).T
        idle = np.array([seat is None for seat in self._seats])
        enough = np.int32(idle.sum() + 1 if until_free else batch)
        left = options.max_new_tokens - int(chosen.max())
        with timing.stretch("decode") as part:
            taken = loop.steps(SAMPLED)(
                self.model.decoder,
                self.method,
                options.stream_every,
                self.model.params,
                self._held.states,
                self._held.window,
                Tail(chosen, idle, np.ones(batch, bool), enough, self._held.seen),
                self._given(numbers.tolist()),
                np.int32(min(options.stream_every, left)),
            )
            block = np.asarray(taken.kept[0])[: int(taken.taken)].T
            part.tokens = block.shape[1] * len(busy)
        self._held = _Held(taken.states, taken.window, taken.memory.seen)
        finite = np.asarray(taken.memory.finite)
        for place, seat in enumerate(self._seats):
            if seat is None:
                continue
            count = len(seat.row.tokens) + block.shape[1]
            new = block[place] if finite[place] else block[place, :-1]
            seat.row.push(new.tolist())
            # What comes behind a row's end is nobody's.
            if seat.ended is None and not finite[place]:
                where = f"at token {count} of prompt {seat.number}"
                raise not_finite(self.model.decoder, where)
            if seat.ended is not None:
                self._seats[place] = None
                yield seat.ended


def _check_rows(method: Method, read: Prefilled, batch: int) -> None:
    """Raises ValueError unless rows read alone can be put into a batch of rows."""
    if not asking.allows_rows(method, read, batch):
        raise ValueError(
            f"what {method!r} keeps depends on the number of rows, and {batch=}: give "
            "batch=1, or call generate for each batch."
        )
