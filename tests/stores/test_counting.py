"""Counts in two words: exact past the borders of one, and with 64 bits off."""

import functools

import jax
import numpy as np
import pytest

from kvjax.stores import counting, offloaded
from kvjax.stores.hosted import Hosted


def words(number):
    return [number & ((1 << 30) - 1), number >> 30]


@pytest.mark.parametrize("start", [0, (1 << 30) - 3, (1 << 31) - 3, (1 << 45) - 1])
def test_sums_are_those_of_whole_numbers(start):
    """The largest addend, and small ones around 2**30 and 2**31; rows apart."""
    add = jax.jit(counting.add)
    count = np.asarray([words(start), words(7)], np.int32)
    expected = [start, 7]
    for more in ([1, 0], [2, 1 << 30], [1 << 30, 3], [(1 << 30) - 1, 1 << 30]):
        count = add(count, np.asarray(more, np.int32))
        expected = [a + b for a, b in zip(expected, more, strict=True)]
        assert counting.total(count).tolist() == expected
        assert count.dtype == np.int32


def test_bytes_of_long_runs_are_exact():
    """As `compare` counts them: a page of each of two heads comes past the border."""
    host = Hosted(jax.device_put(np.zeros((1, 2, 3, 4, 8), np.float32)))
    length, count = np.asarray([12], np.int32), [words((1 << 31) - 1)]
    make = jax.jit(functools.partial(offloaded.offloaded, slots=2))
    made = make(host, length)._replace(
        asked=np.asarray(count, np.int32), moved=np.asarray(count, np.int32)
    )
    ids = np.asarray([[[0], [1]]], np.int32)
    found, _ = jax.jit(offloaded.bring)(made, ids, length)
    counted = offloaded.crossed({"layer": found})
    pages, page = (1 << 31) + 1, 4 * 8 * 4
    assert counted is not None
    assert counted.asked.tolist() == counted.moved.tolist() == [pages * page]
