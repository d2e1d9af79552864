"""Prompts that were read go on: blocks of the loop of decode steps, and their text.

The loop runs up to `stream_every` steps on the device before the host looks at the
tokens: text streams, and no step waits. A model and a method are arguments here.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.decoding import loop, timing
from kvjax.decoding.detokenize import TextRow
from kvjax.decoding.finite import is_finite, not_finite
from kvjax.decoding.options import Options
from kvjax.decoding.reader import NO_TOKEN, PAD, Prefilled
from kvjax.decoding.sampling import active, row_keys, sample
from kvjax.interface import LanguageModel, Method


class Drafts(NamedTuple):
    """The drafts of one row, and what came of them.

    Of a row that a stop string ended, passes before the host looked are among them.
    """

    drafted: int  # tokens
    accepted: int  # of these
    # That checked them; each gave one token more than it accepted, unless an accepted
    # one ended the row.
    passes: int
    bytes_per_token: float = 0.0  # of caches, read to draft and to check

    @property
    def accepted_per_pass(self) -> float:
        """The tokens of a draft that held, on average."""
        return self.accepted / self.passes if self.passes else 0.0


class Generation(NamedTuple):
    """The tokens and the text that one row produced."""

    tokens: list[int]  # generated, with the EOS token if there was one
    text: str  # without the EOS token, cut before a stop string
    finish_reason: str  # "eos", "stop" or "length"
    drafts: Drafts | None = None  # None where nothing was drafted


class Forced(NamedTuple):
    """The tokens that rows are fed before they choose their own: questions, say."""

    tokens: Int[np.ndarray, "B Q"]  # right-padded
    lengths: Int[np.ndarray, "B"]


def go_on(
    model: LanguageModel,
    method: Method,
    prefilled: Prefilled,
    options: Options,
    seen: Bool[np.ndarray, "B V"] | None = None,
    forced: Forced | None = None,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Runs :func:`continued` with options that were checked.

    Args:
        forced: what each row is fed first, by the same steps, and what its text comes
            behind. A row whose tokens end sooner chooses while others are still fed.
    """
    if options.drafting is not None:
        raise ValueError(
            "a draft begins with the prompt that it reads: use generate or stream."
        )
    decoder, params, eos_ids = model.decoder, model.params, options.ends(model)
    eos_array = np.array(sorted(eos_ids), np.int32)
    sampling = active(options.sampling)
    states, hidden, window, *_ = prefilled
    batch = len(window)
    keys = None if sampling.temperature is None else row_keys(options.seed, batch)
    seen = None if sampling.repetition_penalty is None else seen
    given = keys, sampling, eos_array
    # Of each row's tokens, how many it did not choose.
    fed = np.zeros(batch, np.int32)
    if forced is not None:
        given, fed = (*given, *forced), forced.lengths
    most = options.max_new_tokens + int(fed.max())
    with timing.stretch("prompt"):
        tail = fresh_tail(batch, seen)
        newest, tail, tokens = loop.first(SAMPLED)(
            decoder, params, hidden, window, tail, given
        )
        block, produced = np.asarray(tokens)[:, None], 1
    rows = text_rows(model, options, behind(prefilled, forced))
    part = timing.Stretch("decode")  # of the block; the first comes of the prompt
    while True:
        finite = np.asarray(tail.finite)
        skipped = np.maximum(fed - (produced - block.shape[1]), 0)
        new = [
            (own if whole else own[:-1])[skip:].tolist()
            for own, whole, skip in zip(block, finite, skipped, strict=True)
        ]
        yield from push(rows, new, part)
        done = np.array([row.finish_reason is not None for row in rows])
        if not (finite | done).all():
            row = int(np.argmin(finite | done))
            raise not_finite(decoder, f"at token {produced} of row {row}")
        if done.all():
            return generations(rows)
        with timing.stretch("decode") as part:
            left = most - produced
            taken = loop.steps(SAMPLED)(
                decoder,
                method,
                options.stream_every,
                params,
                states,
                newest,
                tail._replace(done=done, finite=np.ones(batch, bool)),
                given,
                np.int32(min(options.stream_every, left)),
            )
            states, newest, tail = taken.states, taken.window, taken.memory
            count = int(taken.taken)
            block = np.asarray(taken.kept[0])[:count].T
        produced += count


