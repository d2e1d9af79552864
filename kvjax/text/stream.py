"""Tokens to text, piece by piece: what comes out is what decoding all of them adds.

A decoder looks at what stands before: it strips the first blank of a text, joins bytes
to characters, puts no blank before a full stop. So new tokens are decoded behind some
that came before them, never alone; nothing that was given out is taken back.
"""

import contextlib
from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what decoding part of a character gives
# Tokens that decide how the next one is decoded, and the longest wait for the end of a
# character: none is made of that many.
CONTEXT = 64
# Tokens to try instead; of four neighbours one begins with a whole character.
_ENOUGH = (4, 5, 6, 7, 16, 17, 18, 19)
_LONGEST_CHARACTER = 8  # tokens, at least


class TextStream:
    """Decodes tokens behind a text: all pieces are what they add to its decoding.

    A piece never ends inside a character: bytes that are not one yet wait for more.

    Args:
        decode: token ids to text.
        before: the tokens of the text before, or its last `CONTEXT`; none begin one.
        probes: the tokens of :func:`taking_back`.
    """

    def __init__(
        self, decode: Decode, before: Sequence[int] = (), probes: Sequence[int] = ()
    ):
        self._decode = decode
        self._probes = tuple(probes)
        self._begin_behind([int(token) for token in before])

    def _begin_behind(self, tokens: list[int]) -> None:
        window = _enough(self._decode, tokens)
        self._window = window  # tokens that are decoded together
        self._given = self._whole = self._decode(window)  # given out, and known so far
        self._clean = len(window)  # tokens up to a place where nothing was waiting

    @property
    def waiting(self) -> str:
        """The whole characters not yet given out: they may still be taken back."""
        return _rest(self._given, self._whole.rstrip(PARTIAL))

    def push(self, tokens: Sequence[int]) -> str:
        """Returns the text that became certain with `tokens`; sometimes none."""
        self._window = [*self._window, *map(int, tokens)]
        self._whole = self._decode(self._window)
        certain = self._certain()
        text = self._give(certain)
        if certain == self._whole:
            self._forget()
        elif len(self._window) - self._clean > CONTEXT:
            text += self._give_up_waiting()
        return text

    def step(self, token: int) -> str:
        """Returns what :meth:`push` does, of one token."""
        return self.push([token])

    def release(self) -> str:
        """Returns the whole characters that are :attr:`waiting`, and gives them out."""
        return self._give(self._whole.rstrip(PARTIAL))

    def finish(self) -> str:
        """Returns what still waits, with U+FFFD for bytes that are no character."""
        return self._give(self._whole)

    def _give(self, text: str) -> str:
        fresh = _rest(self._given, text)
        if fresh:
            self._given = text
        return fresh

    def _certain(self) -> str:
        """Returns the beginning of the window's text that no further token changes."""
        certain = self._whole.rstrip(PARTIAL)
        for probe in self._probes if certain == self._whole else ():
            certain = _common(certain, self._decode([*self._window, probe]))
        return certain

    def _forget(self) -> None:
        """Drops what is before the newest tokens, if these are enough to go on from."""
        newest = self._window[self._clean :]
        text = self._decode(newest)
        # Behind tokens without text the next would lose its blank.
        if text and PARTIAL not in text:
            self._window = newest
        elif len(self._window) > 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
        self._given = self._whole = self._decode(self._window)
        self._clean = len(self._window)

    def _give_up_waiting(self) -> str:
        """Gives out bytes that begin nothing: characters that are broken for good."""
        size = len(self._window)
        cuts = range(size, size - _LONGEST_CHARACTER, -1)
        parts = {cut: self._decode(self._window[:cut]) for cut in cuts}
        # Where all characters are whole, or else where none is in two halves.
        clean = [cut for cut in cuts if not parts[cut].endswith(PARTIAL)]
        clean += [cut for cut in cuts[::-1] if self._whole.startswith(parts[cut])]
        cut = clean[0]
        text, rest = self._give(parts[cut]), self._window[cut:]
        self._begin_behind(self._window[:cut])
        self._window = [*self._window, *rest]
        self._whole = self._decode(self._window)
        return text


def continuation(decode: Decode, before: Sequence[int], tokens: Sequence[int]) -> str:
    """Returns the text that `tokens` add to that of the tokens `before` them."""
    stream = TextStream(decode, before)
    return stream.push(tokens) + stream.finish()


def taking_back(encode: Callable[[str], list[int]], decode: Decode) -> tuple[int, ...]:
    """Returns tokens behind which a decoder says what stood before in another way.

    With byte fallback (SentencePiece) neighbouring bytes decode all or not at all: a
    character is certain once no byte follows. Where blanks around an apostrophe go,
    they go once a letter follows.
    """
    found = []
    # A tokenizer of few characters refuses others as it likes.
    with contextlib.suppress(Exception):
        tokens = list(encode("\U0010fffd"))  # in no vocabulary: bytes, if there are any
        parts = [token for token in tokens if decode([token]).startswith(PARTIAL)]
        found += _takes_back(decode, [*tokens, *parts[:1]])
    with contextlib.suppress(Exception):
        found += _takes_back(decode, list(encode("a ' a")))
    return tuple(found)


def _takes_back(decode: Decode, tokens: list[int]) -> list[int]:
    """Returns the last of the tokens, if it takes back what the others say."""
    before = decode(tokens[:-1]).rstrip(PARTIAL)
    return [] if decode(tokens).startswith(before) else tokens[-1:]


def _enough(decode: Decode, tokens: list[int]) -> list[int]:
    """Returns the last of `tokens`, as many as decide how the next one is decoded."""
    for size in (*_ENOUGH, CONTEXT):
        text, wider = (decode(tokens[-n:]).rstrip(PARTIAL) for n in (size, 2 * size))
        is_whole = text and PARTIAL not in text and wider.endswith(text)
        if is_whole or size >= len(tokens) < CONTEXT:
            return tokens[-size:]
    for size in _ENOUGH:  # the last character may be broken, and the bytes before it
        for end in range(1, 4):
            text = decode(tokens[-size:-end])
            if text and PARTIAL not in text:
                return tokens[-size:]
    return tokens[-CONTEXT:]


def _common(first: str, second: str) -> str:
    """Returns what both begin with."""
    size = len(first)
    while not second.startswith(first[:size]):
        size -= 1
    return first[:size]


def _rest(given: str, text: str) -> str:
    """Returns what `text` has behind `given`, the text of fewer tokens."""
    if text.startswith(given):
        return text[len(given) :]
    whole = given.rstrip(PARTIAL)  # the character that was broken may be whole now
    if text.startswith(whole):
        return text[len(whole) :]
    # The decoder took back what is given out: that stays, and only blanks may differ.
    end = len(_common(given, text))
    owed = len("".join(given[end:].split()))
    while end < len(text) and owed:
        owed -= not text[end].isspace()
        end += 1
    return text[end:]
