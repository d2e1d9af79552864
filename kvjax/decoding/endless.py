"""Endless text, read piece by piece in constant memory: scored, then continued.

For methods whose state does not grow, such as cascade and streaming_llm. Nothing here
holds more than a piece of the text.
"""

import codecs
import math
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from kvjax import accounting, files
from kvjax.decoding import finite, reader
from kvjax.decoding.checks import (
    check_counts,
    check_model,
    check_reach,
    check_text,
    check_vocabulary,
)
from kvjax.decoding.generate import Generation, go_on
from kvjax.decoding.options import Options
from kvjax.decoding.sampling import shown
from kvjax.interface import LanguageModel, Method, State
from kvjax.registry import as_method
from kvjax.text import encoding
from kvjax.text.stream import CONTEXT, PARTIAL

PIECE = 1 << 16  # characters at which a piece ends, if it cannot before
_BEFORE = 256  # characters of a text that decide how the next piece is cut into tokens

# Places where tokenizers join nothing: between two lines without blanks, and after a
# word that ends a line.
_CLEAN = re.compile(r"(?<=\S\n)(?=\S)|(?<=[^\W_])(?=\n)")
# Where most join nothing, for text that has no such place: any line's end, any word.
_OTHERS = (re.compile(r"(?<=\S)(?=\n)"), re.compile(r"(?<=\S)(?= \S)"))
_LAST_POSITION = 2**31 - 1  # of int32
_LARGEST_EXPONENT = math.log(sys.float_info.max)


class Progress(NamedTuple):
    """The part of a text that was read so far."""

    tokens: int  # tokens that begin the text (BOS) included
    num_bytes: int  # of the text's, those whose tokens were predicted
    predicted: int  # tokens: all but the first
    nats: float  # their negative log-likelihood, summed

    @property
    def bits_per_byte(self) -> float:
        """The bits that the model needs for a byte of text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """The perplexity of a predicted token."""
        if not self.predicted:
            return math.nan
        mean = self.nats / self.predicted
        return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf

    def since(self, before: "Progress") -> "Progress":
        """Returns the part that came after `before`."""
        return Progress(
            self.tokens - before.tokens,
            self.num_bytes - before.num_bytes,
            self.predicted - before.predicted,
            self.nats - before.nats,
        )


class Read(NamedTuple):
    """A text that was read: everything its continuation needs, of constant size."""

    states: tuple[State, ...]
    hidden: Float[Array, "1 E"]  # of the last token
    newest: list[int]  # the last tokens, `method.rows` or more
    seen: Bool[np.ndarray, "1 V"]  # tokens of the vocabulary that the text has
    progress: Progress
    room: int = 1  # tokens to generate, for a method that holds each of them


def check_method(
    model: LanguageModel, method: Method | str, name: str = "this method"
) -> None:
    """Raises ValueError unless a text of any length can be read under the method."""
    method = as_method(method)
    if accounting.grows_with_prompt(method, model.decoder):
        raise ValueError(
            f"what {name} holds grows with the text: an endless one needs a method of "
            "constant memory, such as cascade:budget=1024 or streaming_llm:budget=1024."
        )
    if method.reread is not None:
        raise ValueError(
            f"{name} reads a prompt twice, and no endless one ends: use another, such "
            "as cascade:budget=1024."
        )
    if not method.renumbers:
        raise ValueError(
            f"positions under {name} grow with the text, beyond the "
            f"{model.decoder.context} that the model was made for: an endless one "
            "needs a method that re-numbers them, such as cascade:budget=1024."
        )


def pieces(
    blocks: Iterable[bytes], *, most: int = PIECE, name: str = "the text"
) -> Iterator[str]:
    """Cuts UTF-8 text between lines, or else after at most `most` characters.

    Tokens of the pieces, each behind the one before it (:func:`read`), are those of the
    whole text, as long as some of its lines end in a word or have a line without blanks
    before and after the break.

    Raises:
        ValueError: at the first byte that is not UTF-8; the message has its offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, offset = "", 0
    for block, is_last in _with_end(blocks):
        offset += len(block)
        try:
            held += decoder.decode(block, is_last)
        except UnicodeDecodeError as error:
            raise files.not_utf8(error, offset, name) from error
        while not is_last and (end := _end_of_piece(held, most)):
            yield held[:end]
            held = held[end:]
    for start in range(0, len(held), most):
        yield held[start : start + most]


def _with_end(blocks):
    for block in blocks:
        yield block, False
    yield b"", True


def _end_of_piece(text: str, most: int) -> int:
    """Returns the characters of the next piece; 0 while more text is to come first."""
    for place in (_CLEAN, *_OTHERS):
        ends = [match.end() for match in place.finditer(text, 1, most + 1)]
        if ends:
            return ends[-1]
        if len(text) <= most:
            return 0
    return most


