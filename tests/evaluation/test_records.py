"""Rows as columns, and fronts that no row beats, against a search through all pairs."""

import itertools
import math
import sys
import types

import numpy as np
import pytest

from kvjax.evaluation import compare_rows, fronts, records
from kvjax.evaluation.statistics import Interval


def beaten(a, b, sign):
    """Whether b beats a: no more bytes, no worse a value, and one of them better."""
    return (
        b[0] <= a[0]
        and sign * b[1] >= sign * a[1]
        and (b[0] < a[0] or sign * b[1] > sign * a[1])
    )


@pytest.mark.parametrize("more_is_better", [True, False])
def test_a_front_is_what_nothing_beats(more_is_better):
    rng = np.random.default_rng(0)
    sign = 1 if more_is_better else -1
    for _ in range(50):
        points = [tuple(p) for p in rng.integers(0, 5, (8, 2)).tolist()]  # with ties
        sizes, values = zip(*points, strict=True)
        found = fronts.front(sizes, values, more_is_better=more_is_better)
        expected = {
            i
            for i, p in enumerate(points)
            if not any(beaten(p, q, sign) for q in points)
        }
        assert set(found) == expected
        assert [sizes[i] for i in found] == sorted(sizes[i] for i in found)


def test_what_has_no_value_is_on_no_front():
    assert fronts.front([1, 2], [None, 0.5], more_is_better=True) == [1]
    rows = [{"method": "a", "bytes_read": 1, "kl": {"mean": 0.1}, "passkey": None}]
    assert fronts.fronts(rows) == {"kl": ["a"]}


def row(name, read, kl, **more):
    fields = dict.fromkeys(compare_rows.Row._fields, Interval(0.5, 0.25, math.inf, 4))
    fields |= {"method": name, "bytes_read": read, "bytes_measured": 1.5}
    fields |= {"bytes_held": 3, "tokens_per_second": 9.0, "prefill_seconds": 0.5}
    fields |= {"chain_links": 5, "own": None, "own_after": None}
    depths = ((0.0, 1, 2),)
    fields |= {name: depths for name in fields if name.endswith("_by_depth")}
    return compare_rows.Row(**fields | {"kl": Interval(kl, 0.0, kl, 4)} | more)


ROWS = (
    row("full", 100, 0.0),
    row("quest:budget=64", 20, 0.2),
    row("retro:window=4+quest:budget=32", 30, 0.3),
)


def test_columns_are_numbers_under_names_that_say_which():
    table = compare_rows.Results(ROWS).columns()
    assert len({len(values) for values in table.values()}) == 1
    assert table["method"] == [one.method for one in ROWS]
    assert table["budget"] == [None, 64, 32]
    assert table["kl"] == [0.0, 0.2, 0.3]
    assert table["kl_high"] == [0.0, 0.2, 0.3]
    assert table["passkey_low"] == [0.25] * 3
    assert table["passkey_n"] == [4] * 3
    assert table["on_front_of_kl"] == [True, True, False]
    # No end is infinite, no column empty, and nothing is nested.
    assert "passkey_high" not in table
    assert "own" not in table
    values = itertools.chain.from_iterable(table.values())
    assert {type(value) for value in values} <= {str, int, float, bool, type(None)}
    # The same from what a file holds.
    assert records.columns([records.as_dict(one) for one in ROWS]) == table
    assert records.columns(ROWS, {"model": "m"})["model"] == ["m"] * 3


def test_pandas_is_given_the_columns(monkeypatch):
    given = types.ModuleType("pandas")
    given.DataFrame = lambda columns: ("frame", columns)
    given.__spec__ = types.SimpleNamespace()
    results = compare_rows.Results(ROWS)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pandas", given)
        assert results.to_pandas() == ("frame", results.columns())
        patched.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match="needs the package pandas: pip install"):
            results.to_pandas()


def test_a_real_frame_has_them_too():
    pytest.importorskip("pandas")
    frame = compare_rows.Results(ROWS).to_pandas()
    assert frame.shape[0] == 3
    assert frame.set_index("method").loc["quest:budget=64", "kl"] == 0.2
