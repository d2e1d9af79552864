"""One generated row on the host: its tokens become text, and some of it ends the row.

What is given out is never taken back: no part of a character, nothing of a stop string.
"""

import dataclasses
from collections.abc import Sequence

from kvjax.interface import Tokenizer
from kvjax.text import encoding, stream
from kvjax.text.stream import TextStream

_MARKS = 0xDC00  # surrogates, which no decoded text has: each for a special token


@dataclasses.dataclass
class TextRow:
    """The host's side of one row: its tokens become the text behind the prompt's."""

    tokenizer: Tokenizer
    stop: tuple[str, ...]
    eos_ids: frozenset[int]
    max_new_tokens: int
    before: Sequence[int] = ()  # the prompt's tokens, or the last of them
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""  # given out so far
    held: str = ""  # decoded, but may be the beginning of a stop string
    finish_reason: str | None = None

    def __post_init__(self):
        encode, decode = self.tokenizer.encode, self.tokenizer.decode
        probes = stream.taking_back(encode, decode)
        self._stream = TextStream(decode, self.before, probes)
        # Special tokens have no text: those of a stop string are marked by a character.
        special = encoding.special_texts(self.tokenizer, self.stop)
        self._marks = {t: chr(_MARKS + i) for i, t in enumerate(special)}
        self._stop = [*self.stop]
        for stop in self.stop:
            for token, spelled in special.items():
                stop = stop.replace(spelled, self._marks[token])
            self._stop.append(stop)

    def push(self, tokens: list[int]) -> str:
        """Takes new tokens up to the one that ends the row; returns the new text."""
        text = ""
        # With stop strings token by token: a row ends at the token completing one,
        # wherever the chunks of the loop happen to end.
        size = 1 if self.stop else len(tokens)
        for start in range(0, len(tokens), size):
            text += self._push(tokens[start : start + size])
            if self.finish_reason is not None:
                break
        text = text.translate(dict.fromkeys(map(ord, self._marks.values())))
        self.text += text
        return text

    def _push(self, tokens: list[int]) -> str:
        fresh = []
        for token in tokens:
            self.tokens.append(token)
            if token in self.eos_ids:
                self.finish_reason = "eos"
                break
            fresh.append(token)
            if len(self.tokens) == self.max_new_tokens:
                self.finish_reason = "length"
                break
        self.held += self._stream.push(fresh)
        for token in fresh if self._marks else ():
            if token in self._marks:
                self.held += self._stream.release() + self._marks[token]
        if self.finish_reason is not None:
            self.held += self._stream.finish()
        # A stop string ends the row at once, though a character of it could be taken
        # back; what is given out waits until none can.
        text = self.held + self._stream.waiting
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.finish_reason = "stop"
            return text[: min(starts)]
        waiting = 0 if self.finish_reason else _unresolved(self.held, self._stop)
        text = self.held[: len(self.held) - waiting]
        self.held = self.held[len(text) :]
        return text


def _unresolved(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` that begins a stop string."""
    for size in range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1):
        if any(candidate.startswith(text[-size:]) for candidate in stop):
            return size
    return 0
