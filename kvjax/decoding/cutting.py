"""Prompts cut into chunks of few shapes, on the host."""

from collections.abc import Iterator, Sequence

import numpy as np

from kvjax.interface import DecoderLM

PAD = 0  # what a finished row feeds and emits; any valid token does

# Right-padded tokens `(B, T)`, and the real ones of each row.
Chunk = tuple[np.ndarray, np.ndarray]


def bucket(tokens: int) -> int:
    """Returns the capacity to allocate: at most 1/8 above, eight steps an octave.

    Prompts of nearby lengths share their shapes, and so their compiled code.
    """
    tokens = int(tokens)
    step = 1 << max(0, tokens.bit_length() - 4)
    return -(-tokens // step) * step


def chunks(
    decoder: DecoderLM,
    prompts: Sequence[Sequence[int]],
    chunk_size: int,
    longest: int = 0,
    granule: int | None = None,
    begun: Sequence[int] = (),
) -> Iterator[Chunk]:
    """Cuts prompts into chunks whose size suits the longest of them.

    Args:
        chunk_size: tokens of a chunk at most, or a granule.
        granule, begun: as of :func:`cut`.
    """
    longest = max(longest, *map(len, prompts))
    if longest > decoder.rope.static_until:
        granule = None  # all keys rotate at once: no token can be held back
    return cut(
        prompts, chunk_tokens(decoder, longest, chunk_size, granule), granule, begun
    )


def cut(
    prompts: Sequence[Sequence[int]],
    size: int,
    granule: int | None = None,
    begun: Sequence[int] = (),
) -> Iterator[Chunk]:
    """Cuts prompts into right-padded chunks `(B, size)`.

    Args:
        size: a multiple of `granule`.
        granule: as of :class:`kvjax.hooks.Hooks`.
        begun: tokens that come before each of `prompts`; none if left out.
    """
    before = begun or [0] * len(prompts)
    places = [0] * len(prompts)
    while any(place < len(row) for place, row in zip(places, prompts, strict=True)):
        tokens = np.full((len(prompts), size), PAD, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for row, (place, prompt) in enumerate(zip(places, prompts, strict=True)):
            count = _next_tokens(
                len(prompt) - place, size, granule, before[row] + place
            )
            tokens[row, :count] = prompt[place : place + count]
            lengths[row] = count
            places[row] += count
        yield tokens, lengths


def _next_tokens(left: int, size: int, granule: int | None, start: int) -> int:
    """Returns how many of the tokens `left` a chunk takes whose first is at `start`."""
    if granule is None:
        return min(left, size)
    count = min(left, size - start % granule)
    # The last part of a row never comes whole: its last token is held back.
    ends_whole = count == left >= granule and (start + count) % granule == 0
    return count - ends_whole


def chunk_tokens(
    decoder: DecoderLM, longest: int, chunk_size: int, granule: int | None = None
) -> int:
    """Returns the tokens of each chunk that prompts up to `longest` are cut into.

    A multiple of `granule`, unless all come at once.
    """
    padded = bucket(longest)
    if longest > decoder.rope.static_until:
        # Its frequencies depend on the whole prompt's length: all keys rotate at once.
        return padded
    # Chunks of one size, so that the last one is not mostly padding.
    size = min(chunk_size, bucket(-(-padded // -(-padded // chunk_size))))
    return -(-size // (granule or 1)) * (granule or 1)


def recent(prompts: Sequence[Sequence[int]], rows: int, fill: int = PAD) -> np.ndarray:
    """Returns the last `rows` tokens of each prompt, with `fill` before them."""
    out = np.full((len(prompts), rows), fill, np.int32)
    for row, prompt in enumerate(prompts):
        newest = prompt[-rows:]
        out[row, rows - len(newest) :] = newest
    return out
