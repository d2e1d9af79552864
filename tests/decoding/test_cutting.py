"""Prompts in chunks: every token once, and whole granules where a method wants them."""

import itertools

import numpy as np
import pytest
from tiny import tiny_model

from kvjax.decoding import cutting
from kvjax.rope import Rope

LENGTHS = (0, 1, 7, 8, 9, 16, 24, 37)


def pieces_of(prompts, size, granule=None, begun=()):
    """Each row's pieces, put together again, and checked to be padded."""
    found = [[] for _ in prompts]
    for tokens, lengths in cutting.cut(prompts, size, granule, begun):
        assert tokens.shape == (len(prompts), size)
        assert tokens.dtype == lengths.dtype == np.int32
        assert lengths.any()
        for row, (line, count) in enumerate(zip(tokens, lengths, strict=True)):
            assert not line[count:].any()
            found[row].append(line[:count].tolist())
    for row, prompt in zip(found, prompts, strict=True):
        assert list(itertools.chain(*row)) == prompt
    return [[len(piece) for piece in row if piece] for row in found]


def rows_of(lengths):
    return [list(range(1, n + 1)) for n in lengths]


def test_chunks_without_a_granule_are_full():
    assert pieces_of(rows_of((5, 8, 17)), 8) == [[5], [8], [8, 8, 1]]


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("begun", [(), (0, 3, 8, 5, 15, 16, 7, 1)])
def test_every_granule_but_a_rows_last_comes_whole(size, begun):
    """Counted from the first token of the text, whatever was read before."""
    granule = 8
    found = pieces_of(rows_of(LENGTHS), size, granule, begun)
    for row, (pieces, length) in enumerate(zip(found, LENGTHS, strict=True)):
        start = begun[row] if begun else 0
        ends = list(itertools.accumulate(pieces, initial=start))
        cuts = set(ends)
        assert max(pieces, default=0) <= size
        # Inside of the granules that lie in this call nothing is cut, but in the last.
        for first in range(-(-start // granule) * granule, start + length, granule):
            inside = [cut for cut in cuts if first < cut < first + granule]
            is_last = first + granule >= start + length
            assert bool(inside) == is_last or (is_last and length == 1), (row, pieces)


def test_one_more_call_is_made_only_where_the_last_granule_is_whole():
    assert pieces_of(rows_of((24, 23, 25)), 8, 8) == [
        [8, 8, 7, 1],
        [8, 8, 7],
        [8, 8, 8, 1],
    ]
    # What was begun before is cut already.
    assert pieces_of(rows_of((5,)), 8, 8, (3,)) == [[5]]


def test_the_size_is_a_multiple_of_the_granule():
    decoder = tiny_model().decoder
    assert cutting.chunk_tokens(decoder, 100, 16) == 15
    assert cutting.chunk_tokens(decoder, 100, 16, 8) == 16
    assert cutting.chunk_tokens(decoder, 200, 100, 64) == 128
    rope = Rope(8, kind="dynamic", factor=2.0, original_context=32)
    turning = tiny_model(rope=rope).decoder
    # All at once, and no token is held back.
    (chunk,) = cutting.chunks(turning, [[1] * 64], 16, granule=16)
    assert chunk[1].tolist() == [64]
    sizes = [int(n[0]) for _, n in cutting.chunks(turning, [[1] * 32], 16, granule=16)]
    assert sizes == [16, 15, 1]