def text_rows(
    model: LanguageModel, options: Options, behind: Sequence[Sequence[int]]
) -> list[TextRow]:
    """Returns the host's side of rows whose text comes behind these tokens."""
    ends, stop = options.ends(model), tuple(options.stop)
    return [
        TextRow(model.tokenizer, stop, ends, options.max_new_tokens, row)
        for row in behind
    ]


def push(
    rows: Sequence[TextRow], blocks: Sequence[list[int]], part: timing.Stretch
) -> Iterator[tuple[int, str]]:
    """Gives new tokens to rows that go on; yields `(row, new text)`.

    The tokens that they take are those of the stretch `part`.
    """
    had = sum(len(row.tokens) for row in rows)
    for index, (row, new) in enumerate(zip(rows, blocks, strict=True)):
        if row.finish_reason is not None or not new:
            continue
        text = row.push(new)
        part.tokens = sum(len(row.tokens) for row in rows) - had
        if text:
            yield index, text


def generations(rows: Sequence[TextRow]) -> list[Generation]:
    """Returns what rows produced that have ended."""
    return [Generation(row.tokens, row.text, str(row.finish_reason)) for row in rows]


def behind(prefilled: Prefilled, forced: Forced | None = None) -> list[list[int]]:
    """Returns the tokens that each row's text comes behind, or the last of them."""
    window = prefilled.recent if prefilled.before is None else prefilled.before
    before = [
        [token for token in row if token != NO_TOKEN]
        for row in np.asarray(window).tolist()
    ]
    if forced is None:
        return before
    pairs = zip(forced.tokens.tolist(), forced.lengths.tolist(), strict=True)
    questions = [tokens[:length] for tokens, length in pairs]
    return [[*a, *b] for a, b in zip(before, questions, strict=True)]


class Tail(NamedTuple):
    """The facts that a step remembers of each row, beside states and window."""

    chosen: Int[Array | np.ndarray, "B"]  # tokens, forced ones too
    done: Bool[Array | np.ndarray, "B"]
    finite: Bool[Array | np.ndarray, "B"]  # the logits that chose the newest token were
    enough: Int[Array | np.int32, ""]  # rows that are done for the steps to end
    seen: Bool[Array | np.ndarray, "B V"] | None  # only under a repetition penalty


def fresh_tail(batch: int, seen: Bool[np.ndarray, "B V"] | None) -> Tail:
    """Returns the tail of rows that chose nothing yet; the steps end with the last."""
    done = np.zeros(batch, bool)
    return Tail(np.zeros(batch, np.int32), done, ~done, np.int32(batch), seen)


def _sampled(logits, index, tail, given):
    """Returns the next tokens twice, the tail with them in between.

    Where tokens are forced, a row samples its first with the key that it has alone.
    """
    del index
    keys, sampling, eos_ids, *forced = given
    number = jnp.maximum(tail.chosen - forced[1], 0) if forced else tail.chosen
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, number)
    tokens = sample(keys, logits, tail.seen, sampling)
    ends = (tokens[:, None] == eos_ids).any(-1)
    if forced:
        index = tail.chosen[:, None]
        told = jnp.take_along_axis(forced[0], index, axis=1, mode="clip")[:, 0]
        is_told = tail.chosen < forced[1]
        tokens, ends = jnp.where(is_told, told, tokens), ends & ~is_told
    tokens = jnp.where(tail.done, PAD, tokens)
    finite = is_finite(logits) | tail.done
    seen = tail.seen
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.size), tokens].set(True)
    tail = Tail(tail.chosen + 1, tail.done | ends, finite, tail.enough, seen)
    return tokens, tail, tokens


def _is_over(tail: Tail) -> Bool[Array, ""]:
    """Says whether enough rows are done, or one is broken."""
    done = tail.done.sum(dtype=jnp.int32)
    return (done >= tail.enough) | ~tail.finite.all()


SAMPLED = loop.Rule(_sampled, _is_over)
