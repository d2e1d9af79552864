"""One generated row on the host: its tokens become text, piece by piece.

What is given out is never taken back: no part of a character, nothing of a stop string.
"""

import dataclasses

from kvjax.interface import Tokenizer

_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what decoding part of a character gives
_LONGEST_WAIT = 64  # tokens; no character is made of that many


@dataclasses.dataclass
class TextRow:
    """The host's side of one row: its tokens become text, piece by piece."""

    tokenizer: Tokenizer
    stop: tuple[str, ...]
    eos_ids: frozenset[int]
    max_new_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""  # given out so far
    held: str = ""  # decoded, but may be the beginning of a stop string
    finish_reason: str | None = None
    # Decoding starts at the previous token boundary known to be clean, not at the
    # beginning: tokenizers treat the first token of a text differently.
    anchor: int = 0
    clean: int = 0
    given: int = 0  # characters of the text since `clean` that were handed on

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
        self.text += text
        return text

    def _push(self, tokens: list[int]) -> str:
        for token in tokens:
            self.tokens.append(token)
            if token in self.eos_ids:
                self.finish_reason = "eos"
            elif len(self.tokens) == self.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                break
        self.held += self._decode()
        starts = [self.held.find(stop) for stop in self.stop]
        if any(start >= 0 for start in starts):
            self.finish_reason = "stop"
            return self.held[: min(start for start in starts if start >= 0)]
        waiting = 0 if self.finish_reason else _unresolved(self.held, self.stop)
        text = self.held[: len(self.held) - waiting]
        self.held = self.held[len(text) :]
        return text

    def _decode(self) -> str:
        """Text that has become certain since the last call."""
        end = len(self.tokens) - (self.finish_reason == "eos")
        before = len(self.tokenizer.decode(self.tokens[self.anchor : self.clean]))
        whole = self.tokenizer.decode(self.tokens[self.anchor : end])
        fresh = whole[before:]
        certain = fresh if self.finish_reason else fresh.rstrip(_PARTIAL)
        if len(certain) < len(fresh) and end - self.clean > _LONGEST_WAIT:
            # Not the beginning of a character but many broken ones: move on, to where
            # no character is in two halves.
            for cut in range(end - 8, end):
                part = self.tokenizer.decode(self.tokens[self.anchor : cut])[before:]
                if fresh.startswith(part):
                    fresh = certain = part
                    end = cut
                    break
        text, self.given = certain[self.given :], max(self.given, len(certain))
        # Behind tokens without text the next may lose its blank: they stay in view.
        is_seen = fresh or end - self.clean > _LONGEST_WAIT
        if is_seen and len(certain) == len(fresh):
            self.given -= len(certain)
            self.anchor, self.clean = self.clean, end
        return text


def _unresolved(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    for size in range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1):
        if any(candidate.startswith(text[-size:]) for candidate in stop):
            return size
    return 0
