"""Text to tokens where texts begin and go on: what a tokenizer adds, and where it may.

A tokenizer takes every text for a whole one: it puts tokens before and behind it (BOS,
EOS), and perhaps a blank before its first word. A text that goes on with another has
none of these; its tokens are those that the two have as one.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Encode = Callable[[str], Sequence[int]]

_SAMPLES = ("a", "0", "\n")
# Texts behind which a token begins, whatever comes, one of them or another.
_BORDERS = ("\n", ".", "a", "0", ",\n")
_TAILS = (32, 512)  # tokens of a text that decide how it goes on


class Added(NamedTuple):
    """The tokens that a tokenizer puts around every text."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


def added(encode: Encode) -> Added:
    """Returns what is put around every text, from the tokenizer's own answers."""
    nothing, texts = list(encode("")), []
    for sample in _SAMPLES if nothing else ():
        # A tokenizer of few characters refuses others as it likes.
        with contextlib.suppress(Exception):
            texts.append(list(encode(sample)))
    before = min((shared(nothing, text) for text in texts), default=len(nothing))
    rest = nothing[before:][::-1]
    ends = (text[before:][::-1] for text in texts)
    behind = min((shared(rest, end) for end in ends), default=0)
    return Added(tuple(nothing[:before]), tuple(nothing[len(nothing) - behind :]))


def shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns how many tokens, or characters, both begin with."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def begin(encode: Encode, text: str) -> list[int]:
    """Returns the tokens of a text that is gone on with: none that end it (EOS)."""
    tokens = list(encode(text))
    return tokens[: len(tokens) - len(added(encode).behind)]


def inside(encode: Encode, text: str) -> list[int]:
    """Returns the tokens of a text without those that the tokenizer puts around it."""
    before, behind = added(encode)
    tokens = list(encode(text))
    return tokens[len(before) : len(tokens) - len(behind)]


def following(encode: Encode, text: str, *, after: str) -> list[int]:
    """Returns the tokens of a text behind the text `after`: those of both as one.

    Where the tokenizer joins the end of `after` with the beginning of `text` to one
    token there are no such: then the tokens of `text` alone, without a blank before it.
    """
    for before in (after, *_BORDERS):
        known, whole = inside(encode, before), inside(encode, before + text)
        if known and whole[: len(known)] == known:
            return whole[len(known) :]
    return inside(encode, text)


def following_tokens(tokenizer: Any, text: str, *, after: Sequence[int]) -> list[int]:
    """Returns what :func:`following` does, behind a text known by its tokens."""
    encode = tokenizer.encode
    before = added(encode).before
    tokens = [int(token) for token in after]
    if tuple(tokens[: len(before)]) == before:
        tokens = tokens[len(before) :]
    if not tokens:
        return inside(encode, text)
    for size in _TAILS:
        tail = tokens[-size:]
        spelled = spell(tokenizer, tail)
        half = (len(tail) + 1) // 2
        # The first of a tail are another text's in the middle of a word.
        if inside(encode, spelled)[-half:] == tail[-half:]:
            return following(encode, text, after=spelled)
    return following(encode, text, after="")


def spell(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Returns the text of tokens, with that of special ones where there is a way."""
    decode, ids = tokenizer.decode, [int(token) for token in tokens]
    if "skip_special_tokens" in inspect.signature(decode).parameters:
        return decode(ids, skip_special_tokens=False)
    return decode(ids)


def special_texts(tokenizer: Any, texts: Sequence[str]) -> dict[int, str]:
    """Returns the tokens of `texts` that decode to nothing, and how each is spelled."""
    found = {}
    for text in texts:
        tokens = []
        # What a tokenizer refuses has no token of its own.
        with contextlib.suppress(Exception):
            tokens = inside(tokenizer.encode, text)
        for token in tokens:
            spelled = "" if tokenizer.decode([token]) else spell(tokenizer, [token])
            if spelled and spelled in text:
                found[token] = spelled
    return found
