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
) -> Iterator[Chunk]:
    """Cuts prompts into chunks whose size suits the longest of them."""
    longest = max(longest, *map(len, prompts))
    return cut(prompts, chunk_tokens(decoder, longest, chunk_size))


def cut(prompts: Sequence[Sequence[int]], size: int) -> Iterator[Chunk]:
    """Cuts prompts into right-padded chunks `(B, size)`."""
    for start in range(0, max(map(len, prompts)), size):
        pieces = [prompt[start : start + size] for prompt in prompts]
        tokens = np.full((len(prompts), size), PAD, np.int32)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece)] = piece
        yield tokens, np.array([len(piece) for piece in pieces], np.int32)


def chunk_tokens(decoder: DecoderLM, longest: int, chunk_size: int) -> int:
    """Returns the tokens of each chunk that prompts up to `longest` are cut into."""
    padded = bucket(longest)
    if longest > decoder.rope.static_until:
        # Its frequencies depend on the whole prompt's length: all keys rotate at once.
        return padded
    # Chunks of one size, so that the last one is not mostly padding.
    return min(chunk_size, bucket(-(-padded // -(-padded // chunk_size))))


def recent(prompts: Sequence[Sequence[int]], rows: int, fill: int = PAD) -> np.ndarray:
    """Returns the last `rows` tokens of each prompt, with `fill` before them."""
    out = np.full((len(prompts), rows), fill, np.int32)
    for row, prompt in enumerate(prompts):
        newest = prompt[-rows:]
        out[row, rows - len(newest) :] = newest
    return out