def read(
    model: LanguageModel,
    method: Method | str,
    texts: Iterable[str],
    *,
    chunk_size: int = 512,
    room: int = 1,
) -> Generator[Progress, None, Read]:
    """Reads a text and scores it on the way: a generator that returns :class:`Read`.

    Args:
        model: decoder, weights and tokenizer.
        method: one of constant memory.
        texts: pieces of one text, such as :func:`pieces` makes. Each is cut into tokens
            behind the one before it, as the whole text is wherever a token begins.
        chunk_size: most tokens processed at once.
        room: tokens that may be generated behind it, under a method that holds each of
            them; other methods have room for any number.

    Returns:
        A generator of the running :class:`Progress`, one a piece.

    Raises:
        ValueError: if the method's state or its positions grow with the text,
            `chunk_size` or `room` is below 1, a piece is no text, logits are not
            finite, or, once at its end, the text has no tokens.
    """
    method = as_method(method)
    check_model(model, on_one_device="an endless text")
    check_method(model, method)
    options = Options(chunk_size=chunk_size)
    check_counts(room=room)
    if not accounting.grows_with_generated(method, model.decoder):
        room = 1  # for whatever room, the same programs
    check_reach(method, model.decoder, _LAST_POSITION, room, named="room")
    if isinstance(texts, str | bytes):
        raise ValueError(f"texts={shown(texts)} is one text: put it in a list.")
    return _read(model, method, texts, options.chunk_size, room)


def _read(model, method, texts, chunk_size, room) -> Generator[Progress, None, Read]:
    decoder, tokenizer = model.decoder, model.tokenizer
    reading = reader.begin(decoder, method, 1, decoder.context, room)
    seen = np.zeros((1, decoder.vocab_size), bool)
    newest: list[int] = []
    progress, before = Progress(0, 0, 0, 0.0), ""
    for index, text in enumerate(texts):
        check_text(text, f"piece {index} of the text")
        if not text:
            continue
        num_bytes = len(text.encode())
        if before:
            tokens = encoding.following(tokenizer.encode, text, after=before)
        else:
            tokens = encoding.begin(tokenizer.encode, text)
            # Nothing predicts the first token: its bytes do not count.
            first = tokenizer.decode(tokens[:1]).rstrip(PARTIAL)
            num_bytes -= len(first.encode())
        before = (before + text)[-_BEFORE:]
        if not tokens:
            continue
        check_vocabulary(decoder, [tokens])
        _check_position(progress.tokens + len(tokens))
        at, nats = progress.tokens, 0.0
        parts = reader.cut([tokens], chunk_size)
        for now, likely in reader.read_and_judge(
            model, method, reading, parts, finite.log_prob
        ):
            reading = now
            own = likely[0, int(at == 0) :]
            end = at + likely.shape[1]
            finite.check(decoder, own, f"in tokens {at + 1} to {end}")
            nats -= float(own.sum(dtype=np.float64))
            at = end
        seen[0, tokens] = True
        newest = [*newest, *tokens][-max(method.rows, CONTEXT) :]
        progress = Progress(
            at,
            progress.num_bytes + num_bytes,
            progress.predicted + len(tokens) - (progress.tokens == 0),
            progress.nats + nats,
        )
        yield progress
    if not progress.tokens:
        raise ValueError("the text is empty: give some.")
    return Read(*reading, newest, seen, progress, room)


def _check_position(tokens):
    if tokens > _LAST_POSITION:
        raise ValueError(
            f"the text has more than {_LAST_POSITION} tokens, the last position of a "
            "32-bit integer: begin anew."
        )


def extend(
    model: LanguageModel, method: Method | str, text: Read, **options: Any
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Continues a text that was read, which is used up.

    `options` are those of :class:`kvjax.decoding.options.Options`; only the last
    position of 32 bits bounds `max_new_tokens`.

    Raises:
        ValueError: as :func:`kvjax.decoding.generate.generate`, beyond that position,
            and beyond the text's `room` under a method that holds each generated token.
    """
    method = as_method(method)
    wanted = Options(**options)
    max_new_tokens = wanted.max_new_tokens
    _check_position(text.progress.tokens + max_new_tokens)
    is_bound = accounting.grows_with_generated(method, model.decoder)
    if is_bound and max_new_tokens > text.room:
        raise ValueError(
            f"{max_new_tokens=} exceeds the room={text.room} that the text was read "
            "with, and this method holds each generated token: read it with more."
        )
    check_model(model, on_one_device="an endless text")
    reading = reader.Reading(text.states, text.hidden)
    prefilled = reader.ended(model, method, reading, [text.newest])
    return go_on(model, method, prefilled, wanted, text.seen)
